"""What has to wait for its time: entries that are not due, lanes that want to be woken."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from .interfaces import Entry

if TYPE_CHECKING:
    from .lanes import Lane

    Item: TypeAlias = Entry | Lane

#: Longest sleep, in seconds: after it the wall clock is asked again, which may have jumped.
LONGEST_SLEEP: Final = 30.0


class Agenda:
    """Tells `due` of what is due, in its order; one timer of the loop for all.

    `now`: seconds since the epoch.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        now: Callable[[], float],
        due: Callable[[list[Item]], None],
    ) -> None:
        self._loop = loop
        self._now = now
        self._due = due
        self._items: list[tuple[float, int, Item]] = []  # a heap
        self._order = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, when: float, item: Item) -> None:
        """Tell of an item at a time (seconds since the epoch)."""
        heapq.heappush(self._items, (when, next(self._order), item))
        if self._items[0][2] is item:
            self._arm()

    def entries(self) -> list[Entry]:
        """Return the entries that wait; from any thread: to copy is one step of the interpreter."""
        return [item for _, _, item in self._items.copy() if isinstance(item, Entry)]

    def forget_entries(self) -> None:
        """Forget the entries, not the lanes."""
        self._items = [item for item in self._items if not isinstance(item[2], Entry)]
        heapq.heapify(self._items)

    def close(self) -> None:
        """Tell of nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._items:
            sleep = min(max(self._items[0][0] - self._now(), 0.0), LONGEST_SLEEP)
            self._timer = self._loop.call_later(sleep, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = self._now()
        due = []
        while self._items and self._items[0][0] <= now:
            due.append(heapq.heappop(self._items)[2])
        try:
            self._due(due)
        finally:
            self._arm()
