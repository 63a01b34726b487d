"""Long lists, a page at a time.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

SIZE: Final = 50


@dataclass(frozen=True)
class Page:
    """``items``: of this page; ``start``: the index of the first; ``total``: of all."""

    items: Sequence[Any]
    start: int
    total: int

    @classmethod
    def of(cls, found: Iterable[Any], start: str) -> Page:
        """Return the page that begins at the index `start`, which a browser has sent.

        Past the end it is the last one.  Nothing but one page is kept of what is found.
        """
        index = int(start) if start.isascii() and start.isdecimal() and len(start) < 10 else 0
        index = index // SIZE * SIZE
        items: list[Any] = []
        begin = total = 0
        for each in found:
            if total % SIZE == 0 and total <= index:
                items, begin = [], total
            if total < begin + SIZE:
                items.append(each)
            total += 1
        return cls(items, begin, total)

    @property
    def previous(self) -> int | None:
        """The index at which the page before begins, or None."""
        return self.start - SIZE if self.start else None

    @property
    def next(self) -> int | None:
        """The index at which the page after begins, or None."""
        end = self.start + SIZE
        return end if end < self.total else None

    @property
    def words(self) -> str:
        """Which of how many are shown."""
        return f"{self.start + 1} to {self.start + len(self.items)} of {self.total}"
