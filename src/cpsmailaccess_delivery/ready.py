"""What a lane may send now: first by priority, then in the order in which it came."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from .interfaces import Entry


class Ready:
    """A deque of entries for each priority, the highest first."""

    __slots__ = ("_by_priority", "_in_order")

    def __init__(self) -> None:
        self._by_priority: dict[int, deque[Entry]] = {}
        self._in_order: list[deque[Entry]] = []

    def __len__(self) -> int:
        return sum(map(len, self._in_order))

    def __bool__(self) -> bool:
        return any(self._in_order)

    def __iter__(self) -> Iterator[Entry]:
        for entries in self._in_order:
            yield from entries

    def copy(self) -> list[Entry]:
        """Return the entries; from any thread: to copy a deque is one step of the interpreter."""
        return [entry for entries in list(self._in_order) for entry in entries.copy()]

    def append(self, entry: Entry) -> None:
        """Add an entry behind those of its priority."""
        self._of(entry.priority).append(entry)

    def appendleft(self, entry: Entry) -> None:
        """Put an entry back before those of its priority."""
        self._of(entry.priority).appendleft(entry)

    def popleft(self) -> Entry:
        """Take the next entry.  Raises IndexError when there is none."""
        for entries in self._in_order:
            if entries:
                return entries.popleft()
        raise IndexError("nothing is ready")

    def clear(self) -> None:
        """Forget all."""
        self._by_priority.clear()
        self._in_order.clear()

    def _of(self, priority: int) -> deque[Entry]:
        entries = self._by_priority.get(priority)
        if entries is None:
            entries = self._by_priority[priority] = deque()
            self._in_order = [self._by_priority[p] for p in sorted(self._by_priority, reverse=True)]
        return entries
