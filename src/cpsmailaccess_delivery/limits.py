"""How fast an account may send: what providers publish, and a token bucket.

And whose a lane is, when several workers share a spool.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Final

#: Mails per minute that providers publish for one mailbox, by the end of the host name.
_PUBLISHED: Final = {
    "smtp.office365.com": 30,
    "smtp-mail.outlook.com": 30,
    "mail.protection.outlook.com": 30,
}


def mails_per_minute(host: str, own: int | None) -> int | None:
    """Return the limit of an account: its own, else the one its provider publishes."""
    if own is not None:
        return own
    for suffix, limit in _PUBLISHED.items():
        if host == suffix or host.endswith("." + suffix):
            return limit
    return None


@dataclass(slots=True)
class TokenBucket:
    """Lets ``per_minute`` pass a minute, at most a sixth of them (ten seconds' worth) at once.

    ``at``: seconds on the caller's clock of the last `take`.
    """

    per_minute: int
    at: float
    tokens: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = self.burst

    @property
    def burst(self) -> float:
        return max(1.0, self.per_minute / 6)

    def give_back(self) -> None:
        """Return a token that was not used."""
        self.tokens += 1.0

    def take(self, now: float) -> float:
        """Take one token: return 0.0, or the seconds until there is one."""
        wait = self.wait(now)
        if not wait:
            self.tokens -= 1.0
        return wait

    def wait(self, now: float) -> float:
        """Return the seconds until there is a token."""
        gained = max(0.0, now - self.at) * self.per_minute / 60
        self.tokens = min(self.burst, self.tokens + gained)
        self.at = now
        if self.tokens >= 1.0:
            return 0.0
        return (1.0 - self.tokens) * 60 / self.per_minute


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
