"""Leasing entries for lanes, and what is settled without an attempt."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from .agenda import LONGEST_SLEEP, Agenda
from .attempt import Attempt, expiry_of, nobody_left
from .envelope import Route, lane_key
from .errors import InvalidEnvelope, NoSuchEntry, SpoolError
from .interfaces import Entry
from .recorder import Recorder, fault
from .shared import Shared

if TYPE_CHECKING:
    from .lanes import Lane

log = logging.getLogger(__name__)

#: Seconds after which an entry that another processor has leased is looked at again.
_BUSY: Final = 1.0


class Claims:
    """Claims entries; `lane`: returns that of a route."""

    def __init__(
        self,
        shared: Shared,
        agenda: Agenda,
        recorder: Recorder,
        lane: Callable[[Route], Lane],
    ) -> None:
        self._spool = shared.spool
        self._share = shared.share
        self._now = shared.now
        self._agenda = agenda
        self._recorder = recorder
        self._lane = lane

    def claim(self, entry: Entry, lane: Lane) -> Attempt | None:
        """Lease an entry for a lane, or None: it is gone, leased, or belongs elsewhere."""
        try:
            lease = self._spool.claim(entry)
            if lease is None and not self._spool.leased(entry):
                # Gone; or whoever had it gave it back between our two looks, and may die.
                lease = self._spool.claim(entry)
        except SpoolError:
            log.exception("cannot read %s; trying again later", entry.id)
            self._agenda.add(self._now() + LONGEST_SLEEP, entry)
            return None
        except Exception as error:  # a fault of ours, or no memory for it: nothing spins on it
            log.exception("%s: held after a fault of ours", entry.id)
            self._hold(entry, error)
            return None
        if lease is None:
            if self._spool.leased(entry):
                self._agenda.add(self._now() + _BUSY, entry)
            return None
        attempt = self._begin(lease)
        if attempt is None:
            return None
        if not attempt.recipients:  # nobody is left who wants it
            self._recorder.settle(attempt, nobody_left(attempt))
            return None
        envelope = lease.envelope
        if envelope.expires and (expiry := expiry_of(attempt, self._now())) is not None:
            lane.give_up(attempt, expiry)
            return None
        route = envelope.route
        if route is not lane.route and str(route) != lane.name:
            lease.release()
            other = self._lane(route)
            other.push(entry)
            other.work()
            return None
        return attempt

    def _begin(self, lease: Any) -> Attempt | None:
        """Return the attempt, which has the message; None: a large one cannot be read now."""
        try:
            return Attempt(lease)
        except SpoolError:
            log.exception("cannot read %s; trying again later", lease.entry.id)
            lease.leave()  # not given back: who would have it next might spin on it
            self._agenda.add(self._now() + LONGEST_SLEEP, lease.entry)
            return None

    def lane_of(self, entry: Entry) -> Lane | None:
        """Open one entry to learn its route: the first of its lane, or one we did not name.

        None: it is not ours, or cannot be read now.
        """
        try:
            route = self._spool.load(entry).envelope.route
            return self._lane(route) if entry.lane or self._share.owns(lane_key(route)) else None
        except InvalidEnvelope as error:
            self._set_aside_unreadable(entry, error)
        except NoSuchEntry:
            pass  # delivered or cancelled meanwhile
        except SpoolError:
            log.exception("cannot read %s; trying again later", entry.id)
            self._agenda.add(self._now() + LONGEST_SLEEP, entry)
        return None

    def _set_aside_unreadable(self, entry: Entry, error: InvalidEnvelope) -> None:
        lease = self._spool.claim(entry)  # sets it aside
        if lease is None:
            self._recorder.summary.held += 1
            return
        lease.release()  # it can be read by now
        log.warning("%s: %s; trying again later", entry.id, error)
        self._agenda.add(self._now() + LONGEST_SLEEP, entry)

    def _hold(self, entry: Entry, error: Exception) -> None:
        try:
            self._spool.hold(entry, fault(error))
            self._recorder.summary.held += 1
        except SpoolError:
            log.exception("%s: cannot be held", entry.id)
