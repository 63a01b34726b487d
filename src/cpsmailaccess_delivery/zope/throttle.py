"""How often, and how many at once, may try something: kept in memory, so for each process."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from ..limits import Pace

#: People that are remembered; the one who was idle longest is forgotten first.
_MOST: Final = 10_000


class Throttle:
    """Lets each who through ``per_minute`` times a minute.  Thread-safe.

    `clock`: seconds, never going back.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace = Pace(per_minute)
        self._clock = clock
        self._spent: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, who: str) -> float:
        """Return 0.0: he may; or the seconds until he may."""
        with self._lock:
            now, spent = self._clock(), self._spent.pop(who, 0.0)
            wait = self._pace.wait(spent, now)
            self._spent[who] = spent if wait else self._pace.spend(spent, now)
            if len(self._spent) > _MOST:
                self._spent.popitem(last=False)
            return wait


class Crowded(Exception):
    """As many as may be are in already, or he is."""


class Turnstile:
    """Lets ``most`` people in at a time, and each of them once.  Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def enter(self, who: str) -> Iterator[None]:
        """Be inside for the time of the block.  Raises `Crowded` instead of waiting."""
        with self._lock:
            if who in self._inside or len(self._inside) >= self._most:
                raise Crowded
            self._inside.add(who)
        try:
            yield
        finally:
            with self._lock:
                self._inside.discard(who)
