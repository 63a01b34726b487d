"""A malicious relay for the SMTP machine: a little program in bytes, and what must hold."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field

from cpsmailaccess_delivery.account import HIDDEN, Account, Secret
from cpsmailaccess_delivery.dsn import Wish
from cpsmailaccess_delivery.outcome import Phase, classify
from cpsmailaccess_delivery.smtp.explain import explain
from cpsmailaccess_delivery.smtp.machine import (
    Closed,
    Machine,
    MailDone,
    MailUnsent,
    Result,
    StartTls,
    State,
)

from .reader import Reader

USER, PASSWORD = "user@example.org", "correct horse battery"
_SECRETS = (
    PASSWORD,
    base64.b64encode(PASSWORD.encode()).decode(),
    base64.b64encode(f"\0{USER}\0{PASSWORD}".encode()).decode(),
)
_KEYWORDS = ("PIPELINING", "CHUNKING", "8BITMIME", "SMTPUTF8", "SIZE 5000", "DSN", "STARTTLS")
_BEFORE_TLS = re.compile(rb"(?:EHLO [^\r\n]*\r\n|HELO [^\r\n]*\r\n|STARTTLS\r\n|QUIT\r\n)*\Z")
_MOST = 32 * 1024  # bytes that a machine may keep of a reply, beyond `reply.MAX_REPLY`


@dataclass(frozen=True, eq=False)
class Letter:
    """``mark``: ends the body, so that the wire shows whether all of it is out."""

    number: int
    recipients: tuple[str, ...]
    wish: Wish | None = None

    @property
    def sender(self) -> str:
        return f"sender{self.number}@example.org"

    @property
    def mark(self) -> bytes:
        return b"end-of-%d" % self.number

    @property
    def message(self) -> bytes:
        odd = b"\n.\r\n..\r." if self.number % 2 else "\nö\n".encode()
        return b"Subject: %d\n\n" % self.number + odd + self.mark

    def is_out(self, wire: bytes, chunking: bool) -> bool:
        """Tell whether the end of data is on the wire."""
        return self.mark + (b"\r\n" if chunking else b"\r\n.\r\n") in wire


@dataclass
class Talk:
    """One session: the machine, what it was given, what it said, what came of it."""

    machine: Machine
    letters: list[Letter]
    keywords: tuple[str, ...]
    given: list[Letter] = field(default_factory=list)
    events: list[object] = field(default_factory=list)
    wire: bytes = b""
    heard: list[bytes] = field(default_factory=list)
    encrypted: bool = False

    def take(self, events: list[object]) -> None:
        assert not (events and any(isinstance(e, Closed) for e in self.events)), "after Closed"
        self.events += events
        for event in events:
            if isinstance(event, StartTls):
                assert self.machine.account.security == "starttls"
                assert not self.encrypted

    def hear(self, data: bytes) -> None:
        self.heard.append(data)
        self.take(self.machine.receive(data))
        pending = self.machine._parser
        kept = len(pending._partial) + sum(map(len, pending._lines))
        assert kept <= 64 * 1024 + _MOST, "keeps what has no end"

    def write(self) -> None:
        while data := self.machine.data_to_send():
            self.wire += data
            if self.machine.account.security == "starttls" and not self.encrypted:
                assert _BEFORE_TLS.match(self.wire), "in clear before TLS"

    def give(self) -> None:
        while self.machine.wants_mail and self.letters:
            self.given.append(self.letters.pop(0))
            self.take(self.machine.send(self.given[-1]))

    def shake_hands(self) -> None:
        if self.machine.state is State.TLS:
            self.encrypted = True
            self.take(self.machine.tls_started())
            assert not self.machine.capabilities.keywords, "believes what was said in clear"

    def honest(self) -> bytes:
        """Return what a relay that means well would say now."""
        awaiting, state = self.machine.awaiting, self.machine.state
        if state is State.HELLO:
            lines = ("relay", *self.keywords, "AUTH PLAIN LOGIN CRAM-MD5")
            return b"".join(b"250-%b\r\n" % line.encode() for line in lines) + b"250 HELP\r\n"
        codes = {
            Phase.GREETING: b"220 relay\r\n",
            Phase.TLS: b"220 go\r\n",
            Phase.AUTH: b"235 2.7.0 welcome\r\n",
            Phase.DATA: b"354 go ahead\r\n",
        }
        return codes.get(awaiting, b"250 2.0.0 ok\r\n")

    def check(self) -> None:
        """Assert the docstring of `machine`."""
        done = [event for event in self.events if isinstance(event, MailDone)]
        unsent = [event.mail for event in self.events if isinstance(event, MailUnsent)]
        back = [event.mail for event in done] + unsent
        assert sorted(map(id, back)) == sorted(map(id, self.given)), "lost or doubled"
        closed = [event for event in self.events if isinstance(event, Closed)]
        assert closed == self.events[-1:], "Closed is once, last"
        chunking = self.machine.capabilities.chunking
        for event in done:
            assert set(event.results) == set(event.mail.recipients)
            out = event.mail.is_out(self.wire, chunking)
            for result in event.results.values():
                self._check_result(result, out)
        if not chunking:
            assert not [mail for mail in unsent if mail.is_out(self.wire, False)], "out, not unsent"
        if closed[0].failure is not None:
            self._check_result(closed[0].failure, True)
            self._check_text(explain(self.machine.account, closed[0].failure))
        self._check_text(repr(self.machine))
        self._check_wire(chunking)

    def _check_result(self, result: Result, out: bool) -> None:
        verdict = classify(result.phase, result.reply, result.error)
        self._check_text(result.text, f"{verdict.state} {verdict.trouble}")
        if result.phase is Phase.BODY and (result.reply is None or result.reply.code < 300):
            assert out, "unclear or accepted, but its end of data was never written"
        if result.reply is not None and result.reply.code // 100 == 2:
            assert result.phase is Phase.BODY
            said = b"%d" % result.reply.code
            assert any(said in data for data in (b"".join(self.heard),)), "nobody said so"

    def _check_text(self, *texts: str) -> None:
        secrets = _SECRETS if self.machine.account.username else ()
        for text in texts:
            assert not any(secret in text for secret in secrets), "a secret in a text"
            assert "\r" not in text
            assert "\n" not in text
            assert "\x1b" not in text

    def _check_wire(self, chunking: bool) -> None:
        """No line of a body may pass for a command or for an end of data."""
        assert b"\n" not in self.wire.replace(b"\r\n", b""), "LF alone"
        assert b"\r" not in self.wire.replace(b"\r\n", b""), "CR alone"
        if not chunking:
            ends = self.wire.count(b"\r\n.\r\n")
            assert ends <= len(self.given)


def talk(data: bytes) -> None:
    """Run one session that `data` dictates.

    First what the account and the relay are like, then what the relay says; NUL cuts it (the
    network may split anywhere), and the byte after it says what happens there.
    """
    script = Reader(data)
    flags, offers, size = script.byte(), script.byte(), script.byte()
    login = flags & 4
    account = Account(
        mailbox="*",
        host="127.0.0.1",
        security=("plain", "starttls", "tls")[flags % 4 % 3],
        mails_per_session=1 + size % 5,
        **({"username": USER, "password": HIDDEN} if login else {}),
    )
    machine = Machine(account, Secret(PASSWORD) if login else None, helo_name="me.example.org")
    machine.window = 1 + size % 8
    wish = Wish("success,failure", "full", "id@example.org") if flags & 8 else None
    letters = [
        Letter(number, ("a@example.net", "b@example.net", "ü@example.net")[: 1 + number % 3], wish)
        for number in range(6)
    ]
    keywords = tuple(word for bit, word in enumerate(_KEYWORDS) if offers >> bit & 1)
    session = Talk(machine, letters, keywords)
    acts = {
        ord("h"): lambda: session.hear(session.honest()),
        ord("w"): session.write,
        ord("m"): session.give,
        ord("t"): session.shake_hands,
        ord("e"): lambda: session.take(machine.eof()),
        ord("f"): lambda: session.take(machine.fail(TimeoutError("late"))),
        ord("q"): lambda: session.take(machine.quit()),
        ord("s"): lambda: session.take(machine.stop()),
        ord("a"): lambda: session.take(machine.abort()),
    }
    while script:
        said = script.line()
        if said:
            session.hear(said)
        act = acts.get(script.byte())
        if act is not None:
            act()
        if flags & 16:  # as a session does after each arrival
            session.give()
            session.write()
    session.take(machine.eof())
    session.check()
