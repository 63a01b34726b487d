"""The journal: what happened to each mail, for people to look up.  Deletable without harm.

::

    record --> writer thread (`gatherer`), every 50 ms --> SQLite (`journal_file`)
        `----> a line in a file (`journal_tail`), until then: what a killed process has recorded

Whatever is wrong with the file, mail is not affected: events wait for a while, then are
dropped with a line in the log.  Nothing is on disk, and no thread runs, before the first
event.  A forked child starts afresh; what its parent recorded, its parent writes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Final, Protocol, TypeVar

from zope.interface import implementer

from .gatherer import Gatherer
from .interfaces import IJournal, Outcome, State
from .journal_file import Event, JournalFile
from .journal_tail import JournalTail, left_behind, taken_over

__all__ = ["MAX_LAG", "Event", "Journal"]

T = TypeVar("T")

log = logging.getLogger(__name__)

#: Seconds after which an event can be read by other processes, when nothing is wrong.
MAX_LAG: Final = 0.1

_DELAY: Final = MAX_LAG / 2  # seconds in which events gather to a batch
_RETRY: Final = 1.0  # seconds between two tries when the file cannot be written
_GIVE_UP: Final = 30.0  # seconds of tries after which events are dropped
_LIMIT: Final = 20_000  # events in memory
_PATIENCE: Final = 10.0  # seconds that `flush` and `close` wait at most
_PRUNE_EVERY: Final = 3600.0  # seconds
_PRUNE_SLICE: Final = 2000  # events: other writers wait meanwhile
_DAY: Final = 86400.0  # seconds

_abandoned: list[EventStore] = []  # of the parent: SQLite forbids to use or close them here


class EventStore(Protocol):
    """Where events are kept.  Raises ``errors``; `write`, `prune` and `close` in one thread."""

    @property
    def errors(self) -> tuple[type[Exception], ...]: ...
    def write(self, events: Sequence[Event], /) -> None: ...
    def prune(self, before: float, most: int, /) -> int: ...
    def close(self) -> None: ...
    def find(self, *, message_id: str | None, address: str | None, limit: int) -> list[Event]: ...
    def count(self, since: float, /) -> dict[str, int]: ...
    def totals(self, since: float, /, *, by: str) -> list[tuple[str, str, int]]: ...
    def series(self, since: float, step: float, /) -> list[tuple[int, str, int]]: ...


@implementer(IJournal)
class Journal:
    """See `IJournal`.  Thread-safe; several processes may write and read one file.

    ``keep_days``: what is older is removed about once an hour.  ``clock``: seconds since
    the epoch.  ``trouble``: why the file could not be written last time, or "".
    ``path``: of the file, or the location of what `store` makes: called again in a forked child.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keep_days: float = 30,
        clock: Callable[[], float] = time.time,
        store: Callable[[], EventStore] | None = None,
    ) -> None:
        self.path = os.path.abspath(path) if store is None else os.fspath(path)
        self._make = store or (lambda: JournalFile(self.path))
        self._has_tail = store is None
        self._keep = keep_days * _DAY
        self._clock = clock
        self._begin()
        self._events = Gatherer[Event](
            self._handle,
            name="cpsmail-journal",
            delay=_DELAY,
            retry=_RETRY,
            limit=_LIMIT,
            patience=_PATIENCE,
            forked=self._forked,
        )

    def __repr__(self) -> str:
        return f"<Journal {self.path}>"

    def record(self, event: Event) -> None:
        """See `IJournal`."""
        with self._lock:  # what the writer takes is in the part of the tail that it forgets
            if self._events.put(event) and self._tail is not None:
                self._tail.append(event)

    def recover(self) -> int:
        """See `IJournal`."""
        if not self._has_tail:
            return 0
        recovered = 0
        for path in left_behind(self.path):
            try:
                with taken_over(path) as events, closing(JournalFile(self.path)) as file:
                    recovered += file.add(events) if events else 0
            except FileNotFoundError:
                continue  # another process was faster, or its own has removed it
            except JournalFile.errors as error:
                log.error("%s: what a killed process has recorded cannot be read: %s", path, error)
        return recovered

    def events(
        self, *, message_id: str | None = None, address: str | None = None, limit: int = 1000
    ) -> list[Event]:
        """See `IJournal`.  ``limit``: only the newest so many.

        ``address``: of sender or recipient, in any case.  A file that cannot be read is
        logged, and as good as empty.
        """
        self.recover()
        return self._read(
            lambda: self._file.find(message_id=message_id, address=address, limit=limit), []
        )

    def last_outcomes(self, message_id: str) -> dict[str, Outcome]:
        """Return what the journal knows last of each recipient of a mail."""
        outcomes: dict[str, Outcome] = {}
        for event in self.events(message_id=message_id, limit=100_000):
            if not event.recipient or event.kind not in _STATES:
                continue
            if event.kind == State.QUEUED and event.recipient in outcomes:
                continue  # written by another process, whose clock or batch was behind
            outcomes[event.recipient] = Outcome(State(event.kind), event.reply, event.at)
        return outcomes

    def totals(self, since: float, *, by: str) -> list[tuple[str, str, int]]:
        """See `IJournal`.  A file that cannot be read is logged, and as good as empty."""
        return self._read(lambda: self._file.totals(since, by=by), [])

    def counts(self, since: float) -> dict[str, int]:
        """Return how many events of each kind there were since a time."""
        return self._read(lambda: self._file.count(since), {})

    def series(self, since: float, step: float) -> list[tuple[int, str, int]]:
        """See `IJournal`.  A file that cannot be read is logged, and as good as empty."""
        return self._read(lambda: self._file.series(since, step), [])

    def flush(self) -> None:
        """See `IJournal`.  Returns, too, when that cannot be done now: see `trouble`."""
        self._events.flush()

    def close(self) -> None:
        """See `IJournal`."""
        self._events.close()

    def _read(self, read: Callable[[], T], nothing: T) -> T:
        """Return what is read, or nothing, of a file that cannot be read; the log says why."""
        self.flush()
        try:
            return read()
        except self._file.errors as error:
            log.error("the journal %s cannot be read: %s", self.path, error)
            return nothing

    def _begin(self) -> None:
        self.trouble = ""
        self._lock = threading.Lock()
        self._tail = JournalTail(self.path) if self._has_tail else None
        # The writer's own
        self._file = self._make()
        self._batch: list[Event] = []
        self._failing_since: float | None = None
        self._prune_at = 0.0

    def _forked(self) -> None:
        _abandoned.append(self._file)
        if self._tail is not None:
            self._tail.leave()
        self._begin()

    def _handle(self, events: Iterator[Event], last: bool) -> bool:
        with self._lock:
            self._batch += events
            if self._tail is not None:
                self._tail.turn()
        if self._batch:
            self._write(last)
        if not self._batch and self._tail is not None:
            self._tail.forget()
        if last:
            self._file.close()
            with self._lock:
                tail, self._tail = self._tail, None
            if tail is not None:
                tail.close()
        return bool(self._batch)

    def _write(self, last: bool) -> None:
        try:
            self._file.write(self._batch)
            self._batch.clear()
            self._prune()
        except self._file.errors as error:
            self._put_off(error, last)
            return
        self._failing_since = None
        self.trouble = ""
        if self._events.dropped:
            log.error(
                "the journal %s lacks %d events: it could not be written, or they were too many"
                " at once; no mail is affected",
                self.path,
                self._events.dropped,
            )
            self._events.dropped = 0

    def _put_off(self, error: Exception, last: bool) -> None:
        now = time.monotonic()
        self._file.close()
        self.trouble = str(error)
        if self._failing_since is None:
            self._failing_since = now
            log.error("the journal %s cannot be written: %s: trying again", self.path, error)
        if last and self._tail is not None:
            self._tail.leave()  # the next process writes it
        if last or now - self._failing_since > _GIVE_UP or len(self._batch) >= _LIMIT:
            self._events.dropped += len(self._batch)
            self._batch.clear()

    def _prune(self) -> None:
        now = self._clock()
        if self._prune_at - _PRUNE_EVERY <= now < self._prune_at:
            return  # before that: the clock was put back
        removed = self._file.prune(now - self._keep, _PRUNE_SLICE)
        self._prune_at = now + (_PRUNE_EVERY if removed < _PRUNE_SLICE else 0)


_STATES: Final = frozenset(State)
