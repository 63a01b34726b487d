"""The thread that delivers what is in the spool."""

from __future__ import annotations

import asyncio
import atexit
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from zope.interface import implementer

from .address import ascii_host
from .announcer import Announcer
from .errors import InvalidAddress
from .interfaces import IQueueProcessor
from .relays import CONNECTIONS_PER_RELAY
from .retry import Schedule
from .scheduler import Scheduler
from .share import ALONE, Share
from .spool import forks
from .summary import Summary

log = logging.getLogger(__name__)

#: Connections that one processor has at most, over all accounts.
MAX_SESSIONS = 200

#: Seconds that connections which were dropped have to settle their mails.
_ABORT_TIMEOUT = 5.0

#: Seconds after which a processor that failed begins again.
_RESTART = 10.0

#: Name look-ups at the same time.
_RESOLVERS = 256

#: Seconds between being told to stop and dropping the connections, when nobody says.
STOP_TIMEOUT = 30.0


@implementer(IQueueProcessor)
class QueueProcessorThread(threading.Thread):
    """Delivers the mails of a spool, through a session of each mail's own account.

    ``start()`` runs it as a thread until ``stop()``.  ``run(forever=False)`` delivers in
    the calling thread what is due, once, and returns a `Summary`.  Several processors,
    threads or processes, on one spool are safe: an entry is sent by whoever has its lease.

    `helo_name`: how it introduces itself to relays (RFC 5321 section 4.1.1.1); the name
    of this host by default.  `max_sessions`: connections at most, over all accounts;
    `connections_per_relay`: and of them to one relay (host and port).
    `share`: of several workers, the lanes that are this one's, and its part of the limits.
    `witness`: an `ITransactionWitness`, asked about what dead processes left in doubt.
    `clock`: seconds since the epoch.  `announcer`: tells what happens through zope.event.
    `feed`: makes the spool for a run that does not end, when that is another one: see `parts`.
    `presence`: an `IPresence`; tells other processes that this one delivers.
    """

    def __init__(
        self,
        spool: Any,
        accounts: Any,
        journal: Any,
        *,
        schedule: Schedule | None = None,
        helo_name: str | None = None,
        max_sessions: int = MAX_SESSIONS,
        connections_per_relay: int = CONNECTIONS_PER_RELAY,
        share: Share = ALONE,
        witness: Any = None,
        clock: Callable[[], float] = time.time,
        announcer: Announcer | None = None,
        feed: Callable[[], Any] | None = None,
        presence: Any = None,
    ) -> None:
        super().__init__(name="cpsmailaccess_delivery.QueueProcessorThread", daemon=True)
        self._spool = spool
        self._feed = feed
        self._accounts = accounts
        self._journal = journal
        self.schedule = schedule or Schedule()
        self._helo_name = helo_name
        self._max_sessions = max_sessions
        self._connections_per_relay = connections_per_relay
        self._share = share
        self._witness = witness
        self._clock = clock
        self._announcer = announcer or Announcer()
        self._presence = presence
        self._stopped = threading.Event()
        self._ended = threading.Event()  # no `run` is under way
        self._ended.set()
        self._runner = 0  # the thread of the last `run`
        self._generation = forks.generation()
        self._lock = threading.RLock()  # a signal may come while `stop` has it, and stop again
        self._scheduler: Scheduler | None = None  # guarded by the lock
        self.summary = Summary()

    def run(self, forever: bool = True) -> Summary:  # type: ignore[override]
        """Deliver until `stop` is called, or once what is due; return what was done.

        Mails that are in the queue when it starts or come in meanwhile are tried once.
        A run for ever that fails begins again; one that drains raises.
        """
        atexit.register(self.stop)  # else what the relay takes meanwhile would be sent again
        self._runner = threading.get_ident()
        self._generation = forks.generation()
        self._ended.clear()
        if not forever:
            self._stopped.clear()  # it may drain again and again
        if self._presence is not None:
            self._presence.delivers()
        try:
            while True:
                try:
                    with asyncio.Runner() as runner:
                        return runner.run(self._deliver(draining=not forever))
                except Exception:
                    if not forever:
                        raise
                    log.critical("the processor failed, and begins again", exc_info=True)
                if self._stopped.wait(_RESTART):
                    return self.summary
        finally:
            if self._presence is not None:
                self._presence.rests()
            self._ended.set()
            atexit.unregister(self.stop)

    def stop(self, timeout: float = STOP_TIMEOUT) -> bool:
        """Stop: finish what is past the end of data, give back the rest.

        `timeout`: seconds after which connections are dropped; a mail whose end of data
        was sent by then and not answered is unclear.  Returns whether it has ended, be it
        the thread or a `run` in another one.  Callable from any thread, and more than once.
        In a forked child there is nothing to stop: the parent's goes on.
        """
        if self._generation != forks.generation():
            return True
        self._stopped.set()
        with self._lock:
            if self._scheduler is not None:
                self._scheduler.loop.call_soon_threadsafe(self._scheduler.stop)
        if self._runner == threading.get_ident():
            return self._ended.is_set()  # a signal handler: it ends when we return
        if not self._ended.wait(timeout):
            self.abort()
            if not self._ended.wait(_ABORT_TIMEOUT):
                return False
        if self.is_alive() and self is not threading.current_thread():
            self.join(_ABORT_TIMEOUT)
        return not self.is_alive()

    @property
    def scheduler(self) -> Scheduler | None:
        """What delivers now, for `metrics`; None while nothing does."""
        return self._scheduler

    def abort(self) -> None:
        """Drop the connections now, see `stop`; also of a `run` in another thread."""
        if self._generation != forks.generation():
            return
        with self._lock:
            if self._scheduler is not None:
                self._scheduler.loop.call_soon_threadsafe(self._scheduler.abort)

    def look(self) -> None:
        """Look now whether a person has ended the wait of a lane; callable from any thread."""
        if self._generation != forks.generation():
            return
        with self._lock:
            scheduler = self._scheduler
            if scheduler is not None:
                scheduler.loop.call_soon_threadsafe(_look, scheduler)

    async def _deliver(self, *, draining: bool) -> Summary:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log_loop_error)
        # Name look-ups block a thread each: a dead resolver must not delay other lanes.
        resolvers = ThreadPoolExecutor(_RESOLVERS, "cpsmail resolver")
        loop.set_default_executor(resolvers)
        if self._helo_name is None:
            self._helo_name = await loop.run_in_executor(None, own_host_name)
        spool, share, part = self._spool, self._share, self._share.part
        totals = None
        max_sessions = self._max_sessions
        if self._feed is not None and not draining:
            # It gives each worker lanes of its own: here as on other hosts.
            spool, share, max_sessions = self._feed(), ALONE, share.part(max_sessions)
            part, totals = spool.part, spool.totals
        scheduler = Scheduler(
            spool,
            self._accounts,
            self._journal,
            loop=loop,
            helo_name=self._helo_name,
            schedule=self.schedule,
            max_sessions=max_sessions,
            connections_per_relay=self._connections_per_relay,
            draining=draining,
            clock=self._clock,
            announcer=self._announcer,
            witness=self._witness,
            share=share,
            part=part,
            totals=totals,
        )
        self.summary = scheduler.summary
        with self._lock:
            if self._stopped.is_set():
                return scheduler.summary
            self._scheduler = scheduler
        try:
            scheduler.start()
            await scheduler.finished
        finally:
            with self._lock:
                self._scheduler = None
            scheduler.abort()  # nothing to do but after an interrupt: gives back the leases
            scheduler.close()
            self._journal.flush()
            self._announcer.flush()
            # The loop waits for its executor when it closes; a hung look-up would hang us.
            resolvers.shutdown(wait=False, cancel_futures=True)
            loop.set_default_executor(ThreadPoolExecutor(1))
        return scheduler.summary


def _look(scheduler: Scheduler) -> None:
    for lane in scheduler.lanes:
        scheduler.loop.call_soon(lane.wake)  # each for itself: a fault of one stops no other


def own_host_name() -> str:
    """Return the name of this host for EHLO, or an address literal when it has none.

    May take as long as a name look-up.
    """
    name = socket.gethostname()
    if "." not in name:
        name = socket.getfqdn()
    try:
        return ascii_host(name) if "." in name else "[127.0.0.1]"
    except InvalidAddress:
        return "[127.0.0.1]"


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    log.error("in the delivery loop: %s", context["message"], exc_info=context.get("exception"))
