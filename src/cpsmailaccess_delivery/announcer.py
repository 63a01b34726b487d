"""Hands events to the subscribers of zope.event, one after the other, in a thread of its own.

So a subscriber that is slow, hangs or raises delays no mail and undoes no commit.  Under
zope.component there is always a subscriber, so that what `announce` costs counts.  The thread
(`gatherer`) begins with the first event that somebody subscribes to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Final

import transaction
import zope.event
from transaction.interfaces import NoTransaction

from .envelope import Envelope
from .events import EVENTS, AccountEvent, MailEvent
from .gatherer import Gatherer
from .interfaces import Outcome, State

log = logging.getLogger(__name__)

#: Events that wait for subscribers at most; those over it are dropped, not the mails' delivery.
LIMIT: Final = 20_000

#: Seconds in which events gather, so that the thread is not woken for each.
_GATHER: Final = 0.005

#: Seconds that `flush` and `close` wait for subscribers.
_PATIENCE: Final = 5.0

_UNKNOWN: Final = Outcome(State.QUEUED)

_Event = MailEvent | AccountEvent


class Announcer:
    """See the module.  Thread-safe.  `limit`: events that wait at most."""

    def __init__(self, *, limit: int = LIMIT) -> None:
        self._events = Gatherer[_Event](
            self._tell, name="cpsmail-events", delay=_GATHER, limit=limit, patience=_PATIENCE
        )

    def __repr__(self) -> str:
        return f"<Announcer {len(self._events)} waiting>"

    def queued(self, at: float, entry_id: str, envelope: Envelope) -> None:
        """Tell that a mail was committed."""
        if zope.event.subscribers:
            self.outcomes(at, entry_id, envelope, dict.fromkeys(envelope.recipients, _UNKNOWN))

    def outcomes(
        self, at: float, entry_id: str, envelope: Envelope, outcomes: Mapping[str, Outcome]
    ) -> None:
        """Tell what became of recipients of a mail: an event for each state that occurs."""
        if not zope.event.subscribers:
            return
        route = str(envelope.route)
        for state in dict.fromkeys(outcome.state for outcome in outcomes.values()):
            event = EVENTS.get(state)
            if event is not None:
                those = {r: outcome for r, outcome in outcomes.items() if outcome.state is state}
                self.announce(
                    event(at, entry_id, envelope.message_id, route, envelope.sender, those)
                )

    def announce(self, event: _Event) -> None:
        """Tell of an event, soon.  Never raises, never blocks."""
        if zope.event.subscribers:
            self._events.put(event)

    def flush(self, timeout: float = _PATIENCE) -> bool:
        """Wait until what was announced is told; return whether it is.  `timeout`: seconds.

        In a subscriber it does not wait: that would be for itself.
        """
        return self._events.flush(timeout)

    def close(self) -> None:
        """Tell what is left, as far as subscribers let us, and end.  Twice is fine."""
        told = self.flush()
        if not told:
            log.warning("subscribers of zope.event are slow: %d events left", len(self._events))
        self._events.close(wait=told)

    def _tell(self, events: Iterator[_Event], last: bool) -> bool:
        for event in events:
            _tell(event)
        if self._events.dropped:
            dropped, self._events.dropped = self._events.dropped, 0
            log.error(
                "%d events were not told: subscribers of zope.event are slower than the mail;"
                " the journal has them all",
                dropped,
            )
        return False


def _abort() -> None:
    """What a subscriber has not committed must not be committed by the next one.

    To abort a transaction that was never begun costs more than all the rest, so we look first;
    where the look fails, one is aborted.
    """
    if getattr(transaction.manager.manager, "_txn", _UNKNOWN) is None:
        return
    try:
        transaction.abort()
    except NoTransaction:
        pass  # in the explicit mode
    except Exception:
        log.exception("the transaction of a subscriber cannot be aborted")


def _tell(event: _Event) -> None:
    for subscriber in list(zope.event.subscribers):  # a copy: a subscriber may change it
        try:
            subscriber(event)
        except BaseException:  # the next one and the next event must be told, whatever this did
            which = event.id if isinstance(event, MailEvent) else event.mailbox
            log.exception("%s: a subscriber failed on %s", which, type(event).__name__)
        _abort()
