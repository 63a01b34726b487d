"""Which entry goes to which lane, and when: the heart of the processor.

It learns of entries from a scan and then from the spool's watch, keeps those that are
not due yet, and hands the others to their lanes.  It runs in one event loop; the
clock and chance are passed in.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .attempt import ACCEPTED, Attempt, Times, expiry_of, nobody_left
from .envelope import Route, lane_key
from .errors import InvalidEnvelope, NoSuchEntry, SpoolError
from .interfaces import Entry, Settlement, State
from .lanes import Lane
from .limits import ALONE, Share
from .notices import Notices
from .outcome import Trouble
from .relays import Relays
from .retry import Schedule
from .telling import tell_settled
from .upkeep import Upkeep

log = logging.getLogger(__name__)

#: Entries taken from a scan before the loop may do something else.
_SCAN_STEP = 5_000

#: Seconds after which an entry that another processor has leased is looked at again.
_BUSY = 1.0

#: Seconds by which the due time of a name may be later than it was meant.
_ROUNDED = 0.01

#: Seconds after which a settlement that could not be written is tried again.
_UNSETTLED = 5.0

#: Removals are made durable after so many, or so many seconds, in a thread beside the loop.
_SYNC_MANY = 64
_SYNC_SOON = 0.05

#: While lanes wait for a connection: seconds between two looks who could give up one, and
#: seconds of silence after which a session does.
_RELIEF = 1.0
_PATIENCE = 5.0

#: Open files that a session may need: itself, and the leases of what is in flight.
_FILES_PER_SESSION = 10

#: So many mails that cannot be recorded stop all sending until the disk takes them.
_MANY_UNSETTLED = 8

#: Seconds between two looks for what processes that died have left.
_SWEEP_EVERY = 60.0

#: Longest sleep, in seconds: after it the wall clock is asked again, which may have jumped.
_LONGEST_SLEEP = 30.0


#: Seconds between two signs of life.
_HEARTBEAT = 5.0


@dataclass(slots=True)
class Summary:
    """What a processor did: numbers of mails, by the state that they were left in."""

    accepted: int = 0
    deferred: int = 0
    refused: int = 0
    unclear: int = 0
    held: int = 0
    waiting: int = 0  # not tried: not due, leased elsewhere, or their lane is in trouble
    reasons: dict[str, str] = field(default_factory=dict)  # why lanes wait, by route

    def count(self, state: State) -> None:
        setattr(self, state.value, getattr(self, state.value) + 1)


class Scheduler:
    """See the module.  All methods are called in the loop's thread."""

    def __init__(
        self,
        spool: Any,
        accounts: Any,
        journal: Any,
        *,
        loop: asyncio.AbstractEventLoop,
        helo_name: str,
        schedule: Schedule,
        max_sessions: int,
        connections_per_relay: int,
        draining: bool,
        announcer: Any,
        share: Share = ALONE,
        witness: Any = None,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.spool = spool
        self.accounts = accounts
        self.journal = journal
        self.announcer = announcer
        self.loop = loop
        self.helo_name = helo_name
        self.schedule = schedule
        self.draining = draining
        self.share = share
        self.now = clock
        self.chance = chance
        self.summary = Summary()
        self.times = Times()
        self.heartbeat = 0.0  # seconds since the epoch
        self._heart: asyncio.TimerHandle | None = None
        self.finished: asyncio.Future[None] = loop.create_future()
        self._lanes: dict[str, Lane] = {}  # by route
        self._by_key: dict[str, Lane] = {}  # by the key in file names
        self._later: list[tuple[float, int, Entry | Lane]] = []
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        files = _open_files()
        self._max_sessions = min(share.part(max_sessions), max(1, files // _FILES_PER_SESSION))
        self._sync_many = max(1, min(_SYNC_MANY, files // 8))
        self._sessions = 0
        self._freed: set[str] = set()  # relays that have a connection less
        self._relays = Relays(share.part(connections_per_relay))
        self._waiting_lanes: deque[Lane] = deque()
        self._serving = False
        self._relief: asyncio.TimerHandle | None = None
        self._unsettled: list[tuple[Attempt, Settlement]] = []
        self._unsynced = 0
        self._sync_timer: asyncio.TimerHandle | None = None
        self._syncing: asyncio.Future[None] | None = None
        self._sync_thread = ThreadPoolExecutor(1, "cpsmail sync")
        self._upkeep = Upkeep(spool, accounts, journal, clock, witness)
        self._sweep_thread = ThreadPoolExecutor(1, "cpsmail sweep")  # a witness may take long
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._sweeping = False
        self.notices = Notices(
            spool,
            accounts,
            journal,
            schedule=schedule,
            reporting_mta=helo_name,
            loop=loop,
            thread=self._sync_thread,
            clock=clock,
            changed=self._notices_done,
        )
        self._deferred: set[str] = set()  # tried when draining, and to be tried again
        self._scan: Iterator[Entry] | None = None
        self._watches: list[Any] = []
        self._stopping = False
        self._checking = False

    # Life

    def start(self) -> None:
        self._beat()
        self._watch(self.spool.watch(), self._spool_changed)
        self._watch(self.accounts.watch(), self._accounts_changed)
        self._sweep()  # beside the loop: what it finds is told by the watch
        self._rescan()

    def stop(self) -> None:
        """Let every lane stop; `finished` is done when their sessions are closed."""
        self._stopping = True
        self._scan = None
        for lane in self._lanes.values():
            lane.stop()
        self.check_quiet()

    def abort(self) -> None:
        """Drop every session and take nothing more; `finished` follows."""
        self._stopping = True
        self._scan = None
        for lane in self._lanes.values():
            lane.abort()
        self.check_quiet()

    def close(self) -> None:
        """Give back what `start` took.  Settlements are tried a last time."""
        for timer in (self._timer, self._heart):
            if timer is not None:
                timer.cancel()
        for watch in self._watches:
            self.loop.remove_reader(watch.fileno())
            watch.close()
        self._watches.clear()
        for timer in (self._sync_timer, self._sweep_timer):
            if timer is not None:
                timer.cancel()
        self._retry_unsettled()
        self.notices.flush()
        self._sync_thread.shutdown()
        self._sweep_thread.shutdown()
        try:
            self.spool.sync()
        except SpoolError as error:
            log.error("%s; a power loss may send mails again", error)
        for attempt, settlement in self._unsettled:
            log.critical("%s is %s, but cannot be recorded", attempt.entry.id, settlement.state)
            attempt.lease.release()

    def check_quiet(self) -> None:
        """Finish once nothing is left to do: when stopping, or when draining."""
        if not self._checking:
            self._checking = True
            self.loop.call_soon(self._check_quiet)

    def _check_quiet(self) -> None:
        self._checking = False
        if self.finished.done() or not self._watches:
            return  # over, or not started
        if not (self._stopping or self.draining):
            return
        if self._sessions or self._scan is not None or self._unsettled_matter():
            return
        if self._serving:
            return  # lanes are about to work; it asks again
        if not all(lane.quiet for lane in self._lanes.values()):
            return
        if not self._stopping and self._read_spool():
            self.check_quiet()  # something came in meanwhile
            return
        self._count_waiting()
        self.finished.set_result(None)

    def _unsettled_matter(self) -> bool:
        if self.notices.busy:
            return True
        return (bool(self._unsettled) or self._sweeping) and not self._stopping

    def _count_waiting(self) -> None:
        waiting: set[str] = set()
        for route, lane in self._lanes.items():
            note = self.spool.lane_note(lane.key) if lane.circuit.is_open else None
            if note is not None:
                self.summary.reasons[route] = note.reason
            waiting.update(entry.id for entry in lane.ready)
        waiting.update(item.id for _, _, item in self._later if isinstance(item, Entry))
        self.summary.waiting = len(waiting - self._deferred)

    def _beat(self) -> None:
        self.heartbeat = self.now()
        self._heart = self.loop.call_later(_HEARTBEAT, self._beat)

    # What may be asked from any thread: copies, each made in one step of the interpreter

    @property
    def lanes(self) -> list[Lane]:
        """The lanes that have had an entry."""
        return list(self._lanes.values())

    @property
    def lanes_waiting(self) -> int:
        """How many lanes wait for a connection."""
        return len(self._waiting_lanes) + self._relays.waiting

    def entries_later(self) -> list[Entry]:
        """Return the entries that wait for their time."""
        return [item for _, _, item in self._later.copy() if isinstance(item, Entry)]

    # Where entries come from

    def offer(self, entry: Entry, dirty: set[Lane]) -> None:
        """Take notice of an entry; its lane is added to `dirty` when it is due."""
        if self._stopping or (entry.lane and not self.share.owns(entry.lane)):
            return
        wait = entry.due - self.now() if entry.due else 0.0
        if entry.state in (State.DEFERRED, State.UNCLEAR) and entry.due:
            if wait > self.schedule.longest_delay + _ROUNDED:
                wait = 0.0  # later than any delay: the clock was ahead when that was written
        elif entry.state is not State.QUEUED:
            return  # held, refused, unclear: for a person
        if wait > 0:  # of a queued one: its sender wants it so, however long it is
            self._at(entry.due, entry)
            return
        lane = self._by_key.get(entry.lane) or self._find_lane(entry)
        if lane is not None:
            lane.push(entry)
            dirty.add(lane)

    def lane(self, route: Route) -> Lane:
        """Return the lane of a route."""
        lane = self._lanes.get(str(route))
        if lane is None:
            lane = self._lanes[str(route)] = Lane(route, self)
            self._by_key.setdefault(lane.key, lane)
        return lane

    def _find_lane(self, entry: Entry) -> Lane | None:
        """Open one entry to learn its route: the first of its lane, or one we did not name."""
        try:
            route = self.spool.load(entry).envelope.route
            return self.lane(route) if entry.lane or self.share.owns(lane_key(route)) else None
        except InvalidEnvelope as error:
            self._set_aside_unreadable(entry, error)
        except NoSuchEntry:
            pass  # delivered or cancelled meanwhile
        except SpoolError:
            log.exception("cannot read %s; trying again later", entry.id)
            self._at(self.now() + _LONGEST_SLEEP, entry)
        return None

    def _set_aside_unreadable(self, entry: Entry, error: InvalidEnvelope) -> None:
        lease = self.spool.claim(entry)  # sets it aside
        if lease is None:
            self.summary.held += 1
            return
        lease.release()  # it can be read by now
        log.warning("%s: %s; trying again later", entry.id, error)
        self._at(self.now() + _LONGEST_SLEEP, entry)

    def _rescan(self) -> None:
        for lane in self._lanes.values():
            lane.ready.clear()
        self._later = [item for item in self._later if not isinstance(item[2], Entry)]
        heapq.heapify(self._later)
        self._scan = self.spool.scan()
        self._scan_step()

    def _scan_step(self) -> None:
        if self._scan is None:
            return
        try:
            step = list(itertools.islice(self._scan, _SCAN_STEP))
        except SpoolError as error:
            self._scan = None
            if self.draining:
                self.finished.set_exception(error)
                return
            log.error("%s; trying again in %.0f s", error, _LONGEST_SLEEP)
            self.loop.call_later(_LONGEST_SLEEP, self._rescan)
            return
        self._offer_all(step)
        if len(step) < _SCAN_STEP:
            self._scan = None
            self.check_quiet()
        else:
            self.loop.call_soon(self._scan_step)

    def _offer_all(self, entries: list[Entry]) -> None:
        dirty: set[Lane] = set()
        for entry in entries:
            try:
                self.offer(entry, dirty)
            except Exception:  # one entry or lane must not stop the others
                log.exception("%s: cannot be offered; trying again later", entry.id)
                self._at(self.now() + _LONGEST_SLEEP, entry)
        for lane in dirty:
            self._guard(lane, lane.work)

    def _watch(self, watch: Any, changed: Callable[[], object]) -> None:
        self._watches.append(watch)
        self.loop.add_reader(watch.fileno(), changed)

    def _spool_changed(self) -> None:
        self._read_spool()

    def _read_spool(self) -> bool:
        entries = self._watches[0].read()
        if entries is None:
            log.info("the spool's watch lost count; scanning again")
            self._rescan()
            return True
        entries = list(entries)
        self._offer_all(entries)
        return bool(entries)

    def _accounts_changed(self) -> None:
        self._watches[1].read()
        for lane in list(self._lanes.values()):
            self._guard(lane, lane.account_changed)

    # Time

    def wake_at(self, when: float, lane: Lane) -> None:
        """Let a lane work at a time (seconds since the epoch)."""
        self._at(when, lane)

    def _at(self, when: float, item: Entry | Lane) -> None:
        heapq.heappush(self._later, (when, next(self._order), item))
        if self._later[0][2] is item:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._later:
            sleep = min(max(self._later[0][0] - self.now(), 0.0), _LONGEST_SLEEP)
            self._timer = self.loop.call_later(sleep, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = self.now()
        due = []
        while self._later and self._later[0][0] <= now:
            due.append(heapq.heappop(self._later)[2])
        try:
            self._offer_all([item for item in due if isinstance(item, Entry)])
            for item in due:
                if isinstance(item, Lane):
                    self._guard(item, item.wake)
        finally:
            self._arm()
            self.check_quiet()

    # What lanes ask for

    def claim(self, entry: Entry, lane: Lane) -> Attempt | None:
        """Lease an entry for a lane, or None: it is gone, leased, or belongs elsewhere."""
        try:
            lease = self.spool.claim(entry)
            if lease is None and not self.spool.leased(entry):
                # Gone; or whoever had it gave it back between our two looks, and may die.
                lease = self.spool.claim(entry)
        except SpoolError:
            log.exception("cannot read %s; trying again later", entry.id)
            self._at(self.now() + _LONGEST_SLEEP, entry)
            return None
        except Exception as error:  # a fault of ours, or no memory for it: nothing spins on it
            log.exception("%s: held after a fault of ours", entry.id)
            self._hold(entry, error)
            return None
        if lease is None:
            if self.spool.leased(entry):
                self._at(self.now() + _BUSY, entry)
            return None
        attempt = Attempt(lease)
        if not attempt.recipients:  # nobody is left who wants it
            self.settle(attempt, nobody_left(attempt))
            return None
        expiry = expiry_of(attempt, self.now())
        if expiry is not None:
            lane.give_up(attempt, expiry)
            return None
        route = lease.envelope.route
        if route is not lane.route and str(route) != str(lane.route):
            lease.release()
            other = self.lane(lease.envelope.route)
            other.push(entry)
            other.work()
            return None
        return attempt

    def settle(self, attempt: Attempt, settlement: Settlement) -> None:
        """Record a settlement; what cannot be written keeps its lease and is tried again."""
        if settlement is ACCEPTED:  # once per mail, nearly
            self.summary.accepted += 1
        elif not 0 < settlement.due <= self.now():  # else it goes on at once
            self.summary.count(settlement.state)
            if self.draining and settlement.due:
                self._deferred.add(attempt.entry.id)
        if settlement.state is State.REFUSED and not attempt.sender:
            log.warning("%s is refused, and nobody can be told: removed", attempt.entry.id)
            why = "refused, and it has no sender who could be told"
            settlement = self._upkeep.leaving(attempt.lease, settlement.outcomes, why)
        self._tell_and_record(attempt, settlement)

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

        self.notices.queue(wanted, told)

    def _record(self, attempt: Attempt, settlement: Settlement) -> None:
        try:
            attempt.lease.settle(settlement)
        except SpoolError as error:
            self._keep(attempt, settlement, error)
            return
        tell_settled(self.announcer, attempt, self.now())
        self._removed_one()

    def _keep(self, attempt: Attempt, settlement: Settlement, error: SpoolError) -> None:
        log.error("cannot record that %s is %s: %s", attempt.entry.id, settlement.state, error)
        if not self._unsettled:
            self.loop.call_later(_UNSETTLED, self._retry_unsettled)
        self._unsettled.append((attempt, settlement))

    def _notices_done(self, were_full: bool) -> None:
        if were_full and not self.disk_full:
            for lane in list(self._lanes.values()):
                self._guard(lane, lane.work)
        self.check_quiet()

    def set_aside(self, attempt: Attempt, error: Exception) -> None:
        """Hold a mail on which we failed ourselves, so that nothing spins on it."""
        log.error("%s: held after a fault of ours", attempt.entry.id, exc_info=error)
        reason = f"a fault in the processor: {type(error).__name__}: {error}"
        attempts = attempt.entry.attempts + 1
        self.settle(attempt, Settlement(State.HELD, attempts=attempts, reason=reason))

    def _hold(self, entry: Entry, error: Exception) -> None:
        try:
            self.spool.hold(entry, f"a fault in the processor: {type(error).__name__}: {error}")
            self.summary.held += 1
        except SpoolError:
            log.exception("%s: cannot be held", entry.id)

    def _removed_one(self) -> None:
        self._unsynced += 1
        if self._unsynced >= self._sync_many:
            self._sync()
        elif self._sync_timer is None:
            self._sync_timer = self.loop.call_later(_SYNC_SOON, self._sync)

    def _sync(self) -> None:
        if self._sync_timer is not None:
            self._sync_timer.cancel()
            self._sync_timer = None
        if self._syncing is None and self._unsynced:
            self._unsynced = 0
            self._syncing = self.loop.run_in_executor(self._sync_thread, self.spool.sync)
            self._syncing.add_done_callback(self._synced)

    def _synced(self, done: asyncio.Future[None]) -> None:
        self._syncing = None
        if not done.cancelled() and (error := done.exception()):
            log.error("%s; a power loss may send mails again", error)
            self._unsynced += 1  # so that it is tried again
        if self._unsynced and self._sync_timer is None:
            self._sync_timer = self.loop.call_later(_SYNC_SOON, self._sync)

    def _sweep(self) -> None:
        self._sweeping = True
        swept = self.loop.run_in_executor(self._sweep_thread, self._upkeep.run)
        swept.add_done_callback(self._swept)

    def _swept(self, done: asyncio.Future[None]) -> None:
        self._sweeping = False
        if not done.cancelled() and (error := done.exception()):
            log.error("cannot sweep; trying again later", exc_info=error)
        if self._watches:  # else closed meanwhile
            self._sweep_timer = self.loop.call_later(_SWEEP_EVERY, self._sweep)
            self.check_quiet()

    def _retry_unsettled(self) -> None:
        unsettled, self._unsettled = self._unsettled, []
        for attempt, settlement in unsettled:
            self._tell_and_record(attempt, settlement)
        if unsettled and not self.disk_full:
            for lane in list(self._lanes.values()):
                self._guard(lane, lane.work)
        self.check_quiet()

    @property
    def disk_full(self) -> bool:
        """Whether so much cannot be recorded that it is better to send nothing."""
        return len(self._unsettled) >= _MANY_UNSETTLED or self.notices.full

    def is_waited_for(self, lane: Lane) -> bool:
        """Whether others wait for a connection that this lane has."""
        return bool(self._waiting_lanes) or self._relays.is_waited_for(lane)

    @property
    def _crowded(self) -> bool:
        """Whether lanes may have one session only, so that each may have its first."""
        return bool(self._waiting_lanes) or 2 * self._sessions >= self._max_sessions

    def may_connect(self, lane: Lane) -> bool:
        """Whether one session more is within the limit; if not, the lane waits its turn."""
        if not self._relays.room(lane):
            if not lane.has_sessions:
                self._relays.wait(lane)
            return False
        if self._sessions < self._max_sessions and not (lane.has_sessions and self._crowded):
            self._sessions += 1
            self._relays.take(lane)
            return True
        if lane.has_sessions:
            return False
        if lane not in self._waiting_lanes:
            self._waiting_lanes.append(lane)
        self._relieve()
        return False

    def session_over(self, lane: Lane, relay: str) -> None:
        """One session less, to this relay: the lanes that wait longest may open one."""
        self._sessions -= 1
        self._relays.give_back(lane, relay)
        self._freed.add(relay)
        if lane.ready and lane not in self._waiting_lanes:
            self._waiting_lanes.append(lane)
        if not self._serving:
            self._serving = True
            self.loop.call_soon(self._serve)
        self.check_quiet()

    def _serve(self) -> None:
        self._serving = False
        freed, self._freed = self._freed, set()
        for relay in freed:
            while (lane := self._relays.next_waiting(relay)) is not None:
                self._guard(lane, lane.work)
        for _ in range(len(self._waiting_lanes)):
            if self._sessions >= self._max_sessions:
                break
            lane = self._waiting_lanes.popleft()
            self._guard(lane, lane.work)
        self.check_quiet()

    def _guard(self, lane: Lane, work: Callable[[], object]) -> None:
        """Let a lane work.  A fault of ours makes this lane wait, and no other."""
        try:
            work()
        except Exception as error:
            log.exception("%s: waits after a fault of ours", lane.route)
            reason = f"a fault in the processor: {type(error).__name__}: {error}"
            lane.circuit.open(Trouble.RELAY, reason)
            self.wake_at(lane.circuit.until, lane)

    def _relieve(self) -> None:
        """Lanes wait: close what is idle, and what has been silent for long."""
        if self._relief is not None:
            return
        now = self.loop.time()
        silences = []
        for lane in self._lanes.values():
            if lane.idle:
                lane.quit()
            elif lane.has_sessions:
                silence, session = lane.longest_silence(now)
                silences.append((silence, lane, session))
        silences.sort(key=lambda each: each[0], reverse=True)
        for silence, lane, session in silences[: len(self._waiting_lanes)]:
            if session is not None and silence > _PATIENCE:
                lane.yield_to_others(session, silence)
        self._relief = self.loop.call_later(_RELIEF, self._relieve_again)

    def _relieve_again(self) -> None:
        self._relief = None
        if self._waiting_lanes and not self._stopping:
            self._relieve()


def _open_files() -> int:
    """Return how many files we may have open, the application's own aside."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    return soft - min(soft // 2, 256)
