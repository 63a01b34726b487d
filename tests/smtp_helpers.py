"""A strict SMTP server without sockets, and what tests drive it with."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from cpsmailaccess_delivery.account import HIDDEN, Account, Secret
from cpsmailaccess_delivery.dsn import Wish
from cpsmailaccess_delivery.outcome import Phase
from cpsmailaccess_delivery.smtp.machine import (
    Closed,
    Event,
    Machine,
    MailDone,
    MailUnsent,
    Ready,
    Result,
)

SERIAL = ("8BITMIME", "SIZE 1000000", "ENHANCEDSTATUSCODES")
PIPELINING = ("PIPELINING", *SERIAL)
CHUNKING = ("PIPELINING", "CHUNKING", *SERIAL)
SERIAL_CHUNKING = ("CHUNKING", *SERIAL)
MODES = {
    "serial": SERIAL,
    "pipelining": PIPELINING,
    "chunking": CHUNKING,
    "serial-chunking": SERIAL_CHUNKING,
}

Rule = Callable[[str, "Relay"], "str | None"]


@dataclass(frozen=True)
class Letter:
    sender: str
    recipients: tuple[str, ...]
    message: bytes
    wish: Wish | None = None


def letter(number: int = 1, *recipients: str, message: bytes | None = None) -> Letter:
    return Letter(
        f"sender{number}@example.org",
        recipients or (f"to{number}@example.net",),
        message if message is not None else b"Subject: %d\n\nhello %d\n" % (number, number),
    )


def account(**changes: Any) -> Account:
    settings: dict[str, Any] = {
        "mailbox": "*",
        "host": "127.0.0.1",
        "port": 2525,
        "security": "plain",
        "mails_per_session": 10_000,
    }
    if "username" in changes:  # sessions get the secret by hand
        settings["password"] = HIDDEN
    return Account(**{**settings, **changes})


@dataclass
class Relay:
    """Bytes in, bytes out; strict about the order of commands.

    ``rule(line, relay)`` may answer a command (or ``"END"``, the end of data) instead of us;
    "" is silence, a line that begins with "!" is said, and then the connection closes.
    """

    keywords: Iterable[str] = PIPELINING
    rule: Rule | None = None
    greeting: str = "220 relay.example.net ESMTP"
    commands: list[str] = field(default_factory=list)
    delivered: list[tuple[str, list[str], bytes]] = field(default_factory=list)
    closing: bool = False
    deaf: bool = False  # to whatever comes, a handshake for instance
    starting_tls: bool = False
    sender: str | None = None
    recipients: list[str] = field(default_factory=list)
    body: bytes = b""
    logins: list[tuple[str, str]] = field(default_factory=list)
    _buffer: bytes = b""
    _mode: str = "command"
    _chunk: int = 0
    _last: bool = False
    _auth: list[str] = field(default_factory=list)

    def receive(self, data: bytes) -> bytes:
        self._buffer += data
        out = []
        while not self.closing and not self.deaf:
            answer = self._step()
            if answer is None:
                break
            if answer.startswith("!"):
                answer, self.closing = answer[1:], True
            out.append(answer.encode("latin-1") + (b"\r\n" if answer else b""))
        return b"".join(out)

    def _step(self) -> str | None:
        if self._mode == "chunk":
            if len(self._buffer) < self._chunk:
                return None
            self.body += self._buffer[: self._chunk]
            self._buffer = self._buffer[self._chunk :]
            self._mode = "command"
            return self._end() if self._last else "250 chunk"
        if self._mode == "data":
            if self._buffer.startswith(b".\r\n"):
                end = 0
            else:
                end = self._buffer.find(b"\r\n.\r\n") + 2
                if end < 2:
                    return None
            lines = self._buffer[:end]
            self.body = (b"\r\n" + lines).replace(b"\r\n.", b"\r\n")[2:]
            self._buffer = self._buffer[end + 3 :]
            self._mode = "command"
            return self._end()
        line, found, rest = self._buffer.partition(b"\r\n")
        if not found:
            return None
        self._buffer = rest
        return self._command(line.decode("utf-8"))

    def _end(self) -> str:
        answer = self.rule("END", self) if self.rule else None
        if answer is None and not self.recipients:
            answer = "554 no valid recipients"
        if answer is None or answer.lstrip("!").startswith("2"):
            self.delivered.append((self.sender or "", self.recipients, self.body))
        self._reset()
        return "250 2.0.0 queued" if answer is None else answer

    def _reset(self) -> None:
        self.sender, self.recipients, self.body = None, [], b""

    def _command(self, line: str) -> str:
        if self._mode == "auth":
            self._auth.append(line)
            return self._log_in()
        self.commands.append(line)
        verb = line.split(":")[0].split(" ")[0].upper()
        answer = self.rule(line, self) if self.rule else None
        if verb == "BDAT":  # RFC 3030: the octets come, whatever is said
            self._chunk = int(line.split()[1])
            self._last = line.endswith("LAST")
            if answer is None and self.recipients:
                self._mode = "chunk"
                return ""
            if len(self._buffer) < self._chunk:
                self._buffer = line.encode() + b"\r\n" + self._buffer
                self.commands.pop()
                return None  # type: ignore[return-value]
            self._buffer = self._buffer[self._chunk :]
            return answer if answer is not None else "503 5.5.1 no recipients"
        if answer is not None:
            return answer
        if verb == "EHLO":
            self._reset()
            lines = ["relay.example.net", *self.keywords]
            last = len(lines) - 1
            return "\r\n".join(
                f"250{' ' if at == last else '-'}{line}" for at, line in enumerate(lines)
            )
        if verb == "MAIL":
            if self.sender is not None:
                return "503 5.5.1 nested MAIL"
            self.sender = line[line.index("<") + 1 : line.index(">")]
            return "250 2.1.0 ok"
        if verb == "RCPT":
            if self.sender is None:
                return "503 5.5.1 need MAIL"
            self.recipients.append(line[line.index("<") + 1 : line.rindex(">")])
            return "250 2.1.5 ok"
        if verb == "DATA":
            if not self.recipients:
                return "503 5.5.1 need RCPT"
            self._mode = "data"
            return "354 go ahead"
        if verb == "RSET":
            self._reset()
            return "250 2.0.0 ok"
        if verb == "QUIT":
            return "!221 2.0.0 bye"
        if verb == "HELO":
            return "250 relay.example.net"
        if verb == "STARTTLS":
            self.starting_tls = True
            return "220 2.0.0 go"
        if verb == "AUTH":
            self._auth = line.split()[1:]
            return self._log_in()
        return "502 5.5.2 what?"

    def _log_in(self) -> str:
        self._mode = "auth"
        said = self._auth
        if said[0] == "PLAIN":
            _, user, password = base64.b64decode(said[1]).decode().split("\0")
        elif said[0] == "LOGIN":
            if len(said) < 3:
                return (
                    "334 " + base64.b64encode([b"Username:", b"Password:"][len(said) - 1]).decode()
                )
            user, password = (base64.b64decode(word).decode() for word in said[1:])
        else:
            if len(said) < 2:
                return "334 " + base64.b64encode(b"<1@relay>").decode()
            user, password = base64.b64decode(said[1]).decode().split(" ")
        self._mode = "command"
        self.logins.append((user, password))
        answer = self.rule("LOGIN", self) if self.rule else None
        return answer or "235 2.7.0 welcome"


class Drive:
    """A machine, the mails it is to send, and what came back: the test's transport."""

    def __init__(self, relay: Relay, letters: Iterable[Letter] = (), **settings: Any) -> None:
        password = settings.pop("password", None)
        self.relay = relay
        self.machine = Machine(
            account(**settings), Secret(password) if password else None, helo_name="me.example.org"
        )
        self.queue = list(letters)
        self.events: list[Event] = []
        self.given: list[Letter] = []
        self.sent = b""
        self.rest = b""

    def take(self, events: list[Event]) -> None:
        self.events += events

    def fill(self) -> bytes:
        while self.machine.wants_mail and self.queue:
            mail = self.queue.pop(0)
            self.given.append(mail)
            self.take(self.machine.send(mail))
        written = b""
        while data := self.machine.data_to_send():
            written += data
        self.sent += written
        return written

    def run(self, *, from_relay: int = 10**9, to_relay: int = 10**9, step: int = 10**9) -> Drive:
        """Talk until nobody has anything to say, or so many octets went one way."""
        answer = self.relay.greeting.encode() + b"\r\n"
        while answer and not self.closed:
            piece, answer = answer[:step], answer[step:]
            if len(piece) >= from_relay:
                self.take(self.machine.receive(piece[:from_relay]))
                self.rest = piece[from_relay:] + answer + self.relay.receive(self.fill())
                break
            from_relay -= len(piece)
            self.take(self.machine.receive(piece))
            written = self.fill()
            answer += self.relay.receive(written[:to_relay])
            to_relay -= len(written)
            if to_relay <= 0:
                break
        return self

    def go_on(self) -> None:
        """Let the relay say what `run` has cut off, and so on."""
        answer = self.rest
        while not self.closed:
            if answer:
                self.take(self.machine.receive(answer))
            written = self.fill()
            if not written and not self.closed:
                self.take(self.machine.eof())
            answer = self.relay.receive(written)

    @property
    def closed(self) -> bool:
        return any(isinstance(event, Closed) for event in self.events)

    @property
    def close(self) -> Closed:
        (closed,) = (event for event in self.events if isinstance(event, Closed))
        assert self.events[-1] is closed
        return closed

    @property
    def ready(self) -> bool:
        return any(isinstance(event, Ready) for event in self.events)

    @property
    def done(self) -> dict[str, Result]:
        return {
            recipient: result
            for event in self.events
            if isinstance(event, MailDone)
            for recipient, result in event.results.items()
        }

    @property
    def unsent(self) -> list[Letter]:
        return [event.mail for event in self.events if isinstance(event, MailUnsent)]

    def check(self) -> None:
        """Assert what must hold however a session ends: nothing lost, doubled or guessed."""
        back = [event.mail for event in self.events if isinstance(event, MailDone | MailUnsent)]
        assert len(back) == len(self.given)
        assert {id(mail) for mail in back} == {id(mail) for mail in self.given}
        for event in self.events:
            if isinstance(event, MailDone):
                assert set(event.results) == set(event.mail.recipients)
        delivered = {r for _, recipients, _ in self.relay.delivered for r in recipients}
        unsent = {r for mail in self.unsent for r in mail.recipients}
        assert not delivered & unsent
        for recipient, result in self.done.items():
            accepted = (
                result.phase is Phase.BODY and result.reply is not None and result.reply.code == 250
            )
            unclear = result.phase is Phase.BODY and result.reply is None
            if recipient in delivered:
                assert accepted or unclear, (recipient, result)
            else:
                assert not accepted, (recipient, result)
        assert all(isinstance(event, Closed) is (event is self.events[-1]) for event in self.events)


class RelayServer(asyncio.Protocol):
    """`Relay` behind a socket; one relay per connection."""

    def __init__(self, make: Callable[[], Relay], tls: ssl.SSLContext | None = None) -> None:
        self.relay = make()
        self._tls = tls
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self.relay.greeting:
            transport.write(self.relay.greeting.encode() + b"\r\n")

    def data_received(self, data: bytes) -> None:
        answer = self.relay.receive(data)
        if answer:
            self.transport.write(answer)
        if self.relay.starting_tls:
            self.relay.starting_tls = False
            self.transport.pause_reading()
            self._task = asyncio.ensure_future(self._upgrade())
        elif self.relay.closing:
            self.transport.close()

    async def _upgrade(self) -> None:
        assert self._tls is not None
        loop = asyncio.get_running_loop()
        try:
            transport = await loop.start_tls(self.transport, self, self._tls, server_side=True)
        except OSError:
            return
        if transport is not None:
            self.transport = transport
