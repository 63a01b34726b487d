"""What became of mails is recorded: notices first, then the spool; and safe soon after.

::

    settle --> notices durable, if there are any --> recorded in the spool --> synced, grouped
                       |                                   |
                       +-- cannot be written --> kept <----+   tried again; the lease is held

When much cannot be recorded, nothing more is sent: see `Recorder.full`.

Where to record is a way to a server and back (`ISettlesTogether`), what the relays have taken in
one turn of the loop is recorded together at its end.  Until then no session gets another mail, see
`Recorder.gathering`: what a death of the process sends twice is what was on its way, and not more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final

from .attempt import ALL_ACCEPTED, Attempt
from .envelope import Route
from .errors import SpoolError
from .interfaces import ISettlesTogether, LaneNote, Settlement, State
from .notice_queue import NoticeQueue, NoticeWriter
from .notices import Notices
from .shared import Shared
from .summary import Summary
from .upkeep import Upkeep

log = logging.getLogger(__name__)

#: Seconds after which a settlement that could not be written is tried again.
_UNSETTLED = 5.0

#: So many mails that cannot be recorded stop all sending until the disk takes them.
_MANY_UNSETTLED = 8

#: Removals are made durable after so many, or so many seconds, in a thread beside the loop.
_SYNC_MANY = 64
_SYNC_SOON = 0.05

#: Mails that are recorded together at most.
_MOST_TOGETHER: Final = 200


class Recorder:
    """Records settlements; called in the thread of the loop.

    `thread`: does what waits for the disk.  `files`: how many may be open: those of removed
    mails are until the next sync.  `room`: called when it is `full` no more.  `changed`:
    called when it may have become idle.
    """

    def __init__(
        self,
        shared: Shared,
        upkeep: Upkeep,
        *,
        thread: Executor,
        files: int,
        room: Callable[[], None],
        changed: Callable[[], None],
    ) -> None:
        self.summary = Summary()
        self.deferred: set[str] = set()  # ids tried when draining, and to be tried again
        writer = NoticeWriter(shared.spool, shared.accounts, shared.journal)
        self.notices = Notices(
            writer,
            schedule=shared.schedule,
            reporting_mta=shared.helo_name,
            clock=shared.now,
        )
        self.notice_queue = NoticeQueue(
            writer, loop=shared.loop, thread=thread, changed=self._notices_done
        )
        self._spool = shared.spool
        self._announcer = shared.announcer
        self._loop = shared.loop
        self._now = shared.now
        self._draining = shared.draining
        self._upkeep = upkeep
        self._thread = thread
        self._room = room
        self._changed = changed
        self._unsettled: list[tuple[Attempt, Settlement]] = []
        self._together = ISettlesTogether.providedBy(shared.spool)
        self._accepted: list[Attempt] = []  # to be recorded at the end of this turn of the loop
        self._then: dict[Callable[[], object], None] = {}
        self._sync_many = max(1, min(_SYNC_MANY, files // 8))
        self._unsynced = 0
        self._sync_timer: asyncio.TimerHandle | None = None
        self._syncing: asyncio.Future[None] | None = None
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether so much cannot be recorded that it is better to send nothing."""
        return len(self._unsettled) >= _MANY_UNSETTLED or self.notice_queue.full

    @property
    def unsettled(self) -> bool:
        """Whether something could not be written yet."""
        return bool(self._unsettled or self._accepted)

    @property
    def gathering(self) -> bool:
        """Whether something is about to be recorded; see `after`."""
        return bool(self._accepted)

    def after(self, go_on: Callable[[], object]) -> None:
        """Call this when it is recorded, or kept: once, however often it is said."""
        self._then[go_on] = None

    def settle(self, attempt: Attempt, settlement: Settlement) -> None:
        """Record a settlement; what cannot be written keeps its lease and is tried again."""
        if settlement is ALL_ACCEPTED:  # once per mail, nearly
            self.summary.accepted += 1
            if not attempt.relayed:
                self._record(attempt, settlement)
                return
        elif not 0 < settlement.due <= self._now():  # else it goes on at once
            self.summary.count(settlement.state)
            if self._draining and settlement.due:
                self.deferred.add(attempt.entry.id)
        if settlement.state is State.REFUSED and not attempt.sender:
            log.warning("%s is refused, and nobody can be told: removed", attempt.entry.id)
            why = "refused, and it has no sender who could be told"
            settlement = self._upkeep.leaving(attempt.lease, settlement.outcomes, why)
        self._tell_and_record(attempt, settlement)

    def set_aside(self, attempt: Attempt, error: Exception) -> None:
        """Hold a mail on which we failed ourselves, so that nothing spins on it."""
        log.error("%s: held after a fault of ours", attempt.entry.id, exc_info=error)
        attempts = attempt.entry.attempts + 1
        self.settle(attempt, Settlement(State.HELD, attempts=attempts, reason=fault(error)))

    def flush(self) -> None:
        """Try a last time what could not be written, and wait for notices."""
        if self._sync_timer is not None:
            self._sync_timer.cancel()
        self._retry()
        self.notice_queue.flush()
        self._record_accepted()

    def close(self) -> None:
        """Sync; give back the leases of what cannot be recorded.  When the thread is done."""
        self._closed = True  # what `flush` recorded asks for no thread any more
        try:
            self._spool.sync()
        except SpoolError as error:
            log.error("%s; a power loss may send mails again", error)
        for attempt, settlement in self._unsettled:
            log.critical("%s is %s, but cannot be recorded", attempt.entry.id, settlement.state)
            attempt.lease.release()

    def tell_owner(self, route: Route, note: LaneNote, then: Callable[[], None]) -> None:
        """Tell the owner of a mailbox that it cannot send, if there is another way to him.

        `then`: called when that notice is durable.
        """

        def told(error: SpoolError | None) -> None:
            if error is None:
                then()
            else:
                log.error("%s: its owner cannot be told: %s", route.mailbox, error)

        if wanted := self.notices.of_trouble(route, note):
            self.notice_queue.queue(wanted, told)

    def _tell_and_record(self, attempt: Attempt, settlement: Settlement) -> None:
        """Let the notices that a settlement asks for be durable, then record it."""
        wanted = () if attempt.notified else self.notices.of(attempt, settlement)
        if not wanted:
            self._record(attempt, settlement)
            return

        def told(error: SpoolError | None) -> None:
            if error is None:
                attempt.notified = True
                self._record(attempt, settlement)
            else:
                self._keep(attempt, settlement, error)

        attempt.forget_message()  # many may wait there
        self.notice_queue.queue(wanted, told)

    def _record(self, attempt: Attempt, settlement: Settlement) -> None:
        if self._together and settlement is ALL_ACCEPTED:
            self._accepted.append(attempt)
            if len(self._accepted) == 1:
                self._loop.call_soon(self._record_accepted)
            elif len(self._accepted) == _MOST_TOGETHER:
                self._record_accepted()
            return
        self._record_one(attempt, settlement)

    def _record_one(self, attempt: Attempt, settlement: Settlement) -> None:
        try:
            attempt.lease.settle(settlement)
        except SpoolError as error:
            self._keep(attempt, settlement, error)
            return
        self._is_recorded(attempt)

    def _record_accepted(self) -> None:
        accepted, self._accepted = self._accepted, []
        if not accepted:
            return
        try:
            singly = set(self._spool.settle_accepted([attempt.lease for attempt in accepted]))
        except SpoolError:
            singly = {attempt.lease for attempt in accepted}
        except Exception as error:  # a fault of ours; what the relays took is not sent again
            for attempt in accepted:
                self.set_aside(attempt, error)
            accepted = []
        for attempt in accepted:
            if attempt.lease in singly:
                self._record_one(attempt, ALL_ACCEPTED)
            else:
                self._is_recorded(attempt)
        then, self._then = self._then, {}
        for go_on in then:
            self._loop.call_soon(go_on)
        self._changed()

    def _is_recorded(self, attempt: Attempt) -> None:
        if attempt.news:
            entry, envelope = attempt.lease.entry, attempt.lease.envelope
            self._announcer.outcomes(self._now(), entry.id, envelope, attempt.news)
        self._unsynced += 1
        if self._unsynced >= self._sync_many:
            self._sync()
        elif self._sync_timer is None:
            self._sync_timer = self._loop.call_later(_SYNC_SOON, self._sync)

    # What cannot be written

    def _keep(self, attempt: Attempt, settlement: Settlement, error: SpoolError) -> None:
        log.error("cannot record that %s is %s: %s", attempt.entry.id, settlement.state, error)
        if not self._unsettled:
            self._loop.call_later(_UNSETTLED, self._retry)
        self._unsettled.append((attempt, settlement))

    def _retry(self) -> None:
        unsettled, self._unsettled = self._unsettled, []
        for attempt, settlement in unsettled:
            self._tell_and_record(attempt, settlement)
        if unsettled and not self.full:
            self._room()
        self._changed()

    def _notices_done(self, were_full: bool) -> None:
        if were_full and not self.full:
            self._room()
        self._changed()

    # Safe against a power loss

    def _sync(self) -> None:
        if self._sync_timer is not None:
            self._sync_timer.cancel()
            self._sync_timer = None
        if self._syncing is None and self._unsynced and not self._closed:
            self._unsynced = 0
            self._syncing = self._loop.run_in_executor(self._thread, self._spool.sync)
            self._syncing.add_done_callback(self._synced)

    def _synced(self, done: asyncio.Future[None]) -> None:
        self._syncing = None
        if not done.cancelled() and (error := done.exception()):
            log.error("%s; a power loss may send mails again", error)
            self._unsynced += 1  # so that it is tried again
        if self._unsynced and self._sync_timer is None:
            self._sync_timer = self._loop.call_later(_SYNC_SOON, self._sync)


def fault(error: Exception) -> str:
    """Return why a mail or a lane waits after a fault of ours."""
    return f"a fault in the processor: {type(error).__name__}: {error}"
