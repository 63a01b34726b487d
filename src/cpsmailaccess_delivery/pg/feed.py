"""What a processor delivers: the next mails of the lanes that are its own, leased ahead.

::

    a lane with mail that is due, and nobody's --take--> ours --dry for a while--> nobody's
        |                                                 |--- others wait for their turn --^
        the engine names its next mails --lease--> told --claim--> delivered
                                                     `-- its lane waits: given back

A lane belongs to one worker at a time, on whatever host.  So the limits of an account hold over
all workers without a word between them, as they do over the workers of one host (`limits.Share`);
and no two of them try for the same mail.  A worker that is silent for a lease loses lanes and
mails to others.  The limits of a relay are shared out among the workers that live.

Everything here happens in one thread, with one connection, beside the loop of the processor.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final

import psycopg
from zope.interface import implementer

from ..errors import SpoolError
from ..interfaces import Entry, ISettlesTogether, IWatch, LaneNote, Record, State
from ..spool.postgres import PostgresSpool
from ..watch import Told
from .connections import Connection, Outage, notes_of, wait_for_any
from .engine import JOBS, MOST_AT_ONCE, SCHEMA
from .functions import TAKEABLE
from .lanes import LANES
from .lease import Lease
from .mails import (
    CHANNEL,
    ENTRY,
    INLINE_AHEAD,
    MAILS,
    VISIBLE,
    entry_of,
    row_of,
)
from .workers import WORKERS

log = logging.getLogger(__name__)

#: Lanes that a worker feeds at most.
MOST_LANES: Final = 100

#: Lanes that one question to the engine names.  It locks a batch of each of them, and takes one of
#: all: few while they have much mail, many while there is little to be found.
_FEW_AT_ONCE: Final = 5
_MANY_AT_ONCE: Final = 20

#: Mails that are leased ahead: of one lane, of one worker.  Of a lane that has none it is always
#: some: the others may be slow.
_LANE_AHEAD: Final = 100
_AHEAD: Final = 1000

#: Seconds before the first look for lanes: of workers that start together each gets its share.
_START: Final = 0.25

#: Seconds between two looks when nothing is told, and when what is leased must be sent first.
_LOOK: Final = 1.0
_SOON: Final = 0.02
_FULL: Final = 0.1

#: Seconds after its last mail in which a lane stays ours: longer than an idle session lasts.
_KEPT: Final = 15.0

#: Seconds that a lane is fed when others wait: as many as may be are fed already.
_TURN: Final = 15.0

#: Seconds between two looks at the mails of lanes that wait, and how many are told in one.
_AGE: Final = 60.0
_AGE_STEP: Final = 1000

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

_CLAIM: Final = f"SELECT * FROM {SCHEMA}.claim(%s, %s::text[], %s, %s, %s, %s)"  # noqa: S608

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

_GIVE_BACK: Final = f"""
WITH mail AS (
    UPDATE {MAILS} SET lease = NULL, leased_until = NULL
    FROM unnest(%(ids)s::text[], %(leases)s::uuid[]) each (id, token)
    WHERE mails.id = each.id AND mails.lease = each.token RETURNING mails.job
)
UPDATE {JOBS} SET status = 'queued', queue_manager_id = NULL, updated = now()
WHERE id IN (SELECT job FROM mail)"""  # noqa: S608


_IN_SPOOL: Final = (State.QUEUED, State.DEFERRED, State.UNCLEAR, State.HELD, State.REFUSED)
_TOTALS: Final = f"""
SELECT state, count(*) FROM {MAILS} WHERE {VISIBLE} AND %s = (
    SELECT id FROM {WORKERS} WHERE until > clock_timestamp() ORDER BY since, id LIMIT 1
) GROUP BY state"""  # noqa: S608


@implementer(ISettlesTogether)
class Feed:
    """The spool of one processor that runs for ever: see `ISpool`, and the module.

    What is not about the next mail is the spool's own.  `read_ahead`: told of mailboxes that will
    send soon.
    """

    def __init__(
        self,
        spool: PostgresSpool,
        read_ahead: Callable[[Collection[str]], None] = lambda mailboxes: None,
    ) -> None:
        self._spool = spool
        self._read_ahead = read_ahead
        self._known: set[str] = set()  # lanes of ours whose mailboxes were told
        self._ahead: dict[str, Lease] = {}
        self._lock = threading.Lock()  # of what is leased ahead: the loop takes, the thread too
        self.worker = uuid.uuid4()
        self.workers = 1  # that live, this one counted
        self.lanes: frozenset[str] = frozenset()  # ours, and not about to be another's
        self.paces: dict[str, float] = {}  # see `ISpool`; goes with the lane
        self._turn = 0
        self._at_once = _MANY_AT_ONCE
        self._clear: set[str] = set()  # lanes of ours that had no note when we looked
        self._noted: set[str] = set()  # lanes of which we have written a note, or none, ourselves

    def __getattr__(self, name: str) -> Any:
        return getattr(self._spool, name)

    def scan(self) -> Iterator[Entry]:
        """See `ISpool`: nothing; what is due is told by the watch."""
        return iter(())

    def watch(self) -> FeedWatch:
        """See `ISpool`: it tells of mails that are leased already."""
        return FeedWatch(self, self._spool)

    def serves(self, lane: str) -> bool:
        """See `ISpool`."""
        return lane in self.lanes

    def claim(self, entry: Entry) -> Lease | None:
        """See `ISpool`."""
        with self._lock:
            lease = self._ahead.pop(entry.id, None)
        if lease is None:  # given back, or it waited here for its time
            return self._spool.claim(entry) if self.serves(entry.lane) else None
        if lease.is_sure and lease.entry == entry:
            return lease
        lease.release()
        return None

    def settle_accepted(self, leases: Sequence[Lease]) -> Sequence[Lease]:
        """See `ISettlesTogether`."""
        return self._spool.settle_accepted(leases)

    def leased(self, entry: Entry) -> bool:
        """See `ISpool`.  False of what is another's by now: the watch tells when it is ours."""
        return self.serves(entry.lane) and self._spool.leased(entry)

    def load(self, entry: Entry) -> Record:
        """See `ISpool`; nobody is asked about what is leased ahead."""
        lease = self._ahead.get(entry.id)
        record = lease.record() if lease is not None and lease.entry == entry else None
        return record or self._spool.load(entry)

    def lane_note(self, key: str) -> LaneNote | None:
        """See `ISpool`; nobody is asked about a lane that had none when it became ours.

        Others write one of it only while they drain by hand: that is seen within a second.
        """
        if key in self._clear and key not in self._noted:
            return None
        return self._spool.lane_note(key)

    def note_lane(self, key: str, note: LaneNote | None) -> None:
        """See `ISpool`."""
        self._noted.add(key)  # first, and for ever: the thread may just have seen none
        self._spool.note_lane(key, note)

    def part(self, limit: int) -> int:
        """Return our part of a limit over all workers; at least 1."""
        return max(1, limit // self.workers)

    def totals(self) -> dict[State, int]:
        """Return how many mails of each state there are, of all workers; only the oldest says so.

        So the numbers of all may be added.  Raises `SpoolError`.
        """
        counts = dict.fromkeys(_IN_SPOOL, 0)
        with self._spool.connections.use("count the mails") as connection:
            for state, count in connection.execute(_TOTALS, [self.worker]):
                counts[State(state)] = count
        return counts

    # For the thread

    def took(self, lanes: Iterable[str]) -> None:
        """Know of lanes that are ours now, and have no note."""
        self._clear.update(lanes)

    def is_noted(self, lanes: Iterable[str]) -> None:
        """Know of lanes that have a note."""
        self._clear.difference_update(lanes)

    def left(self, lanes: Collection[str]) -> None:
        """Know of lanes that are ours no more."""
        self._clear.difference_update(lanes)
        self._known.difference_update(lanes)
        for lane in lanes:
            self.paces.pop(lane, None)

    def next_of(self, lanes: list[str]) -> list[str]:
        """Return those of some lanes that are asked for next; each has its turn."""
        start = self._turn % len(lanes)
        part = (lanes + lanes)[start : start + min(self._at_once, len(lanes))]
        self._turn = start + len(part)
        return part

    def lease(self, connection: Connection, lanes: Sequence[str], most: int) -> list[Entry]:
        """Lease the next mails of these lanes; return them, those to be sent first in front.

        `most`: if there are so many, there may be more.
        """
        seconds = self._spool.leases.seconds
        token = uuid.uuid4()
        values = [most, list(lanes), self.worker, seconds, token, INLINE_AHEAD]
        rows = connection.execute(_CLAIM, values, binary=True).fetchall()
        named = rows[0][-1] if rows else 0
        if named >= MOST_AT_ONCE:
            self._at_once = max(_FEW_AT_ONCE, self._at_once // 2)
        elif named < MOST_AT_ONCE // 4 and len(lanes) >= self._at_once:
            self._at_once = min(2 * self._at_once, _MANY_AT_ONCE)
        entries = []
        for row in rows:
            lease = self._spool.lease_of(row_of(row), token)
            if lease is not None:
                with self._lock:
                    former = self._ahead.pop(lease.entry.id, None)
                    self._ahead[lease.entry.id] = lease
                if former is not None:  # which a server that died has forgotten
                    former.leave()
                entries.append(lease.entry)
        return sorted(entries, key=lambda entry: (-entry.priority, entry.id))

    def read_accounts(self, entries: Iterable[Entry]) -> None:
        """Tell whose accounts are needed soon: of lanes that were not ours, or had no mail yet."""
        leases = [self._ahead.get(each.id) for each in entries if each.lane not in self._known]
        new = {lease.entry.lane: lease.envelope.route.mailbox for lease in leases if lease}
        self._known.update(new)
        if mailboxes := {mailbox for mailbox in new.values() if mailbox}:
            self._read_ahead(mailboxes)

    def held(self) -> Counter[str]:
        """Return how many mails are leased, by lane."""
        return Counter(lease.entry.lane for lease in self._spool.leases.held())

    def give_back(self, connection: Connection, lanes: Iterable[str] | None = None) -> None:
        """Give back what is leased ahead of these lanes; None: of all."""
        chosen = None if lanes is None else set(lanes)
        with self._lock:
            leases = [
                lease
                for lease in self._ahead.values()
                if chosen is None or lease.entry.lane in chosen
            ]
            for lease in leases:
                del self._ahead[lease.entry.id]
        for lease in leases:
            lease.leave()
        if leases:
            ids, tokens = [each.entry.id for each in leases], [each.token for each in leases]
            connection.execute(_GIVE_BACK, {"ids": ids, "leases": tokens})


@implementer(IWatch)
class FeedWatch:
    """See `IWatch`.  Raises `SpoolError` when the server cannot be reached now."""

    def __init__(self, feed: Feed, spool: PostgresSpool) -> None:
        self._feed = feed
        self._spool = spool
        self._seconds = spool.leases.seconds
        self._told = Told()
        self._lanes: dict[str, float] = {}  # ours, and when they last had mail (monotonic)
        self._begun: dict[str, float] = {}  # and when they became ours
        self._leaving: set[str] = set()  # of them: too many, or their turn is over
        self._waiting: set[str] = set()  # of them: their circuits are open
        self._dry: set[str] = set()  # of them: the engine had no more when it was asked last
        self._wanted: deque[str] = deque()  # nobody's, with mail, when we looked
        self._looked: Any = None  # when that was, by the server's clock
        self._share = 1  # our part of all lanes with mail
        self._renew_at = 0.0  # monotonic, as all times here
        self._seek_at = time.monotonic() + _START
        self._age_at = 0.0
        self._aged: dict[str, str] = {}  # by lane: the last id that was told because of its age
        self._expired: set[str] = set()  # ids that were told since because their time is over
        self._closed = False
        connection = self._listen()
        self._ended, self._end = os.pipe()
        self._thread = threading.Thread(
            target=self._run, args=[connection], name="cpsmail-feed", daemon=True
        )
        self._thread.start()

    def fileno(self) -> int:
        """See `IWatch`."""
        return self._told.fileno()

    def read(self) -> list[Entry] | None:
        """See `IWatch`."""
        return self._told.read()

    def close(self) -> None:
        """See `IWatch`.  Gives back what is leased ahead, and the lanes."""
        if self._closed:
            return
        self._closed = True
        os.write(self._end, b"!")
        self._thread.join()
        self._told.close()
        os.close(self._ended)
        os.close(self._end)

    def _listen(self) -> Connection:
        connection = self._spool.connections.connect()
        try:
            connection.execute(f'LISTEN "{CHANNEL}"')
        except psycopg.Error as error:
            connection.close()
            raise self._spool.connections.error("listen", error) from error
        return connection

    def _run(self, connection: Connection | None) -> None:
        outage = Outage(log, "no mail is taken")
        while not self._closed:
            try:
                if connection is None:
                    connection = self._listen()
                    # The server may have died and forgotten claims, which do not wait for its disk.
                    self._feed.give_back(connection)
                seconds = self._work(connection)
                outage.end()
                self._wait(connection, seconds)
            except (SpoolError, psycopg.Error) as error:
                outage.begin(error)
                if connection is not None:
                    connection.close()
                    connection = None
                wait_for_any(self._ended, seconds=_LOOK)
            except Exception:  # a fault of ours: nothing spins on it, and it is not the end
                log.exception("a fault in the feed; going on in a moment")
                wait_for_any(self._ended, seconds=_LOOK)
        if connection is not None:
            self._go(connection)

    def _wait(self, connection: Connection, seconds: float) -> None:
        if notes_of(connection, self._ended, seconds=seconds):
            self._seek_at = 0.0

    def _go(self, connection: Connection) -> None:
        try:
            self._feed.give_back(connection)
            self._leave(connection, list(self._lanes))
            values = {"worker": self._feed.worker}  # of those, too, that were taken unknown to us
            connection.execute(
                f"UPDATE {LANES} SET worker = NULL, until = clock_timestamp()"  # noqa: S608
                " WHERE worker = %(worker)s",
                values,
            )
            self._spool.workers.leave(connection, self._feed.worker)
        except psycopg.Error as error:
            log.warning("lanes are free in %.0f s: %s", self._seconds, error)
        finally:
            connection.close()

    # One round

    def _work(self, connection: Connection) -> float:
        """Do what is to be done; return the seconds until there may be more."""
        now = time.monotonic()
        if now >= self._renew_at:
            self._renew(connection)
            self._renew_at = now + self._seconds / 3
        if now >= self._seek_at:
            self._look_at_notes(connection)
            self._seek(connection, now)
            self._tell_expired(connection)
            self._dry.clear()
            self._seek_at = now + _LOOK
        if now >= self._age_at:
            self._tell_old(connection)
            self._expired.clear()  # one that is still there is told again
            self._age_at = now + _AGE
        held = self._feed.held()
        for lane, count in held.items():
            if count and lane in self._lanes:
                self._lanes[lane] = now
        if self._wanted:  # an idle session that is left is worth less than mail that waits
            self._leave(connection, [lane for lane in self._dry | self._leaving if not held[lane]])
            self._take(connection, now)
        shut = self._leaving | self._waiting | self._dry
        fed = [lane for lane in self._lanes if lane not in shut]
        full = held.total() >= _AHEAD
        open_ = [lane for lane in fed if held[lane] < (1 if full else _LANE_AHEAD)]
        more, asked = False, 0
        while asked < len(open_):
            part = self._feed.next_of(open_)
            asked += len(part)
            most = len(part) if full else MOST_AT_ONCE
            entries = self._feed.lease(connection, part, most)
            try:
                self._feed.read_accounts(entries)
            finally:  # they are leased: nobody else tells of them
                self._tell(entries)
            for entry in entries:
                self._lanes[entry.lane] = now
            if len(entries) >= most:
                more = True
            else:
                self._dry.update(part)
        if more:
            return 0.0
        if self._wanted or len(open_) < len(fed):
            return _FULL if full else _SOON
        return max(0.0, self._seek_at - now)

    def _renew(self, connection: Connection) -> None:
        values = {"worker": self._feed.worker, "lease": self._seconds}
        self._spool.workers.sign(connection, self._feed.worker, self._seconds)
        kept = {row[0] for row in connection.execute(_RENEW, values)}
        lost = set(self._lanes) - kept
        for lane in lost:
            log.warning("the lane %s is another worker's now: we were silent for too long", lane)
        self._forget(lost)
        for lane in kept - set(self._lanes):  # taken when the answer was lost
            self._lanes[lane] = self._begun[lane] = time.monotonic()
        self._know_lanes()

    def _seek(self, connection: Connection, now: float) -> None:
        """Take lanes up to our share of all; give back others, and those without mail for long.

        At once what is over our share or, when more lanes have mail than we may feed, dry.
        """
        self._feed.workers = workers = max(1, self._spool.workers.count(connection))
        rows = connection.execute(_ACTIVE, {"lease": self._seconds}).fetchall()
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
                if not held[lane] and now - last > kept and lane not in self._waiting
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

    def _most(self) -> int:
        """Return how many lanes more we may feed.

        Those that wait cost nothing, nor do those that leave: they are in nobody's way.
        """
        return MOST_LANES - len(self._lanes.keys() - self._waiting - self._leaving)

    def _room(self) -> int:
        """Return how many lanes more we want."""
        return max(0, min(self._share - len(self._lanes), self._most()))

    def _take(self, connection: Connection, now: float) -> None:
        """Take those that are wanted, as far as there is room."""
        while self._wanted and (room := self._room()):
            lanes = [self._wanted.popleft() for _ in range(min(room, len(self._wanted)))]
            values = {
                "worker": self._feed.worker,
                "lease": self._seconds,
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
        fed = [lane for lane in self._lanes if lane not in self._waiting]
        return set([lane for lane in fed if now - self._begun[lane] >= _TURN][:most])

    def _look_at_notes(self, connection: Connection) -> None:
        """Feed no lane that waits: what is leased of it is given back."""
        query = f"SELECT lane, note FROM {LANES} WHERE note IS NOT NULL AND worker = %s"  # noqa: S608
        now = self._spool.connections.now()
        notes = connection.execute(query, [self._feed.worker]).fetchall()
        self._feed.is_noted(lane for lane, _ in notes)
        waiting = {lane for lane, note in notes if _until(note) > now}
        if waiting - self._waiting:
            self._feed.give_back(connection, waiting - self._waiting)
        for lane in self._waiting - waiting:
            self._aged.pop(lane, None)
        self._waiting = waiting

    def _tell_old(self, connection: Connection) -> None:
        """Tell a lane that waits of its oldest mails: they may be late, or too old."""
        query = (
            f"SELECT {ENTRY} FROM {MAILS} WHERE lane = %s AND id > %s AND {TAKEABLE}"  # noqa: S608
            " AND due <= %s ORDER BY id LIMIT %s"
        )
        for lane in self._waiting:
            after, now = self._aged.get(lane, ""), self._spool.connections.now()
            rows = connection.execute(query, [lane, after, now, _AGE_STEP]).fetchall()
            entries = [entry_of(row) for row in rows]
            if entries:
                self._aged[lane] = entries[-1].id
                self._tell(entries)

    def _tell_expired(self, connection: Connection) -> None:
        """Tell a lane that waits of its mails that are not to be sent any more."""
        if not self._waiting:
            return
        query = (
            f"SELECT {ENTRY} FROM {MAILS} WHERE lane = ANY(%s) AND expires > 0 AND expires <= %s"  # noqa: S608
            f" AND {TAKEABLE} AND due <= %s AND id <> ALL(%s) LIMIT %s"
        )
        now = self._spool.connections.now()
        values = [list(self._waiting), now, now, list(self._expired), _AGE_STEP]
        entries = [entry_of(row) for row in connection.execute(query, values)]
        self._expired.update(entry.id for entry in entries)
        self._tell(entries)

    def _tell(self, entries: list[Entry]) -> None:
        if entries:
            self._told.tell(entries)


def _until(note: str) -> float:
    try:
        return float(json.loads(note)["until"])
    except (ValueError, TypeError, LookupError):
        return 0.0
