"""Whose a lane is: one worker's at a time, on whatever host.

::

    a lane with mail that is due, and nobody's --take--> ours --dry for a while--> nobody's
                                                          |--- others wait for their turn --^

So the limits of an account hold over all workers without a word between them, as they do over the
workers of one host (`share.Share`); and no two of them try for the same mail.  A worker that is
silent for a lease loses its lanes to others.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..spool.postgres import PostgresSpool
from ..wording import counted
from .connections import Connection
from .engine import JOBS
from .lanes import LANES

if TYPE_CHECKING:
    from .feed import Feed

log = logging.getLogger(__name__)

#: Lanes that a worker feeds at most.
MOST_LANES: Final = 100

#: Seconds after its last mail in which a lane stays ours: longer than an idle session lasts.
_KEPT: Final = 15.0

#: Seconds that a lane is fed when others wait: as many as may be are fed already.
_TURN: Final = 15.0

#: The lanes that are some worker's, and those with mail that is due, found by skipping through an
#: index, or with mails of the dead.  What is leased ahead is not due: so both, or shares differ.
#: Whose turn is longest ago comes first.
_ACTIVE: Final = f"""
WITH RECURSIVE queued AS (
    (SELECT entrypoint, execute_after FROM {JOBS} WHERE status = 'queued'
     ORDER BY entrypoint, execute_after LIMIT 1)
    UNION ALL
    SELECT next.* FROM queued CROSS JOIN LATERAL (
        SELECT entrypoint, execute_after FROM {JOBS}
        WHERE status = 'queued' AND entrypoint > queued.entrypoint
        ORDER BY entrypoint, execute_after LIMIT 1) next
), active AS (
    SELECT entrypoint AS lane FROM queued WHERE execute_after <= clock_timestamp()
    UNION
    SELECT entrypoint FROM {JOBS} WHERE status = 'picked'
        AND heartbeat < clock_timestamp() - make_interval(secs => %(lease)s)
)
SELECT lane, taken IS NOT NULL, now() FROM (active FULL JOIN (
    SELECT lane, worker AS taken FROM {LANES} WHERE worker IS NOT NULL AND until > clock_timestamp()
) taken USING (lane)) known LEFT JOIN {LANES} USING (lane) ORDER BY until NULLS FIRST"""  # noqa: S608

#: What somebody had and left since we looked is dry.  What one that has died had sent lately nobody
#: knows: all that may be, see `limits.Pace`.
TAKE: Final = f"""
INSERT INTO {LANES} (lane, worker, until)
SELECT lane, %(worker)s, clock_timestamp() + make_interval(secs => %(lease)s)
FROM unnest(%(lanes)s::text[]) each (lane)
ON CONFLICT (lane) DO UPDATE SET worker = excluded.worker, until = excluded.until,
    spent = CASE WHEN lanes.worker IS NULL THEN lanes.spent ELSE 'infinity' END
WHERE coalesce(lanes.until < CASE WHEN lanes.worker IS NULL THEN %(looked)s
    ELSE clock_timestamp() END, true)
