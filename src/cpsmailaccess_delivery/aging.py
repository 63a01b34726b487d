"""Mails that age while their lane waits: they expire, are given up, and senders are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .attempt import Attempt, waiting_of
from .interfaces import Entry, State
from .ready import Ready
from .recorder import Recorder
from .shared import Shared

if TYPE_CHECKING:
    from .lanes import Lane

#: Seconds between two looks whether mails that wait for a lane have become old.
_AGE: Final = 60.0

#: How many are looked at, and how many opened, in one step of the loop: other lanes work meanwhile.
_STEP: Final = 5_000
_OPENED: Final = 100

#: Looked at per second at most, on average: of many mails each may expire at a time of its own.
_PACE: Final = 20_000


class Aging:
    """Of one lane, while its circuit is open; called when the lane works.

    A look walks through all that is ready, in steps; each mail is looked at once::

        lane.ready --> old enough? --> settled
                            +--------> young --(all seen, or the lane may send)--> lane.ready

    `claim`: leases an entry, or returns None.  `changed`: called when a step is done.
    """

    def __init__(
        self,
        lane: Lane,
        shared: Shared,
        recorder: Recorder,
        *,
        claim: Callable[[Entry, Lane], Attempt | None],
        changed: Callable[[], None],
    ) -> None:
        self.busy = False  # more mails are looked at soon
        self._lane = lane
        self._shared = shared
        self._recorder = recorder
        self._claim = claim
        self._changed = changed
        self.next = 0.0  # seconds since the epoch: when old mails are looked for again
        self._told: set[str] = set()  # ids of mails whose delay the sender knows
        self._young: Ready | None = None  # seen in the walk that is under way
        self._rested = 0.0  # seconds since the epoch: no walk begins earlier

    @property
    def walking(self) -> bool:
        """Whether a look is under way, and mails are with us that belong to the lane."""
        return self._young is not None

    def entries(self) -> list[Entry]:
        """Return the mails that are with us; from any thread."""
        young = self._young
        return [] if young is None else young.copy()

    def expect(self, entry: Entry) -> None:
        """One more waits that expires."""
        self.next = min(self.next, max(entry.expires, self._rested))

    def begin_again(self) -> None:
        """The lane works: its mails do not wait."""
        self._told.clear()

    def forget(self) -> None:
        """Forget the mails that are with us."""
        self._young = None

    def give_back(self) -> None:
        """Give the lane its mails back, before those that were not looked at."""
        young, self._young = self._young, None
        if young is not None:
            for entry in self._lane.ready:
                young.append(entry)
            self._lane.ready = young

    def look(self) -> None:
        """Give up the mails that have waited too long, and tell the senders of the old ones."""
        lane, schedule, recorder = self._lane, self._shared.schedule, self._recorder
        now = self._shared.now()
        young = self._young
        if young is None:
            if 0 < self.next - now <= _AGE:
                return
            young = self._young = Ready()
            self._rested = now + min(len(lane.ready) / _PACE, _AGE)
            self.next = now + _AGE
        looks = claims = 0
        while lane.ready:
            if looks == _STEP:
                self._look_soon()
                return
            looks += 1
            entry = lane.ready.popleft()
            scheduled = entry.due if entry.state is State.QUEUED else 0.0
            age = now - (max(entry.staged_at, scheduled) or now)
            over = schedule.is_over(lane.circuit.failures, age)
            delayed = 0 < schedule.delay_notice <= age and entry.id not in self._told
            expired = 0 < entry.expires <= now
            if not (over or delayed or expired):
                if entry.expires:
                    self.expect(entry)
                young.append(entry)
                continue
            if claims == _OPENED or recorder.full:
                lane.ready.appendleft(entry)
                self._look_soon()
                return
            claims += 1
            attempt = self._claim(entry, lane)  # None of one that has expired: settled
            if attempt is not None and not self._settle(attempt, now, over=over):
                attempt.lease.release()
                young.append(entry)
        self.give_back()

    def _look_soon(self) -> None:
        if not self.busy and not self._recorder.full:  # else we are called when there is room
            self.busy = True
            self._shared.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self.busy = False
        self._lane.work()
        self._changed()

    def _settle(self, mail: Attempt, now: float, *, over: bool) -> bool:
        """Return whether there was something to settle."""
        self._told.add(mail.lease.entry.id)
        if not over and not self._recorder.notices.delay_is_due(mail):
            return False
        reason = self._lane.circuit.reason() or "its relay or its account is in trouble"
        settlement = waiting_of(mail, reason, now=now, expired=over)
        if over:
            self._lane.give_up(mail, settlement)
        else:
            self._recorder.settle(mail, settlement)
        return True
