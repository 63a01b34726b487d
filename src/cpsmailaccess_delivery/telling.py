"""What the work of the processor tells: to the journal first, then to subscribers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from .attempt import Attempt
from .envelope import Route
from .events import AccountPaused, AccountResumed
from .interfaces import Outcome
from .journal import Event

log = logging.getLogger(__name__)

#: Kinds of events in the journal.
PAUSED: Final = "paused"
RESUMED: Final = "resumed"


def tell_outcomes(
    journal: Any,
    attempt: Attempt,
    outcomes: Mapping[str, Outcome],
    *,
    route: str,
    relay: str,
    number: int,
) -> None:
    """Tell the journal what an attempt has brought, and remember it for subscribers.

    `route`: as text.  `relay`: host and port; "": none was asked.  `number`: of the attempt.
    """
    attempt.news = outcomes
    envelope, entry = attempt.lease.envelope, attempt.lease.entry.id
    message_id, sender, record = envelope.message_id, attempt.sender, journal.record
    if log.isEnabledFor(logging.INFO):
        told = ", ".join(f"{recipient} {outcome}" for recipient, outcome in outcomes.items())
        log.info("%s <%s> by %s: %s", entry, message_id, route, told)
    for recipient, (state, reply, at, _, _) in outcomes.items():
        record(Event(at, state, entry, message_id, route, sender, recipient, number, reply, relay))


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
