"""Whether a lane may try: its circuit is closed, or open until the next probe.

What opens it is trouble of the relay or of the account, not of a mail.  Why it is open stands
in the spool as a `LaneNote`: people read it, a restart goes on from it, and whoever
removes it asks for a try now.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .errors import SpoolError
from .interfaces import LaneNote
from .outcome import Trouble
from .retry import Schedule

log = logging.getLogger(__name__)


class Circuit:
    """The circuit of one lane.

    `spool`: keeps the note.  `version`: returns the version of the lane's account.
    `now`, `chance`: seconds since the epoch, and a number in [0, 1).  `tell`: called while
    its account is in trouble and the owner has not been told.
    """

    def __init__(
        self,
        key: str,
        route: str,
        spool: Any,
        *,
        schedule: Schedule,
        version: Callable[[], str],
        now: Callable[[], float],
        chance: Callable[[], float],
        tell: Callable[[LaneNote], None],
    ) -> None:
        self.until = 0.0  # seconds since the epoch
        self._key = key
        self._route = route
        self._spool = spool
        self._schedule = schedule
        self._version = version
        self._now = now
        self._chance = chance
        self._tell = tell
        self._failures = 0

    def __repr__(self) -> str:
        return f"<Circuit {'open' if self.is_open else 'closed'} failures={self._failures}>"

    @property
    def is_open(self) -> bool:
        """Whether to wait.  A wait longer than any is left of a clock that has been put back."""
        return 0 < self.until - self._now() <= self._schedule.longest_delay

    @property
    def failures(self) -> int:
        """Failures in a row."""
        return self._failures

    @property
    def failed(self) -> bool:
        """Whether the last thing that happened was a failure."""
        return self._failures > 0

    def open(self, trouble: Trouble, reason: str) -> None:
        """Wait: a probe has failed.  While open already, it is the same event: nothing."""
        if self.is_open:
            return
        now = self._now()
        self._failures += 1
        self.until = now + self._schedule.delay(self._failures, self._chance())
        log.warning("%s: %s; next try in %.0f s", self._route, reason, self.until - now)
        before = self._spool.lane_note(self._key)
        note = LaneNote(
            route=self._route,
            trouble=str(trouble),
            reason=reason,
            since=before.since if before else now,
            until=self.until,
            failures=self._failures,
            version=self._version(),
            told=before.told if before else False,
        )
        self._note(note)
        if trouble in (Trouble.ACCOUNT, Trouble.LOGIN) and not note.told:
            self._tell(note)

    def told(self) -> None:
        """Remember that the owner was told, until the trouble is over."""
        note = self._spool.lane_note(self._key)
        if note is not None and not note.told:
            self._note(replace(note, told=True))

    def close(self) -> None:
        """Go on: the relay works, the account was mended, or a person wants it."""
        if self._failures or self.until:
            self._failures, self.until = 0, 0.0
            self._note(None)

    def look(self) -> None:
        """Close when a person has removed the note."""
        if self.until and self._spool.lane_note(self._key) is None:
            self.close()

    def recall(self, *, draining: bool) -> None:
        """Go on waiting where the last processor stopped, but not on a mended account.

        Who drains by hand asks for a try now; only a refused login still waits, so that
        no mailbox is locked out by our retries.
        """
        note = self._spool.lane_note(self._key)
        if note is None:
            return
        self._failures, self.until = note.failures, note.until
        if note.version != self._version():
            self.close()
        elif draining and note.trouble != Trouble.LOGIN:
            self.until = 0.0

    def _note(self, note: LaneNote | None) -> None:
        try:
            self._spool.note_lane(self._key, note)
        except SpoolError as error:
            log.warning("%s: cannot keep why it waits: %s", self._route, error)
