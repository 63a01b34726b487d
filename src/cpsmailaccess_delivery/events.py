"""What is told through zope.event, after the fact.  See `interfaces.IMailEvent`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from zope.interface import implementer

from .interfaces import (
    IAccountPaused,
    IAccountResumed,
    IMailAccepted,
    IMailDeferred,
    IMailQueued,
    IMailRefused,
    IMailUnclear,
    Outcome,
    State,
)


@dataclass(frozen=True, slots=True)
class MailEvent:
    """See `IMailEvent`."""

    at: float
    id: str
    message_id: str
    mailbox: str
    sender: str
    recipients: Mapping[str, Outcome]


@implementer(IMailQueued)
class MailQueued(MailEvent):
    """See `IMailQueued`."""

    __slots__ = ()


@implementer(IMailAccepted)
class MailAccepted(MailEvent):
    """See `IMailAccepted`."""

    __slots__ = ()


@implementer(IMailDeferred)
class MailDeferred(MailEvent):
    """See `IMailDeferred`."""

    __slots__ = ()


@implementer(IMailRefused)
class MailRefused(MailEvent):
    """See `IMailRefused`."""

    __slots__ = ()


@implementer(IMailUnclear)
class MailUnclear(MailEvent):
    """See `IMailUnclear`."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class AccountEvent:
    """See `IAccountEvent`."""

    at: float
    mailbox: str
    relay: str
    reason: str


@implementer(IAccountPaused)
class AccountPaused(AccountEvent):
    """See `IAccountPaused`."""

    __slots__ = ()


@implementer(IAccountResumed)
class AccountResumed(AccountEvent):
    """See `IAccountResumed`."""

    __slots__ = ()


#: Which event tells of recipients with an outcome.
EVENTS: Final[Mapping[State, type[MailEvent]]] = {
    State.QUEUED: MailQueued,
    State.ACCEPTED: MailAccepted,
    State.DEFERRED: MailDeferred,
    State.REFUSED: MailRefused,
    State.UNCLEAR: MailUnclear,
}
