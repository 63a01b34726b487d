"""Whose a lane is, when several workers of one host share a spool.

Hosts that share an outbox on PostgreSQL take their lanes by `pg.lane_sharing` instead.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Share:
    """What one of several workers on a spool serves: worker ``index`` (from 0) of ``of``.

    Each lane belongs to one worker, so that an account's limits need no talk between them.
    """

    index: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise ValueError(f"worker {self.index} of {self.of}: the first is 0")

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def owns(self, lane: str) -> bool:
        """Whether the lane of this key (`envelope.lane_key`) is ours."""
        return self.of == 1 or zlib.crc32(lane.encode()) % self.of == self.index

    def part(self, limit: int) -> int:
        """Return our part of a limit over all workers; at least 1."""
        return max(1, limit // self.of + (self.index < limit % self.of))


ALONE: Final = Share()
