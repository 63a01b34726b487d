"""How notices are queued: durable in the spool before what they tell of is recorded.

::

    queue --gathered--> thread: `NoticeWriter.write` --> `then`, in the loop's thread

After a crash between the two, a notice is found by its Message-Id, and not made again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .account import DEFAULT_MAILBOX, Account
from .envelope import Envelope, Route, lane_key
from .errors import SpoolError, VaultError
from .interfaces import Entry

log = logging.getLogger(__name__)

#: Notices of one step of the thread, and how many may wait before no more mail is sent.
_BATCH: Final = 64
_MANY: Final = 256

#: Seconds in which notices gather.
_SOON: Final = 0.02

#: Share of time that may go into looking through a large spool for notices made already.
_PAUSE: Final = 9.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """A notice that is to be queued; ``compose`` runs in the thread."""

    message_id: str
    to: str
    route: Route
    compose: Callable[[], bytes]


class NoticeWriter:
    """Writes notices into the spool; in any thread."""

    def __init__(self, spool: Any, accounts: Any, journal: Any) -> None:
        self._spool = spool
        self._accounts = accounts
        self._journal = journal

    def write(self, notices: Iterable[Wanted]) -> float:
        """Make notices durable and visible; return the seconds that a look around took.

        Raises `SpoolError`.
        """
        wanted = {each.message_id: each for each in notices}
        begin = time.monotonic()
        seen = self._spool.holding(wanted)
        pause = time.monotonic() - begin
        for message_id in self._queued(wanted, seen):
            del wanted[message_id]
        staged: list[Entry] = []
        try:
            for one in wanted.values():
                try:
                    message = one.compose()
                    route = self._route(one.route)
                    envelope = Envelope("", (one.to,), route, one.message_id)
                except Exception:  # one notice must not keep the others
                    log.exception("notice %s cannot be made", one.message_id)
                    continue
                staged.append(self._spool.stage(envelope, message))
            self._spool.prepare(staged, alone=True)  # else a crash here would hold them
        except BaseException:  # an interrupt, too, must leave nothing staged
            self._spool.discard(staged)
            raise
        self._spool.publish(staged)
        return pause

    def works(self, route: Route) -> bool:
        """Tell whether mail leaves that way now: an account, if it needs one, and no trouble."""
        if route.mailbox and self.account_of(route) is None:
            return False
        return self._spool.lane_note(lane_key(route)) is None

    def account_of(self, route: Route) -> Account | None:
        """Return the account of a route; None: it has none, or one that cannot be read."""
        try:
            account: Account | None = self._accounts.peek(route.mailbox) if route.mailbox else None
        except VaultError:
            return None
        return account

    def _queued(self, wanted: Mapping[str, Wanted], seen: set[str]) -> list[str]:
        """Return those that are queued already, or were sent: we died after we had queued them.

        `seen`: in the spool.  Without the journal, one that has left the spool since is sent
        again, as the same.
        """
        self._journal.flush()  # after the look into the spool: nothing is missed between them
        return [
            message_id
            for message_id in wanted
            if message_id in seen or self._journal.last_outcomes(message_id)
        ]

    def _route(self, route: Route) -> Route:
        """Return how a notice leaves: as the mail does, or through the default account."""
        if not self.works(route):
            default = Route(mailbox=DEFAULT_MAILBOX)
            if self.works(default):
                route = default
        account = self.account_of(route)
        if account is None:
            return route
        return Route(mailbox=account.mailbox, host=account.host, port=account.port)


@dataclass(frozen=True, slots=True)
class _Job:
    wanted: tuple[Wanted, ...]
    then: Callable[[SpoolError | None], None]


class NoticeQueue:
    """Lets a writer work in a thread; called in the thread of the loop.

    `thread`: does what waits for the disk.  `changed`: called when notices are done,
    with whether so many were waiting that no mail was sent.
    """

    def __init__(
        self,
        writer: NoticeWriter,
        *,
        loop: asyncio.AbstractEventLoop,
        thread: concurrent.futures.Executor,
        changed: Callable[[bool], None],
    ) -> None:
        self._writer = writer
        self._loop = loop
        self._thread = thread
        self._changed = changed
        self._waiting: deque[_Job] = deque()
        self._batch: list[_Job] = []
        self._running: concurrent.futures.Future[float] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether something is not queued yet."""
        return bool(self._waiting or self._batch)

    @property
    def full(self) -> bool:
        """Whether so many wait that it is better to send nothing."""
        return len(self._waiting) + len(self._batch) >= _MANY

    def queue(self, wanted: Iterable[Wanted], then: Callable[[SpoolError | None], None]) -> None:
        """Queue notices soon; `then` is called with None once they are durable, or an error."""
        self._waiting.append(_Job(tuple(wanted), then))
        if self._running is None and self._timer is None:
            self._timer = self._loop.call_later(_SOON, self._start)

    def flush(self) -> None:
        """Queue what waits, now: the loop is about to end."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running is not None:
            concurrent.futures.wait([self._running])
            self._over(self._running)
        while self._waiting:
            self._take()
            done: concurrent.futures.Future[float] = concurrent.futures.Future()
            self._running = done
            try:
                done.set_result(self._write(self._batch))
            except Exception as error:  # as the thread would hand it over
                done.set_exception(error)
            self._over(done)

    def _take(self) -> None:
        self._batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]

    def _start(self) -> None:
        self._timer = None
        if self._running is not None or not self._waiting:
            return
        self._take()
        self._running = self._thread.submit(self._write, self._batch)
        self._running.add_done_callback(self._tell_loop)

    def _tell_loop(self, done: concurrent.futures.Future[float]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._over, done)
        except RuntimeError:
            pass  # the loop has ended: `flush` sees to it

    def _over(self, done: concurrent.futures.Future[float]) -> None:
        if done is not self._running:
            return  # `flush` was faster
        full = self.full
        batch, self._batch, self._running = self._batch, [], None
        error, pause = done.exception(), 0.0
        if error is None:
            pause = done.result()
        elif not isinstance(error, SpoolError):  # a fault of ours, and the mails must not wait
            log.error("notices cannot be queued", exc_info=error)
            error = None
        for job in batch:
            job.then(error)
        if self._waiting and self._timer is None and not self._loop.is_closed():
            self._timer = self._loop.call_later(max(_SOON, _PAUSE * pause), self._start)
        self._changed(full)

    def _write(self, batch: list[_Job]) -> float:
        return self._writer.write(one for job in batch for one in job.wanted)
