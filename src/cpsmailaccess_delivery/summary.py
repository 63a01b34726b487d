"""What a processor has done: numbers for people and for metrics."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

from .interfaces import State

#: Upper bounds, in seconds, by which attempts are counted.
TIME_BOUNDS: Final = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)


@dataclass(slots=True)
class Summary:
    """What a processor did: numbers of mails, by the state that they were left in."""

    accepted: int = 0
    deferred: int = 0
    refused: int = 0
    unclear: int = 0
    held: int = 0
    waiting: int = 0  # not tried: not due, leased elsewhere, or their lane is in trouble
    reasons: dict[str, str] = field(default_factory=dict)  # why lanes wait, by route

    def count(self, state: State) -> None:
        """Count a mail that was left in this state."""
        setattr(self, state.value, getattr(self, state.value) + 1)


class Times:
    """How long attempts took: ``counts`` by `TIME_BOUNDS` and over, and the ``total``."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(TIME_BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count an attempt that took so long."""
        self.counts[bisect_left(TIME_BOUNDS, seconds)] += 1
        self.total += seconds
