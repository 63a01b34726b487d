"""Which entry goes to which lane, and when: the heart of the processor.

What arrives (`arrivals`) waits for its time (`agenda`) or goes to its lane (`lanes`), which
asks for leases (`claims`) and connections (`connections`) and has recorded what came of it
(`recorder`).  All of it runs in one event loop; the clock and chance are passed in.
"""

from __future__ import annotations

import asyncio
import logging
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .agenda import LONGEST_SLEEP, Agenda
from .arrivals import Arrivals
from .claims import Claims
from .connections import Connections
from .envelope import Route
from .interfaces import Entry, State
from .lanes import Lane
from .outcome import Trouble
from .recorder import Recorder, fault
from .retry import Schedule
from .room import Room
from .share import ALONE, Share
from .shared import Shared
from .summary import Times
from .upkeep import Upkeep

log = logging.getLogger(__name__)

#: Seconds by which the due time of a name may be later than it was meant.
_ROUNDED = 0.01

#: Open files that a session may need: itself, and the leases of what is in flight.
_FILES_PER_SESSION = 10

#: Seconds between two looks for what processes that died have left.
_SWEEP_EVERY = 60.0

#: Seconds between two signs of life.
_HEARTBEAT = 5.0


class Scheduler:
    """See the module.  Called in the loop's thread, but for what says otherwise.

    `part`: our part of a limit over all processors, which may change; `share`'s by default.
    ``totals``: returns how many mails of each state there are, where no scan tells; or None.
    """

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
        part: Callable[[int], int] | None = None,
        totals: Callable[[], Mapping[State, int]] | None = None,
        witness: Any = None,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.loop = loop
        self.times = Times()
        self.heartbeat = 0.0  # seconds since the epoch
        self.finished: asyncio.Future[None] = loop.create_future()
        self.shared = Shared(
            spool,
            accounts,
            journal,
            announcer,
            loop=loop,
            helo_name=helo_name,
            schedule=schedule,
            draining=draining,
            share=share,
            now=clock,
            chance=chance,
        )
        self._spool = spool
        self._accounts = accounts
        self._now = clock
        self._draining = draining
        self._heart: asyncio.TimerHandle | None = None
        self._lanes: dict[str, Lane] = {}  # by route
        self._by_key: dict[str, Lane] = {}  # by the key in file names
        self._sync_thread = ThreadPoolExecutor(1, "cpsmail sync")
        self._upkeep = Upkeep(spool, accounts, journal, clock, witness)
        self._sweep_thread = ThreadPoolExecutor(1, "cpsmail sweep")  # a witness may take long
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._sweeping = False
        self._watch: Any = None  # of the accounts
        self._stopping = False
        self._checking = False
        part = part or share.part
        self.totals = totals
        files = _open_files()
        self._agenda = Agenda(loop, clock, self._due)
        self._recorder = Recorder(
            self.shared,
            self._upkeep,
            thread=self._sync_thread,
            files=files,
            room=self._work_all,
            changed=self.check_quiet,
        )
        self._arrivals = Arrivals(
            self.shared,
            offer=self._offer_all,
            forget=self._forget,
            changed=self.check_quiet,
            failed=self.finished.set_exception,
        )
        self._connections = Connections(
            self._lanes,
            most=min(share.part(max_sessions), max(1, files // _FILES_PER_SESSION)),
            per_relay=lambda: part(connections_per_relay),
            loop=loop,
            put_to_work=self._put_to_work,
            changed=self.check_quiet,
        )
        self._room = Room(loop=loop, put_to_work=self._put_to_work)
        self._claims = Claims(self.shared, self._agenda, self._recorder, self.lane)
        self.summary = self._recorder.summary

    # Life

    def start(self) -> None:
        """Begin to work; `close` gives back what is taken here.

        Raises RuntimeError: there is no room for a thread.
        """
        # Both threads now: where there is no room for one, nothing is sent that needs it later.
        self._sync_thread.submit(lambda: None)
        self._beat()
        self._watch = watch = self._accounts.watch()
        self.loop.add_reader(watch.fileno(), self._accounts_changed)
        self._sweep()  # beside the loop: what it finds is told by the watch
        self._arrivals.start()

    def stop(self) -> None:
        """Let every lane stop; `finished` is done when their sessions are closed."""
        self._take_nothing_more()
        for lane in self._lanes.values():
            lane.stop()
        self.check_quiet()

    def abort(self) -> None:
        """Drop every session and take nothing more; `finished` follows."""
        self._take_nothing_more()
        for lane in self._lanes.values():
            lane.abort()
        self.check_quiet()

    def close(self) -> None:
        """Give back what `start` took.  Settlements are tried a last time."""
        self._agenda.close()
        for timer in (self._heart, self._sweep_timer):
            if timer is not None:
                timer.cancel()
        if self._watch is not None:
            self.loop.remove_reader(self._watch.fileno())
            self._watch.close()
            self._watch = None
        self._arrivals.close()
        self._recorder.flush()
        self._sync_thread.shutdown()
        self._sweep_thread.shutdown()
        self._recorder.close()

    def check_quiet(self) -> None:
        """Finish once nothing is left to do: when stopping, or when draining."""
        if not self._checking:
            self._checking = True
            self.loop.call_soon(self._check_quiet)

    def _check_quiet(self) -> None:
        self._checking = False
        if self.finished.done() or self._watch is None:
            return  # over, or not started
        if not (self._stopping or self._draining):
            return
        if self._connections.count or self._arrivals.scanning or self._unsettled_matter():
            return
        if self._connections.serving:
            return  # lanes are about to work; it asks again
        if not all(lane.quiet for lane in self._lanes.values()):
            return
        if not self._stopping and self._arrivals.read():
            self.check_quiet()  # something came in meanwhile
            return
        self._count_waiting()
        self.finished.set_result(None)

    def _unsettled_matter(self) -> bool:
        if self._recorder.notice_queue.busy:
            return True
        return (self._recorder.unsettled or self._sweeping) and not self._stopping

    def _count_waiting(self) -> None:
        waiting: set[str] = set()
        for lane in self._lanes.values():
            if lane.circuit.is_open and (reason := lane.circuit.reason()):
                self.summary.reasons[lane.name] = reason
            waiting.update(entry.id for entry in lane.ready)
        waiting.update(entry.id for entry in self._agenda.entries())
        self.summary.waiting = len(waiting - self._recorder.deferred)

    def _take_nothing_more(self) -> None:
        self._stopping = True
        self._arrivals.stop()
        self._connections.stop()

    def _beat(self) -> None:
        self.heartbeat = self._now()
        self._heart = self.loop.call_later(_HEARTBEAT, self._beat)

    def _sweep(self) -> None:
        self._sweeping = True
        swept = self.loop.run_in_executor(self._sweep_thread, self._upkeep.run)
        swept.add_done_callback(self._swept)

    def _swept(self, done: asyncio.Future[bool]) -> None:
        self._sweeping = False
        if not done.cancelled() and (error := done.exception()):
            log.error("cannot sweep; trying again later", exc_info=error)
        elif self._draining and not self._stopping and not done.cancelled() and done.result():
            self._arrivals.look()  # who came for one in the moment of its decision found it leased
        if self._watch is not None:  # else closed meanwhile
            self._sweep_timer = self.loop.call_later(_SWEEP_EVERY, self._sweep)
            self.check_quiet()

    # What may be asked from any thread: copies, each made in one step of the interpreter

    @property
    def lanes(self) -> list[Lane]:
        """The lanes that have had an entry."""
        return list(self._lanes.values())

    @property
    def lanes_waiting(self) -> int:
        """How many lanes wait for a connection."""
        return self._connections.lanes_waiting

    def entries_later(self) -> list[Entry]:
        """Return the entries that wait for their time."""
        return self._agenda.entries()

    # Where entries come from

    def offer(self, entry: Entry, dirty: set[Lane]) -> None:
        """Take notice of an entry; its lane is added to `dirty` when it is due."""
        shared = self.shared
        if self._stopping or (entry.lane and not shared.share.owns(entry.lane)):
            return
        wait = entry.due - self._now() if entry.due else 0.0
        if entry.state in (State.DEFERRED, State.UNCLEAR) and entry.due:
            if wait > shared.schedule.longest_delay + _ROUNDED:
                wait = 0.0  # later than any delay: the clock was ahead when that was written
        elif entry.state is not State.QUEUED:
            return  # held, refused, unclear: for a person
        if wait > 0:  # of a queued one: its sender wants it so, however long it is
            self._agenda.add(entry.due, entry)
            return
        lane = self._by_key.get(entry.lane) or self._claims.lane_of(entry)
        if lane is not None:
            lane.push(entry)
            dirty.add(lane)

    def lane(self, route: Route) -> Lane:
        """Return the lane of a route."""
        name = str(route)
        lane = self._lanes.get(name)
        if lane is None:
            lane = self._lanes[name] = Lane(
                route,
                self.shared,
                self._connections,
                self._recorder,
                self._room,
                times=self.times,
                claim=self._claims.claim,
                wake_at=self._agenda.add,
                changed=self.check_quiet,
            )
            self._by_key.setdefault(lane.key, lane)
        return lane

    def _forget(self) -> None:
        for lane in self._lanes.values():
            lane.forget()
        self._agenda.forget_entries()

    def _offer_all(self, entries: list[Entry]) -> None:
        dirty: set[Lane] = set()
        for entry in entries:
            try:
                self.offer(entry, dirty)
            except Exception:  # one entry or lane must not stop the others
                log.exception("%s: cannot be offered; trying again later", entry.id)
                self._agenda.add(self._now() + LONGEST_SLEEP, entry)
        for lane in dirty:
            self._guard(lane, lane.work)

    def _accounts_changed(self) -> None:
        self._watch.read()
        for lane in list(self._lanes.values()):
            self._guard(lane, lane.account_changed)

    # Letting lanes work

    def _due(self, due: list[Entry | Lane]) -> None:
        try:
            self._offer_all([item for item in due if isinstance(item, Entry)])
            for item in due:
                if isinstance(item, Lane):
                    self._guard(item, item.wake)
        finally:
            self.check_quiet()

    def _work_all(self) -> None:
        for lane in list(self._lanes.values()):
            self._put_to_work(lane)

    def _put_to_work(self, lane: Lane) -> None:
        self._guard(lane, lane.work)

    def _guard(self, lane: Lane, work: Callable[[], object]) -> None:
        """Let a lane work.  A fault of ours makes this lane wait, and no other."""
        try:
            work()
        except Exception as error:
            log.exception("%s: waits after a fault of ours", lane.route)
            lane.circuit.open(Trouble.RELAY, fault(error))
            self._agenda.add(lane.circuit.until, lane)


def _open_files() -> int:
    """Return how many files we may have open, the application's own aside."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    return soft - min(soft // 2, 256)
