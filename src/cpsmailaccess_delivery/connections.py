"""Who may have a connection: the limit over all accounts, those of relays, and who waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .relays import Relays

if TYPE_CHECKING:
    from .lanes import Lane

#: While lanes wait for a connection: seconds between two looks who could give up one, and
#: seconds of silence after which a session does.
_RELIEF = 1.0
_PATIENCE = 5.0


class Connections:
    """Counts the connections of all lanes.

    `lanes`: all there are.  `most`: connections at most; `per_relay`: and of them to one
    relay.  `put_to_work`: lets a lane work, whatever goes wrong.  `changed`: called when
    there are fewer.
    """

    def __init__(
        self,
        lanes: Mapping[str, Lane],
        *,
        most: int,
        per_relay: Callable[[], int],
        loop: asyncio.AbstractEventLoop,
        put_to_work: Callable[[Lane], None],
        changed: Callable[[], None],
    ) -> None:
        self.count = 0
        self._lanes = lanes
        self._most = most
        self._loop = loop
        self._put_to_work = put_to_work
        self._changed = changed
        self._relays = Relays(per_relay)
        self._waiting: deque[Lane] = deque()
        self._freed: set[str] = set()  # relays that have a connection less
        self.serving = False  # lanes are about to work
        self._relief: asyncio.TimerHandle | None = None

    @property
    def lanes_waiting(self) -> int:
        """How many lanes wait; from any thread."""
        return len(self._waiting) + self._relays.waiting

    def is_waited_for(self, lane: Lane) -> bool:
        """Whether others wait for a connection that this lane has."""
        return bool(self._waiting) or self._relays.is_waited_for(lane)

    def take(self, lane: Lane) -> bool:
        """Return whether the lane may open one session more; if not, it waits its turn."""
        has_one = lane.sessions.here > 0
        if not self._relays.room(lane):
            if not has_one:
                self._relays.wait(lane)
            return False
        if not self.spare(lane):
            return False
        self.count += 1
        self._relays.take(lane)
        return True

    def spare(self, lane: Lane) -> bool:
        """Return whether the lane may have one more, to whichever relay; if not, it waits.

        One that has a session waits for none.
        """
        has_one = lane.sessions.here > 0
        if self.count < self._most and not (has_one and self._crowded):
            return True
        if not has_one:
            if lane not in self._waiting:
                self._waiting.append(lane)
            self._relieve()
        return False

    def give_back(self, lane: Lane, relay: str) -> None:
        """One session less, to this relay: the lanes that wait longest may open one."""
        self.count -= 1
        self._relays.give_back(lane, relay)
        self._freed.add(relay)
        if lane.ready and lane not in self._waiting:
            self._waiting.append(lane)
        if not self.serving:
            self.serving = True
            self._loop.call_soon(self._serve)
        self._changed()

    def stop(self) -> None:
        """Look no more for connections to free: the lanes are stopping."""
        if self._relief is not None:
            self._relief.cancel()

    @property
    def _crowded(self) -> bool:
        """Whether lanes may have one session only, so that each may have its first."""
        return bool(self._waiting) or 2 * self.count >= self._most

    def _serve(self) -> None:
        self.serving = False
        freed, self._freed = self._freed, set()
        for relay in freed:
            while (lane := self._relays.next_waiting(relay)) is not None:
                self._put_to_work(lane)
        for _ in range(len(self._waiting)):
            if self.count >= self._most:
                break
            self._put_to_work(self._waiting.popleft())
        self._changed()

    def _relieve(self) -> None:
        """Lanes wait: close what is idle, and what has been silent for long."""
        if self._relief is not None:
            return
        now = self._loop.time()
        silences = []
        for lane in self._lanes.values():
            if lane.idle:
                lane.sessions.quit()
            elif lane.sessions.here:
                silence, session = lane.sessions.longest_silence(now)
                silences.append((silence, lane, session))
        silences.sort(key=lambda each: each[0], reverse=True)
        for silence, lane, session in silences[: len(self._waiting)]:
            if session is not None and silence > _PATIENCE:
                lane.sessions.yield_to_others(session, silence)
        self._relief = self._loop.call_later(_RELIEF, self._relieve_again)

    def _relieve_again(self) -> None:
        self._relief = None
        if self._waiting:
            self._relieve()
