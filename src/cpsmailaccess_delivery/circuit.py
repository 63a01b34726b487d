"""Whether a lane may try: its circuit is closed, or open until the next probe.

What opens it is trouble of the relay or of the account, not of a mail.  Why it is open stands
in the spool as a `LaneNote`: people read it, a restart goes on from it, and whoever
removes it asks for a try now.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from .errors import SpoolError
from .interfaces import LaneNote
from .outcome import Trouble
from .retry import Schedule

log = logging.getLogger(__name__)

#: Failures in a row after which an account is paused whose relay does not answer.
_REPEATED: Final = 2

#: ... and after which its owner is told: with the default schedule half an hour.  Many mailboxes
#: may have that relay, and a restart of it is nobody's trouble.
_LASTING: Final = 5


class Circuit:
    """The circuit of one lane.

    `spool`: keeps the note.  `version`: returns the version of the lane's account.
    `now`, `chance`: seconds since the epoch, and a number in [0, 1).  `tell`: called while
    its account is in trouble and the owner has not been told.  `changed`: called with True
    and a reason when the account is paused, with False when it goes on: once for each trouble.
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
        changed: Callable[[bool, str], None],
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
        self._changed = changed
        self.failures = 0  # in a row
        self._paused = False
        self._noted = False  # else nobody has removed the note: it could not be written

    def __repr__(self) -> str:
        return f"<Circuit {'open' if self.is_open else 'closed'} failures={self.failures}>"

    @property
    def is_open(self) -> bool:
        """Whether to wait.  A wait longer than any is left of a clock that has been put back."""
        return 0 < self.until - self._now() <= self._schedule.longest_delay

    def open(self, trouble: Trouble, reason: str) -> None:
        """Wait: a probe has failed.  While open already, it is the same event: nothing."""
        if self.is_open:
            return
        now = self._now()
        self.failures += 1
        self.until = now + self._schedule.delay(self.failures, self._chance())
        log.warning("%s: %s; next try in %.0f s", self._route, reason, self.until - now)
        before = self._read()
        account = trouble in (Trouble.ACCOUNT, Trouble.LOGIN)
        was_paused = self._paused or (before is not None and before.paused)
        self._paused = was_paused or account or self.failures >= _REPEATED
        note = LaneNote(
            route=self._route,
            trouble=str(trouble),
            reason=reason,
            since=before.since if before else now,
            until=self.until,
            failures=self.failures,
            version=self._version(),
            told=before.told if before else False,
            paused=self._paused,
        )
        self._note(note)
        if self._paused and not was_paused:
            self._changed(True, reason)
        if (account or self.failures >= _LASTING) and not note.told:
            self._tell(note)

    def reason(self) -> str:
        """Return why it is open, as it is noted; "": it is not, or that cannot be read now."""
        note = self._read()
        return note.reason if note is not None else ""

    def told(self) -> None:
        """Remember that the owner was told, until the trouble is over."""
        note = self._read()
        if note is not None and not note.told:
            self._note(replace(note, told=True))

    def close(self, why: str = "the relay works") -> None:
        """Go on: the relay works, the account was mended, or a person wants it."""
        if self.failures or self.until:
            # Without a note, another processor of this lane was faster, and has told.
            self._go_on(why, tell=self._paused and self._read() is not None)

    def forget(self) -> None:
        """Know nothing: the lane is another processor's, and so is the note."""
        self.failures, self.until, self._paused, self._noted = 0, 0.0, False, False

    def _go_on(self, why: str, *, tell: bool) -> None:
        self.forget()
        self._note(None)
        if tell:
            self._changed(False, why)

    def look(self, *, begins: bool = False) -> None:
        """Close when a person has removed the note.

        `begins`: nothing of the lane is under way.  What another processor has noted since we had
        the lane is then ours: to wait for, to go on counting from, and to end.
        """
        if not (self.until or begins):
            return
        try:
            note = self._spool.lane_note(self._key)
        except SpoolError as error:  # nobody has removed it, as far as we know
            log.debug("%s: cannot look why it waits: %s", self._route, error)
            return
        if note is None:
            if self.until and self._noted:
                self._go_on("a person asks for a try", tell=self._paused)
            return
        self._noted = True
        if begins and note.until > self.until:
            self._take_over(note)

    def recall(self, *, draining: bool) -> None:
        """Go on waiting where the last processor stopped, but not on a mended account.

        Who drains by hand asks for a try now; only a refused login still waits, so that
        no mailbox is locked out by our retries.
        """
        note = self._read()
        if note is None:
            return
        self._take_over(note)
        if self.until and draining and note.trouble != Trouble.LOGIN:
            self.until = 0.0

    def _take_over(self, note: LaneNote) -> None:
        self.failures, self.until, self._paused = note.failures, note.until, note.paused
        self._noted = True
        if note.version != self._version():
            self.close("the account was changed")

    def _read(self) -> LaneNote | None:
        """Return the note; None: there is none, or it cannot be read now."""
        try:
            note: LaneNote | None = self._spool.lane_note(self._key)
        except SpoolError as error:
            log.warning("%s: cannot look why it waits: %s", self._route, error)
            return None
        return note

    def _note(self, note: LaneNote | None) -> None:
        try:
            self._spool.note_lane(self._key, note)
            self._noted = note is not None
        except SpoolError as error:
            log.warning("%s: cannot keep why it waits: %s", self._route, error)
