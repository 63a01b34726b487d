"""How much of messages may be in memory at once, over all lanes; and who waits for room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .lanes import Lane

#: Bytes of messages in flight: enough to fill many sessions, little beside what an application
#: takes itself.  Messages under `attempt.LARGE` count once and are there twice.
MOST: Final = 64 * 1024 * 1024

#: Bytes below which a lane needs not wait: so each may have a mail in flight, whatever its size,
#: and a window of usual ones, whatever a silent relay keeps.
OWN: Final = 128 * 1024


class Room:
    """Counts bytes in flight; ``used`` is kept by the lanes, which call `wait` and `serve`.

    `put_to_work`: lets a lane work, whatever goes wrong.
    """

    def __init__(
        self, *, loop: asyncio.AbstractEventLoop, put_to_work: Callable[[Lane], None]
    ) -> None:
        self.used = 0
        self.waiting: dict[Lane, None] = {}  # the lanes that wait, longest first
        self._loop = loop
        self._put_to_work = put_to_work
        self._serving = False

    def wait(self, lane: Lane) -> None:
        """Let a lane work when there is room."""
        self.waiting[lane] = None

    def serve(self) -> None:
        """There is less in flight: let lanes work that wait for it, soon."""
        if not self._serving:
            self._serving = True
            self._loop.call_soon(self._serve)

    def _serve(self) -> None:
        self._serving = False
        for _ in range(len(self.waiting)):  # who has not enough yet waits again, behind
            if self.used >= MOST:
                return
            lane = next(iter(self.waiting))
            del self.waiting[lane]
            self._put_to_work(lane)
