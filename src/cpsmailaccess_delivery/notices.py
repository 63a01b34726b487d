"""Who is told what, and when: notices to senders and to the owners of mailboxes.

::

    settlement --wanted--> nothing: recorded at once
                   |
                   +--queue--> (thread) made durable in the spool --> settlement recorded

A notice is a mail like any other, with the null reverse-path: for such a mail none is ever
made, so there are no loops.  It is durable before what it tells of is recorded; its
Message-Id says what it is about, so that after a crash in between it is found, not made again.

That somebody was told of a delay is remembered by the outcomes of the mail: it is told in the
first attempt after the time, when the attempt before was earlier than that.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from .account import DEFAULT_MAILBOX
from .attempt import Attempt
from .bounce import compose, compose_trouble, notice_id
from .dsn import DELAY, FAILURE, FULL, wants
from .envelope import Envelope, Route, digest, lane_key
from .errors import SpoolError, VaultError
from .interfaces import Entry, LaneNote, Outcome, Settlement, State
from .report import Action, Notice
from .retry import Schedule

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


@dataclass(frozen=True, slots=True)
class _Job:
    wanted: tuple[Wanted, ...]
    then: Callable[[SpoolError | None], None]


class Notices:
    """Makes notices and queues them in a thread; called in the thread of the loop.

    `thread`: does what waits for the disk.  `changed`: called when notices are done,
    with whether so many were waiting that no mail was sent.
    """

    def __init__(
        self,
        spool: Any,
        accounts: Any,
        journal: Any,
        *,
        schedule: Schedule,
        reporting_mta: str,
        loop: asyncio.AbstractEventLoop,
        thread: concurrent.futures.Executor,
        clock: Callable[[], float],
        changed: Callable[[bool], None],
    ) -> None:
        self._spool = spool
        self._accounts = accounts
        self._journal = journal
        self._schedule = schedule
        self._reporting_mta = reporting_mta
        self._loop = loop
        self._thread = thread
        self._now = clock
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

    # What is wanted

    def of(self, attempt: Attempt, settlement: Settlement) -> tuple[Wanted, ...]:
        """Return what the sender is to be told with this settlement: mostly nothing."""
        if not attempt.sender or not (settlement.outcomes or attempt.relayed):
            return ()
        earlier: Mapping[str, Outcome] = attempt.lease.outcomes
        number = attempt.entry.attempts + 1
        found = []
        if attempt.relayed:
            found.append(self._notice(Action.RELAYED, attempt, attempt.relayed, number))
        refused = _those(settlement.outcomes, State.REFUSED)
        refused = {r: o for r, o in refused.items() if earlier.get(r) != o}
        if refused and wants(attempt.lease.envelope.notify, FAILURE):
            found.append(self._notice(Action.FAILED, attempt, refused, number))
        if settlement.due and self.delay_is_due(attempt):
            deferred = _those(settlement.outcomes, State.DEFERRED)
            if deferred:
                found.append(self._notice(Action.DELAYED, attempt, deferred, 0))
        return tuple(found)

    def of_refusals(
        self, attempt: Attempt, refused: Mapping[str, Outcome], occasion: str
    ) -> tuple[Wanted, ...]:
        """Return what tells the sender, if he wants it, of refusals that no attempt has brought.

        `occasion`: a word for the Message-Id, another one for each.
        """
        if not attempt.sender or not wants(attempt.lease.envelope.notify, FAILURE):
            return ()
        return (self._notice(Action.FAILED, attempt, refused, occasion),)

    def delay_is_due(self, attempt: Attempt) -> bool:
        """Tell whether an attempt now is the first one after the time to tell of a delay."""
        after = self._schedule.delay_notice
        since = attempt.since
        if not wants(attempt.lease.envelope.notify, DELAY):
            return False
        if not after or not since or self._now() - since < after:
            return False
        earlier = attempt.lease.outcomes
        last = max((o.at for o in earlier.values() if o.state is State.DEFERRED), default=0.0)
        return last < since + after

    def _notice(
        self, action: Action, attempt: Attempt, recipients: Mapping[str, Outcome], number: int | str
    ) -> Wanted:
        entry, envelope = attempt.entry, attempt.lease.envelope
        message_id = notice_id(action, entry.id, number, attempt.sender)
        now = self._now()
        give_up_at = (attempt.since or now) + self._schedule.give_up
        notice = Notice(
            action,
            to=attempt.sender,
            recipients=recipients,
            message=b"",  # read when it is wanted: many may wait here
            message_id=envelope.message_id,
            queued_at=entry.staged_at,
            now=now,
            give_up_at=min(give_up_at, envelope.expires or give_up_at),
            full=envelope.ret == FULL and action is Action.FAILED,
        )
        work = partial(self._compose, notice, attempt, message_id, envelope.route)
        return Wanted(message_id, attempt.sender, envelope.route, work)

    def _compose(self, notice: Notice, attempt: Attempt, message_id: str, route: Route) -> bytes:
        try:
            notice = replace(notice, message=attempt.read_message())
        except SpoolError as error:  # a notice without the mail's header is better than none
            log.error("%s", error)
        account = self._peek(route.mailbox) if route.mailbox else None
        return compose(
            notice,
            message_id=message_id,
            reporting_mta=self._reporting_mta,
            remote_mta=route.host if account is None else account.host,
        )

    def tell_owner(self, route: Route, note: LaneNote, then: Callable[[], None]) -> None:
        """Tell the owner of a mailbox that it cannot send, if there is another way to him.

        `then`: called when that notice is durable.
        """
        mailbox = route.mailbox
        default = Route(mailbox=DEFAULT_MAILBOX)
        if mailbox in ("", DEFAULT_MAILBOX) or mailbox.startswith("@") or not self._works(default):
            return
        message_id = notice_id("trouble", mailbox, f"{note.since:.3f}", mailbox)
        work = partial(
            compose_trouble,
            mailbox=mailbox,
            reason=note.reason,
            now=self._now(),
            message_id=message_id,
            give_up=self._schedule.give_up,
        )

        def done(error: SpoolError | None) -> None:
            if error is None:
                then()
            else:
                log.error("%s: its owner cannot be told: %s", mailbox, error)

        self.queue((Wanted(message_id, mailbox, default, work),), done)

    # How it is queued

    def queue(self, wanted: Iterable[Wanted], then: Callable[[SpoolError | None], None]) -> None:
        """Queue notices soon; `then` is called with None once they are durable, or an error."""
        self._waiting.append(_Job(tuple(wanted), then))
        if self._running is None and self._timer is None:
            self._timer = self._loop.call_later(_SOON, self._start)

    def queue_now(self, wanted: Iterable[Wanted]) -> None:
        """Queue notices in the calling thread: durable when it returns.  Raises `SpoolError`."""
        self._work([_Job(tuple(wanted), lambda error: None)])

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
                done.set_result(self._work(self._batch))
            except Exception as error:
                done.set_exception(error)
            self._over(done)

    def _take(self) -> None:
        self._batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]

    def _start(self) -> None:
        self._timer = None
        if self._running is not None or not self._waiting:
            return
        self._take()
        self._running = self._thread.submit(self._work, self._batch)
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

    def _work(self, batch: list[_Job]) -> float:
        """Make the notices durable and visible; return the seconds that a look around took."""
        wanted = {w.message_id: w for job in batch for w in job.wanted}
        begin = time.monotonic()
        seen = self._seen(wanted)
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
        except BaseException:
            self._spool.discard(staged)
            raise
        self._spool.publish(staged)
        return pause

    def _seen(self, wanted: Mapping[str, Wanted]) -> set[str]:
        """Return those that are in the spool: ids end with a digest, so that nothing is opened."""
        ends = {digest(message_id): message_id for message_id in wanted}
        return {ends[entry.id[-16:]] for entry in self._spool.scan() if entry.id[-16:] in ends}

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
        if not self._works(route):
            default = Route(mailbox=DEFAULT_MAILBOX)
            if self._works(default):
                route = default
        account = self._peek(route.mailbox) if route.mailbox else None
        if account is None:
            return route
        return Route(mailbox=account.mailbox, host=account.host, port=account.port)

    def _works(self, route: Route) -> bool:
        if route.mailbox and self._peek(route.mailbox) is None:
            return False
        return self._spool.lane_note(lane_key(route)) is None

    def _peek(self, mailbox: str) -> Any:
        try:
            return self._accounts.peek(mailbox)
        except VaultError:
            return None


def _those(outcomes: Mapping[str, Outcome], state: State) -> dict[str, Outcome]:
    return {r: outcome for r, outcome in outcomes.items() if outcome.state is state}
