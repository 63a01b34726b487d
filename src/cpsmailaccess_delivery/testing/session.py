"""The dialogue of one session of the test server: strict where real servers are."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from . import login
from .connection import Connection
from .received import Command, Login, ReceivedMail, look_at_header
from .syntax import SyntaxRefused, parse_mail, parse_rcpt

if TYPE_CHECKING:
    from .server import SMTPServer

_LONGEST_LINE: Final = 12288  # octets: AUTH, RFC 4954 section 4
_CLIENT = re.compile(rb"(?:EHLO|HELO) ([A-Za-z0-9._:\[\]-]+)\Z", re.IGNORECASE)
_BDAT = re.compile(rb"BDAT (\d{1,12})( LAST)?\Z", re.IGNORECASE)

#: Commands after which a client waits for the reply: RFC 2920 section 3.1.
_LAST_IN_GROUP: Final = frozenset(
    (b"EHLO", b"HELO", b"DATA", b"STARTTLS", b"AUTH", b"NOOP", b"VRFY", b"QUIT")
)


@dataclass(slots=True)
class _Mail:
    """A mail transaction (RFC 5321 section 3.3) on its way."""

    sender: str
    params: dict[str, str]
    recipients: dict[str, dict[str, str]] = field(default_factory=dict)
    chunks: bytearray = field(default_factory=bytearray)
    chunked: bool = False


class Session(Connection):
    """The dialogue of one client; made by `SMTPServer`, lives in its loop."""

    def __init__(self, server: SMTPServer) -> None:
        super().__init__(server)
        self._greeted = False
        self._username: str | None = None
        self._dialogue: tuple[str, login.Exchange] | None = None
        self._mail: _Mail | None = None
        self._mails = 0
        self._data = False  # between 354 and the end of data
        self._searched = 0  # octets of _in that do not hold the end of data
        self._chunk: tuple[int, bool] | None = None  # octets to come, LAST

    # Input

    def _step(self) -> bool:
        if self._data:
            return self._take_data()
        if self._chunk is not None:
            return self._take_chunk(*self._chunk)
        return self._take_line()

    def _take_line(self) -> bool:
        end = self._in.find(b"\n")
        if end < 0:
            if len(self._in) > _LONGEST_LINE:
                self._hang_up(b"500 5.5.2 line too long")
            return False
        line = bytes(self._in[:end])
        del self._in[: end + 1]
        if not line.endswith(b"\r"):
            self._say(b"500 5.5.2 bare <LF>")
            return True
        line = line[:-1]
        if self._dialogue is not None:
            self._continue_login(line)
            return True
        verb = line.partition(b" ")[0].upper()
        self._note(b" ".join(line.split()[:2]) if verb == b"AUTH" else line)
        if verb == b"BDAT" and "CHUNKING" in self._offered:
            return self._announce_chunk(line)
        if self._in and self._server.strict and self._must_wait(verb):
            self._hang_up(b"554 5.5.0 improper use of pipelining")
            return False
        handler = _HANDLERS.get(verb)
        if handler is None or (verb == b"EHLO" and not self._server.esmtp):
            self._say(b"500 5.5.2 command not known")
        else:
            self._perform(verb.decode(), line, lambda: handler(self, line))
        return True

    def _must_wait(self, verb: bytes) -> bool:
        return verb in _LAST_IN_GROUP or "PIPELINING" not in self._offered

    def _take_data(self) -> bool:
        found = self._in
        if not self._searched:
            self._searched = 1
            if self._perform("CONTENT", b"", lambda: None):
                return True
        if found.startswith(b".\r\n"):
            end = -2
        else:
            end = found.find(b"\r\n.\r\n", max(self._searched - 4, 0))
            if end < 0:
                self._searched = len(found)
                return False
        content = bytes(found[: end + 2])
        del self._in[: end + 5]
        self._data = False
        self._note(b".")
        if content.startswith(b"."):
            content = content[1:]
        if b"\r\n." in content:
            content = content.replace(b"\r\n.", b"\r\n")
        self._finish(content)
        return True

    def _announce_chunk(self, line: bytes) -> bool:
        match = _BDAT.match(line)
        if match is None:  # nobody knows how much of what follows is a chunk
            self._hang_up(b"501 5.5.4 syntax: BDAT size [LAST]")
            return False
        self._chunk = int(match[1]), bool(match[2])
        return self._take_chunk(*self._chunk)

    def _take_chunk(self, size: int, last: bool) -> bool:
        if len(self._in) < size:
            return False
        chunk = bytes(self._in[:size])
        del self._in[:size]
        self._chunk = None
        if self._in and self._server.strict and "PIPELINING" not in self._offered:
            self._hang_up(b"554 5.5.0 improper use of pipelining")
            return False
        mail = self._mail
        if mail is None or not mail.recipients:
            self._mail = None
            self._say(b"503 5.5.1 MAIL and an accepted RCPT come first")
            return True
        mail.chunked = True
        mail.chunks += chunk
        if last:
            self._finish(bytes(mail.chunks))
        else:
            self._perform("BDAT", chunk, lambda: self._say(b"250 2.0.0 chunk taken"))
        return True

    def _finish(self, content: bytes) -> None:
        mail, self._mail = self._mail, None
        if mail is not None:
            taken = mail
            self._perform("BODY", content, lambda: self._take(taken, content))

    def _take(self, mail: _Mail, content: bytes) -> None:
        server = self._server
        if len(content) > server.max_size:
            self._say(b"552 5.3.4 message too big")
            return
        if server.strict:
            ends = content.count(b"\r\n")
            if content.count(b"\n") != ends or content.count(b"\r") != ends:
                self._say(b"550 5.5.2 bare <CR> or <LF> in the message")
                return
            declared = mail.params.get("BODY", "").upper() == "8BITMIME"
            if not (declared or "SMTPUTF8" in mail.params or content.isascii()):
                self._say(b"554 5.6.1 8-bit data without BODY=8BITMIME")
                return
        message_id, private = look_at_header(content)
        self._mails += 1
        server.take(
            ReceivedMail(
                sender=mail.sender,
                recipients=tuple(mail.recipients),
                data=content if server.keep else b"",
                size=len(content),
                message_id=message_id,
                private=private,
                username=self._username,
                tls=self._tls,
                session=self.number,
                at=time.time(),
                params=mail.params,
                recipient_params={to: params for to, params in mail.recipients.items() if params},
            )
        )
        self._perform("TAKEN", content, lambda: self._say(b"250 2.0.0 taken"))

    def _note(self, line: bytes) -> None:
        if self._server.keep:
            text = line.decode("utf-8", "replace")
            self._server.commands.append(Command(self.number, self._group, text))

    # Commands

    def _greet(self) -> None:
        server = self._server
        if server.max_sessions is not None and server.open_sessions > server.max_sessions:
            self._hang_up(b"421 4.7.0 too many sessions")
        else:
            self._say(f"220 {server.hostname} ESMTP".encode())

    def _ehlo(self, line: bytes) -> None:
        if not _CLIENT.match(line):
            self._say(b"501 5.5.4 syntax: EHLO domain")
            return
        server = self._server
        self._mail, self._greeted, self._offered = None, True, server.extensions
        words = [server.hostname]
        if server.security == "starttls" and not self._tls:
            words.append("STARTTLS")
        elif server.users:
            words.append(f"AUTH {' '.join(server.mechanisms)}")
        for word in sorted(server.extensions):
            words.append(f"SIZE {server.max_size}" if word == "SIZE" else word)
        self._out.append(
            b"".join(f"250-{word}\r\n".encode() for word in words[:-1])
            + f"250 {words[-1]}\r\n".encode()
        )

    def _helo(self, line: bytes) -> None:
        if not _CLIENT.match(line):
            self._say(b"501 5.5.4 syntax: HELO domain")
            return
        self._mail, self._greeted, self._offered = None, True, frozenset()
        self._say(f"250 {self._server.hostname}".encode())

    def _starttls(self, line: bytes) -> None:
        if self._server.security != "starttls" or self._tls:
            self._say(b"503 5.5.1 TLS is not offered")
        elif line.upper() != b"STARTTLS":
            self._say(b"501 5.5.4 STARTTLS has no parameter")
        else:
            self._say(b"220 2.0.0 go ahead")
            self._in.clear()  # RFC 3207 section 4.2: what came in clear counts for nothing
            self._mail, self._greeted, self._offered = None, False, frozenset()
            self._perform("TLS", b"", self._start_handshake)

    def _auth(self, line: bytes) -> None:
        server = self._server
        words = line.split()
        mechanism = words[1].decode("ascii", "replace").upper() if len(words) > 1 else ""
        if not self._greeted or self._username is not None or self._mail is not None:
            self._say(b"503 5.5.1 AUTH does not belong here")
        elif server.security == "starttls" and not self._tls:
            self._say(b"538 5.7.11 encryption comes first")
        elif not server.users or mechanism not in server.mechanisms or len(words) > 3:
            self._say(b"504 5.5.4 mechanism not offered")
        else:
            try:
                initial = login.decode(words[2]) if len(words) > 2 else None
            except ValueError:
                self._say(b"501 5.5.2 that is not base64")
                return
            self._dialogue = mechanism, login.exchange(mechanism, server.users, initial)
            self._advance_login(None)

    def _continue_login(self, line: bytes) -> None:
        try:
            if line == b"*":
                raise ValueError("cancelled")
            self._advance_login(login.decode(line))
        except ValueError:
            self._dialogue = None
            self._say(b"501 5.5.2 no login then")

    def _advance_login(self, answer: bytes | None) -> None:
        if self._dialogue is None:
            return
        mechanism, dialogue = self._dialogue
        try:
            challenge = dialogue.send(answer) if answer is not None else next(dialogue)
        except StopIteration as done:
            self._dialogue = None
            username, accepted = done.value
            self._server.logins.append(Login(self.number, mechanism, username, accepted))
            if accepted:
                self._username = username
                self._say(b"235 2.7.0 welcome")
            else:
                self._say(b"535 5.7.8 user name or password is wrong")
        except ValueError:
            self._dialogue = None
            self._say(b"501 5.5.2 no login then")
        else:
            self._out.append(b"334 " + base64.b64encode(challenge) + b"\r\n")

    def _mail_from(self, line: bytes) -> None:
        server = self._server
        if not self._greeted:
            self._say(b"503 5.5.1 EHLO comes first")
        elif server.security == "starttls" and not self._tls:
            self._say(b"530 5.7.0 STARTTLS comes first")
        elif server.users and self._username is None:
            self._say(b"530 5.7.0 AUTH comes first")
        elif self._mail is not None:
            self._say(b"503 5.5.1 nested MAIL")
        elif server.mails_per_session is not None and self._mails >= server.mails_per_session:
            self._hang_up(b"421 4.7.0 enough mails for one session")
        else:
            try:
                path = parse_mail(line, self._offered)
            except SyntaxRefused as refused:
                self._say(str(refused).encode())
                return
            if int(path.params.get("SIZE", 0)) > server.max_size:
                self._say(b"552 5.3.4 message too big")
                return
            self._mail = _Mail(path.address, path.params)
            self._say(b"250 2.1.0 sender ok")

    def _rcpt_to(self, line: bytes) -> None:
        mail = self._mail
        if mail is None or mail.chunked:
            self._say(b"503 5.5.1 MAIL comes first")
            return
        try:
            path = parse_rcpt(line, self._offered, utf8="SMTPUTF8" in mail.params)
        except SyntaxRefused as refused:
            self._say(str(refused).encode())
            return
        mail.recipients[path.address] = path.params
        self._say(b"250 2.1.5 recipient ok")

    def _start_data(self, line: bytes) -> None:
        if line.upper() != b"DATA":
            self._say(b"501 5.5.4 DATA has no parameter")
        elif self._mail is None or self._mail.chunked:
            self._say(b"503 5.5.1 MAIL and RCPT come first, and no BDAT")
        elif not self._mail.recipients:
            self._say(b"554 5.5.1 no valid recipients")
        else:
            self._data, self._searched = True, 0
            self._say(b"354 end with <CR><LF>.<CR><LF>")

    def _rset(self, line: bytes) -> None:
        self._mail = None
        self._say(b"250 2.0.0 ok")

    def _noop(self, line: bytes) -> None:
        self._say(b"250 2.0.0 ok")

    def _vrfy(self, line: bytes) -> None:
        self._say(b"252 2.5.0 send it and see")

    def _quit(self, line: bytes) -> None:
        self._hang_up(b"221 2.0.0 bye")


_HANDLERS: Final[dict[bytes, Callable[[Session, bytes], None]]] = {
    b"EHLO": Session._ehlo,
    b"HELO": Session._helo,
    b"STARTTLS": Session._starttls,
    b"AUTH": Session._auth,
    b"MAIL": Session._mail_from,
    b"RCPT": Session._rcpt_to,
    b"DATA": Session._start_data,
    b"RSET": Session._rset,
    b"NOOP": Session._noop,
    b"VRFY": Session._vrfy,
    b"QUIT": Session._quit,
}
