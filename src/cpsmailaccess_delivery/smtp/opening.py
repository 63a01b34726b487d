"""From the first byte to the first mail: greeting, EHLO, STARTTLS, login.  Pure.

::

    GREETING -> HELLO -> READY                       (tls: bytes come encrypted; plain)
                  |  \\-> AUTH -> READY
                  +-> STARTTLS -> TLS -> HELLO ...   (capabilities so far are forgotten)

Any state may go to CLOSED.  What follows READY is in `machine`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Any, Final, TypeAlias

from ..account import Account, Secret
from ..outcome import Phase
from .auth import Login, spoken_forms, usable
from .events import Closed, Event, Failure, Ready, StartTls
from .hello import Capabilities, parse_ehlo
from .prepare import Transaction
from .reply import ProtocolError, Reply, ReplyParser, local_reply, parse_reply


class State(Enum):
    """Where the session is."""

    GREETING = auto()
    HELLO = auto()
    STARTTLS = auto()
    TLS = auto()
    AUTH = auto()
    READY = auto()
    QUIT = auto()
    CLOSED = auto()


#: What is to be done with a reply, the phase it belongs to, and whose it is.
Expectation: TypeAlias = tuple[Callable[[bytes, Any], None], Phase, Transaction | None]

_NO_MECHANISM: Final = (504, 534)  # RFC 4954 section 6: try another one
_MIN_SCRUBBED: Final = 4  # characters: what is shorter stands in every text


class Opening:
    """The first half of `machine.Machine`: everything that happens once in a session."""

    def __init__(self, account: Account, secret: Secret | None, *, helo_name: str) -> None:
        self.account = account
        self.state = State.GREETING
        self.capabilities = Capabilities()
        self.login: str = ""  # mechanism that was used
        self.replies = 0  # that came: a deadline holds until this changes
        self._secret = secret or Secret("")
        self._helo_name = helo_name.encode("ascii", "replace")
        self._encrypted = account.security == "tls"
        self._login: Login | None = None
        self._mechanisms: list[str] = []
        self._scrub: tuple[bytes, ...] = ()
        if account.username is not None:
            self._hide(spoken_forms(account.username, self._secret))
        self._parser = ReplyParser()
        self._expected: deque[Expectation] = deque()
        self._out: deque[bytes | memoryview | Transaction] = deque()
        self._events: list[Event] = []
        self._phase = Phase.GREETING  # of the reply at hand
        self._expected.append((self._on_greeting, Phase.GREETING, None))

    @property
    def awaiting(self) -> Phase | None:
        """Phase of the reply that is awaited: it decides the deadline.  None: none is."""
        if self.state is State.TLS:
            return Phase.TLS
        return self._expected[0][1] if self._expected else None

    def tls_started(self) -> list[Event]:
        """Go on after the handshake, as if nothing had been said (RFC 3207 section 4.2)."""
        self._encrypted = True
        self.capabilities = Capabilities()
        self._hello()
        return self._take_events()

    def _hello(self) -> None:
        self.state = State.HELLO
        self._say(b"EHLO %b\r\n" % self._helo_name, self._on_ehlo, Phase.HELLO)

    def _on_greeting(self, raw: bytes, _: None) -> None:
        if raw.startswith(b"220"):
            self._hello()
        else:
            self._turned_away(raw)

    def _on_ehlo(self, raw: bytes, _: None) -> None:
        if raw.startswith(b"250"):
            self.capabilities = parse_ehlo(raw)
            self._after_hello()
        elif raw.startswith(b"5"):  # RFC 5321 section 3.2: an old relay
            self._say(b"HELO %b\r\n" % self._helo_name, self._on_helo, Phase.HELLO)
        else:
            self._turned_away(raw)

    def _on_helo(self, raw: bytes, _: None) -> None:
        if raw.startswith(b"250"):
            self._after_hello()
        else:
            self._turned_away(raw)

    def _after_hello(self) -> None:
        if self.account.security == "starttls" and not self._encrypted:
            if not self.capabilities.starttls:  # never on in clear: somebody may have cut it out
                reply = local_reply(538, "5.7.11", "the relay does not offer STARTTLS")
                self._close(Failure(Phase.TLS, reply), polite=True)
                return
            self.state = State.STARTTLS
            self._say(b"STARTTLS\r\n", self._on_starttls, Phase.TLS)
        elif self.account.username is None:
            self._become_ready()
        else:
            self._mechanisms = usable(self.capabilities.auth)
            if self._mechanisms:
                self._log_in()
            else:
                offered = " ".join(sorted(self.capabilities.auth)) or "none"
                reply = local_reply(
                    504, "5.7.4", f"the relay offers no login that we know (it offers: {offered})"
                )
                self._close(Failure(Phase.AUTH, reply), polite=True)

    def _on_starttls(self, raw: bytes, _: None) -> None:
        if raw.startswith(b"220"):
            self.state = State.TLS
            self._events.append(StartTls())
        else:
            self._turned_away(raw)

    def _log_in(self) -> None:
        self.state = State.AUTH
        assert self.account.username is not None  # noqa: S101 - for the type checker
        self._login = Login(self._mechanisms.pop(0), self.account.username, self._secret)
        self._say(self._login.command() + b"\r\n", self._on_auth, Phase.AUTH)

    def _on_auth(self, raw: bytes, _: None) -> None:
        login = self._login
        assert login is not None  # noqa: S101 - for the type checker
        if raw.startswith(b"235"):
            self.login = login.mechanism
            self._login = None
            self._become_ready()
        elif raw.startswith(b"334"):
            self._say(login.answer(raw[4:]) + b"\r\n", self._on_auth, Phase.AUTH)
            self._hide(login.said)
        elif int(raw[:3]) in _NO_MECHANISM and self._mechanisms:
            self._log_in()
        else:
            self._turned_away(raw)

    def _hide(self, said: Iterable[bytes]) -> None:
        """Keep in mind what no reply of this relay may carry into a log."""
        words = {word for word in (*self._scrub, *said) if len(word) >= _MIN_SCRUBBED}
        self._scrub = tuple(sorted(words, key=len, reverse=True))  # some begin as others end

    def _gives_away(self, text: str) -> bool:
        """Tell whether a text, which may be cut off, holds something of that."""
        return any(word[:_MIN_SCRUBBED].decode("utf-8", "replace") in text for word in self._scrub)

    def _reply(self, raw: bytes) -> Reply:
        for word in self._scrub:
            if word in raw:
                raw = raw.replace(word, b"***")
        return parse_reply(raw)

    def _become_ready(self) -> None:
        self.state = State.READY
        self._events.append(Ready(self.capabilities))

    def _turned_away(self, raw: bytes) -> None:
        """End a session that did not come to be."""
        if raw[0] not in b"45":
            raise ProtocolError(f"the relay answered {raw[:3].decode()} where it may not")
        self._close(Failure(self._phase, self._reply(raw)), polite=True)

    def _say(self, line: bytes, handler: Callable[[bytes, Any], None], phase: Phase) -> None:
        self._out.append(line)
        self._expected.append((handler, phase, None))

    def _close(self, failure: Failure | None, *, polite: bool = False) -> None:
        """End the session.  Polite: say QUIT, and do not wait for what comes back."""
        self.state = State.CLOSED
        self._expected.clear()
        self._out.clear()
        if polite:
            self._out.append(b"QUIT\r\n")
        self._events.append(Closed(failure))

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events