RETURNING lane, note IS NOT NULL, spent"""  # noqa: S608

_RENEW: Final = f"""
UPDATE {LANES} SET until = clock_timestamp() + make_interval(secs => %(lease)s)
WHERE worker = %(worker)s AND until > clock_timestamp() RETURNING lane"""  # noqa: S608

_LEAVE: Final = f"""
UPDATE {LANES} SET worker = NULL, until = clock_timestamp(), spent = each.spent
FROM unnest(%(lanes)s::text[], %(spent)s::float8[]) each (lane, spent)
WHERE worker = %(worker)s AND lanes.lane = each.lane"""  # noqa: S608

_LEAVE_ALL: Final = f"UPDATE {LANES} SET worker = NULL, until = clock_timestamp() WHERE worker = %s"  # noqa: S608


class LaneSharing:
    """The lanes of one worker; `feed`: knows of them, for the loop.  Used in one thread."""

    def __init__(self, feed: Feed, spool: PostgresSpool) -> None:
        self._feed = feed
        self._spool = spool
        self._lanes: dict[str, float] = {}  # ours, and when they last had mail (monotonic)
        self._begun: dict[str, float] = {}  # and when they became ours
        self._leaving: set[str] = set()  # of them: too many, or their turn is over
        self._dry: set[str] = set()  # of them: the engine had no more when it was asked last
        self._wanted: deque[str] = deque()  # nobody's, with mail, when we looked
        self._looked: Any = None  # when that was, by the server's clock
        self._share = 1  # our part of all lanes with mail
        self.waiting: set[str] = set()  # of ours: their circuits are open

    @property
    def wants_more(self) -> bool:
        """Whether there are lanes with mail that nobody has."""
        return bool(self._wanted)

    def fed(self) -> list[str]:
        """Return the lanes that get mail."""
        shut = self._leaving | self.waiting | self._dry
        return [lane for lane in self._lanes if lane not in shut]

    def had_mail(self, lanes: Iterable[str], now: float) -> None:
        """Know that some lanes, those of ours, have mail."""
        for lane in lanes:
            if lane in self._lanes:
                self._lanes[lane] = now

    def are_dry(self, lanes: Iterable[str]) -> None:
        """Know that the engine has no more of some lanes, until the next `seek`."""
        self._dry.update(lanes)

    def renew(self, connection: Connection) -> None:
        """Say that we live, and keep what is ours."""
        seconds = self._spool.leases.seconds
        self._spool.workers.sign(connection, self._feed.worker, seconds)
        values = {"worker": self._feed.worker, "lease": seconds}
        kept = {row[0] for row in connection.execute(_RENEW, values)}
        if lost := set(self._lanes) - kept:
            lanes = counted(len(lost), "lane is", "lanes are")
            log.warning("%s ours no more: we were silent for more than %.0f s", lanes, seconds)
            self._forget(lost)
            self._feed.give_back(connection, lost)  # else renewed here, and sent nowhere
        for lane in kept - set(self._lanes):  # taken when the answer was lost
            self._lanes[lane] = self._begun[lane] = time.monotonic()
        self._know_lanes()

    def seek(self, connection: Connection, now: float) -> None:
        """Take lanes up to our share of all; give back others, and those without mail for long.

        At once what is over our share or, when more lanes have mail than we may feed, dry.
        """
        self._dry.clear()
        self._feed.workers = workers = max(1, self._spool.workers.count(connection))
        rows = connection.execute(_ACTIVE, {"lease": self._spool.leases.seconds}).fetchall()
        self._share = max(1, math.ceil(len(rows) / workers))
        wanted = [lane for lane, taken, _ in rows if not taken and lane not in self._lanes]
        if wanted:
            self._looked = rows[0][2]
            # Each worker begins elsewhere: two that seek at once do not want the same.
            size = max(1, self._room()) * workers
            order = {
                lane: (number // size, hash((lane, self._feed.worker.int)))
                for number, lane in enumerate(wanted)
            }
            wanted.sort(key=order.__getitem__)
        self._wanted = deque(wanted)
        held = self._feed.held()
        kept = 0.0 if len(wanted) > self._room() else _KEPT
        self._leave(
            connection,
            [
                lane
                for lane, last in self._lanes.items()
                if not held[lane] and now - last > kept and lane not in self.waiting
            ],
        )
        in_vain = len(wanted) - max(self._most(), 0)
        self._take(connection, now)
        surplus = len(self._lanes) - self._share
        self._leaving = set(list(self._lanes)[:surplus]) if surplus > 0 else set()
        if in_vain > 0:
            self._leaving |= self._whose_turn_is_over(math.ceil(in_vain / workers), now)
        self._know_lanes()
        self._feed.give_back(connection, self._leaving)
        held = self._feed.held()
        self._leave(connection, [lane for lane in self._leaving if not held[lane]])

    def make_room(self, connection: Connection, held: Counter[str], now: float) -> None:
        """Leave what is dry, and take what is wanted.

        An idle session that is left is worth less than mail that waits.
        """
        if self._wanted:
            self._leave(connection, [lane for lane in self._dry | self._leaving if not held[lane]])
            self._take(connection, now)

    def look_at_notes(self, connection: Connection) -> set[str]:
        """See which lanes wait: what is leased of them is given back.  Return who waits no more."""
        query = f"SELECT lane, note FROM {LANES} WHERE note IS NOT NULL AND worker = %s"  # noqa: S608
        now = self._spool.connections.now()
        notes = connection.execute(query, [self._feed.worker]).fetchall()
        self._feed.is_noted(lane for lane, _ in notes)
        before, self.waiting = self.waiting, {lane for lane, note in notes if _until(note) > now}
        if self.waiting - before:
            self._feed.give_back(connection, self.waiting - before)
        return before - self.waiting

    def leave_all(self, connection: Connection) -> None:
        """Let others have what is ours, and what was taken when the answer was lost."""
        self._leave(connection, list(self._lanes))
        connection.execute(_LEAVE_ALL, [self._feed.worker])
        self._spool.workers.leave(connection, self._feed.worker)

    def _most(self) -> int:
        """Return how many lanes more we may feed.

        Those that wait cost nothing, nor do those that leave: they are in nobody's way.
        """
        return MOST_LANES - len(self._lanes.keys() - self.waiting - self._leaving)

    def _room(self) -> int:
        """Return how many lanes more we want."""
        return max(0, min(self._share - len(self._lanes), self._most()))

    def _take(self, connection: Connection, now: float) -> None:
        """Take those that are wanted, as far as there is room."""
        while self._wanted and (room := self._room()):
            lanes = [self._wanted.popleft() for _ in range(min(room, len(self._wanted)))]
            values = {
                "worker": self._feed.worker,
                "lease": self._spool.leases.seconds,
                "looked": self._looked,
                "lanes": sorted(lanes),
            }
            taken = connection.execute(TAKE, values).fetchall()
            for lane, _, spent in taken:
                self._lanes[lane] = self._begun[lane] = now
                if spent is not None:
                    self._feed.paces[lane] = spent
            self._feed.took(lane for lane, is_noted, _ in taken if not is_noted)
            self._know_lanes()

    def _leave(self, connection: Connection, lanes: Sequence[str]) -> None:
        """Let others have some lanes, of which nothing is leased."""
        if lanes:
            spent = [self._feed.paces.get(lane) for lane in lanes]
            values = {"worker": self._feed.worker, "lanes": list(lanes), "spent": spent}
            connection.execute(_LEAVE, values)
            self._forget(lanes)

    def _forget(self, lanes: Collection[str]) -> None:
        for lane in lanes:
            del self._lanes[lane], self._begun[lane]
        self._dry.difference_update(lanes)
        self._leaving.difference_update(lanes)
        self._feed.left(lanes)
        self._know_lanes()

    def _know_lanes(self) -> None:
        self._feed.lanes = frozenset(self._lanes.keys() - self._leaving)

    def _whose_turn_is_over(self, most: int, now: float) -> set[str]:
        """Return lanes that let others be fed, however much mail they have."""
        fed = [lane for lane in self._lanes if lane not in self.waiting]
        return set([lane for lane in fed if now - self._begun[lane] >= _TURN][:most])


def _until(note: str) -> float:
    try:
        return float(json.loads(note)["until"])
    except (ValueError, TypeError, LookupError):
        return 0.0
