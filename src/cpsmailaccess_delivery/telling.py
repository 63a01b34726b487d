"""What the work of the processor tells: to the journal first, then to zope.event."""

from __future__ import annotations

from typing import Any, Final

from .attempt import Attempt
from .envelope import Route
from .events import AccountPaused, AccountResumed
from .journal import Event

#: Kinds of events in the journal.
PAUSED: Final = "paused"
RESUMED: Final = "resumed"


def tell_settled(announcer: Any, attempt: Attempt, now: float) -> None:
    """Tell what an attempt has brought; called when that is recorded in the spool."""
    news = attempt.news
    if news:
        announcer.outcomes(now, attempt.entry.id, attempt.lease.envelope, news)


def tell_circuit(
    journal: Any,
    announcer: Any,
    route: Route,
    *,
    relay: str,
    now: float,
    paused: bool,
    reason: str,
) -> None:
    """Tell that the mails of an account, or of a relay without login, wait, or go on."""
    name = str(route)
    kind = PAUSED if paused else RESUMED
    journal.record(
        Event(at=now, kind=kind, mailbox=name, sender=route.mailbox, reply=reason, relay=relay)
    )
    event = AccountPaused if paused else AccountResumed
    announcer.announce(event(now, name, relay, reason))
