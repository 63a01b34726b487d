"""What a processor delivers: the next mails of the lanes that are its own, leased ahead.

::

    the engine names its next mails --lease--> told --claim--> delivered
                                                `-- its lane waits, or leaves: given back

Which lanes are its own says `lane_sharing`; `feed_watch` leases and tells, in a thread beside the
loop.  The limits of a relay are shared out among the workers that live.
"""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final

from zope.interface import implementer

from ..interfaces import Entry, ISettlesTogether, LaneNote, Record, State
from ..spool.postgres import PostgresSpool
from .connections import Connection
from .engine import JOBS, MOST_AT_ONCE, SCHEMA
from .feed_watch import FeedWatch
from .lease import Lease
from .mails import INLINE_AHEAD, MAILS, VISIBLE, row_of
from .workers import WORKERS

#: Lanes that one question to the engine names.  It locks a batch of each of them, and takes one of
#: all: few while they have much mail, many while there is little to be found.
_FEW_AT_ONCE: Final = 5
_MANY_AT_ONCE: Final = 20

_CLAIM: Final = f"SELECT * FROM {SCHEMA}.claim(%s, %s::text[], %s, %s, %s, %s)"  # noqa: S608

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
