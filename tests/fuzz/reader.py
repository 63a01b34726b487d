"""Values out of bytes, so that a fuzzer that knows bytes only makes values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Reader:
    """Reads from the front; an input that is used up gives zeros and empty texts."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.byte() % len(choices)]

    def line(self) -> bytes:
        """Return all before the next NUL."""
        end = self._data.find(b"\0", self._at)
        return self._take(len(self._data) if end < 0 else end, skip=1)

    def text(self) -> str:
        """Return text with everything in it that Python allows: lone surrogates, too."""
        return self.line().decode("utf-8", "surrogateescape")

    def rest(self) -> bytes:
        return self._take(len(self._data))

    def _take(self, end: int, skip: int = 0) -> bytes:
        taken = self._data[self._at : end]
        self._at = max(self._at, end) + skip
        return taken
