"""What goes into the machine and what comes out of it: mails and events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from ..dsn import Wish
from ..outcome import Phase
from .hello import Capabilities
from .reply import Reply


class Mail(Protocol):
    """What is to be sent: an envelope and the message as it is stored."""

    @property
    def sender(self) -> str:
        """Address, or "": the null reverse-path."""

    @property
    def recipients(self) -> Sequence[str]:
        """Addresses, each once."""

    @property
    def message(self) -> bytes:
        """As stored: line ends of any kind, dots not stuffed."""

    @property
    def wish(self) -> Wish | None:
        """What the relay is asked to tell the sender, if it offers that (RFC 3461)."""


class Result(NamedTuple):
    """What became of one recipient: the arguments of `outcome.classify`.

    A reply that we made up (a refusal that needs no asking) looks like a relay's.
    ``notifies``: the relay has taken the mail's `wish` over with the mail.
    """

    phase: Phase
    reply: Reply | None = None
    error: BaseException | None = None
    notifies: bool = False

    @property
    def text(self) -> str:
        """The relay's words, or what happened instead of a reply."""
        return _text(self.reply, self.error)


class Failure(Result):
    """Why a session ended before its time: the arguments of `outcome.classify`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """Greeted, encrypted and logged in: mails may be sent."""

    capabilities: Capabilities


@dataclass(frozen=True, slots=True)
class StartTls:
    """The transport must shake hands now, then call `Machine.tls_started`."""


class MailDone(NamedTuple):
    """Every recipient of this mail has its result."""

    mail: Mail
    results: Mapping[str, Result]


@dataclass(frozen=True, slots=True)
class MailUnsent:
    """This mail is handed back untried: the relay has not taken it, and it is not to blame."""

    mail: Mail


@dataclass(frozen=True, slots=True)
class Closed:
    """The session is over; always the last event.  The transport writes what is left, closes."""

    failure: Failure | None = None


Event: TypeAlias = Ready | StartTls | MailDone | MailUnsent | Closed


def _text(reply: Reply | None, error: BaseException | None) -> str:
    if reply is not None:
        return str(reply)
    return (str(error) or type(error).__name__) if error is not None else ""
