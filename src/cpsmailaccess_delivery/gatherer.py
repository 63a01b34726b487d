"""Things that a thread of its own handles soon, in batches: events, for the journal or subscribers.

::

    put --> deque --> thread, a moment later --> handle

Who puts is never kept waiting.  The thread begins with the first thing.  A forked child starts
afresh: what its parent has put, its parent handles.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

_gatherers: weakref.WeakSet[Gatherer] = weakref.WeakSet()  # type: ignore[type-arg]


class Gatherer(Generic[T]):
    """Thread-safe.  `name`: of the thread.

    `handle`: called in it with an iterator that takes what there is, and whether it is the last
    time; returns whether it shall be called again in a while though nothing comes.
    `delay`: seconds in which things gather.  `retry`: that while, in seconds.
    `limit`: things that wait at most.  `patience`: seconds that `flush` and `close` wait.
    `forked`: called in a forked child.
    """

    dropped: int  #: Things that were not taken since the handler has last set it to 0.
    _thread: threading.Thread | None

    def __init__(
        self,
        handle: Callable[[Iterator[T], bool], bool],
        *,
        name: str,
        delay: float,
        limit: int,
        patience: float,
        retry: float = 0.0,
        forked: Callable[[], None] = lambda: None,
    ) -> None:
        self._handle = handle
        self._name = name
        self._delay = delay
        self._limit = limit
        self._patience = patience
        self._retry = retry
        self._forked = forked
        self._closed = False
        self._begin()
        _gatherers.add(self)

    def __len__(self) -> int:
        """Return how many things wait."""
        return len(self._pending)

    def _begin(self) -> None:
        self.dropped = 0
        self._pending: deque[T] = deque()
        self._waiting: deque[threading.Event] = deque()
        self._signalled = False  # the thread will look at what is pending
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._thread = None

    def put(self, thing: T) -> bool:
        """Let a thing be handled soon; return whether it will be: over the limit it is not."""
        taken = len(self._pending) < self._limit
        if taken:
            self._pending.append(thing)
        else:
            self.dropped += 1
        return (self._signalled or self._signal()) and taken

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until what was put is handled, as far as that can be done now; return whether it is.

        `timeout`: seconds, else the patience.
        In the handler it does not wait: that would be for itself.
        """
        done = threading.Event()
        with self._lock:
            thread = self._thread
            if thread is None:
                return True
            if thread is threading.current_thread():
                return False
            self._waiting.append(done)
        self._hurry.set()
        self._wake.set()
        return done.wait(self._patience if timeout is None else timeout)

    def close(self, *, wait: bool = True) -> None:
        """Handle what is left, and end.  `wait`: until that is done.  Twice is fine."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            atexit.unregister(self.flush)
            self._hurry.set()
            self._wake.set()
            if wait and thread is not threading.current_thread():
                thread.join(self._patience)

    def _signal(self) -> bool:
        with self._lock:
            if self._closed:
                self._pending.clear()
                return False
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads, or the process ends
                    log.error("%s: events are lost: %s", self._name, error)
                    self._pending.clear()
                    return False
                self._thread = thread
                atexit.register(self.flush)  # not close: a processor may still stop
            self._signalled = True
        self._wake.set()
        return True

    def _run(self) -> None:
        last = again = False
        while not last:
            if not again:
                self._wake.wait()
            self._hurry.wait(self._retry if again else self._delay)
            self._hurry.clear()
            self._wake.clear()
            self._signalled = False  # from here on, who puts wakes us again
            last = self._closed
            waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
            try:
                again = self._handle(self._take(), last)
            except Exception:  # a fault of ours: those that come later are handled
                again = False
                log.exception("%s: a fault; some events are lost", self._name)
            for done in waiting:
                done.set()

    def _take(self) -> Iterator[T]:
        for _ in range(len(self._pending)):
            yield self._pending.popleft()


def _after_fork_in_child() -> None:
    for gatherer in list(_gatherers):
        gatherer._begin()
        gatherer._forked()


os.register_at_fork(after_in_child=_after_fork_in_child)
