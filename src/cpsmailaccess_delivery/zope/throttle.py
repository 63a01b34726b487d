"""How often somebody may try something: kept in memory, so for each process of its own."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from ..limits import TokenBucket

#: People that are remembered; the one who was idle longest is forgotten first.
_MOST: Final = 10_000


class Throttle:
    """Lets each who through ``per_minute`` times a minute.  Thread-safe.

    `clock`: seconds, never going back.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, who: str) -> float:
        """Return 0.0: he may; or the seconds until he may."""
        with self._lock:
            now = self._clock()
            bucket = self._buckets.pop(who, None) or TokenBucket(self._per_minute, now)
            self._buckets[who] = bucket
            if len(self._buckets) > _MOST:
                self._buckets.popitem(last=False)
            return bucket.take(now)
