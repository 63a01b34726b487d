"""How many connections a relay has, over all accounts; and who waits for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .lanes import Lane

#: Connections to one relay (host and port) at most, over all accounts.
CONNECTIONS_PER_RELAY: Final = 20


class _Relay:
    """The lanes with connections to one relay, and those that wait for one, longest first."""

    __slots__ = ("connections", "holders", "waiting")

    def __init__(self) -> None:
        self.connections = 0
        self.holders: dict[Lane, int] = {}
        self.waiting: dict[Lane, None] = {}


class Relays:
    """Counts connections by relay (``Terms.relay``); `most`: returns how many each may have.

    A lane that has none goes before one that wants another: while any waits, none gets
    a second.
    """

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self._relays: dict[str, _Relay] = {}

    def room(self, lane: Lane) -> bool:
        """Whether the lane may connect to its relay."""
        relay = self._relays.get(lane.terms.relay)
        if relay is None:
            return True
        return relay.connections < self._most() and not (lane.sessions.here and relay.waiting)

    def take(self, lane: Lane) -> None:
        """The lane connects."""
        relay = self._relays.setdefault(lane.terms.relay, _Relay())
        relay.connections += 1
        relay.holders[lane] = relay.holders.get(lane, 0) + 1

    def give_back(self, lane: Lane, name: str) -> None:
        """A session of the lane with this relay, maybe no longer its own, is over."""
        relay = self._relays[name]
        relay.connections -= 1
        relay.holders[lane] -= 1
        if not relay.holders[lane]:
            del relay.holders[lane]
        if not relay.connections and not relay.waiting:
            del self._relays[name]

    def wait(self, lane: Lane) -> None:
        """The lane waits for its relay; one that has sessions to spare gives one up."""
        relay = self._relays[lane.terms.relay]
        if lane in relay.waiting:
            return
        relay.waiting[lane] = None
        holder = max(relay.holders, key=lambda each: (each.idle, each.sessions.working))
        if holder.idle or holder.sessions.working > 1:
            holder.sessions.give_up_one()

    def next_waiting(self, name: str) -> Lane | None:
        """Return, once, who has waited longest for a relay that has room."""
        relay = self._relays.get(name)
        if relay is None or not relay.waiting or relay.connections >= self._most():
            return None
        lane = next(iter(relay.waiting))
        del relay.waiting[lane]
        return lane

    def is_waited_for(self, lane: Lane) -> bool:
        """Whether others wait for a connection to this lane's relay."""
        relay = self._relays.get(lane.terms.relay)
        return relay is not None and bool(relay.waiting)

    @property
    def waiting(self) -> int:
        """How many lanes wait; from any thread."""
        return sum(len(relay.waiting) for relay in list(self._relays.values()))
