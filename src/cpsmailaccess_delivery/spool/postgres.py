"""The spool on PostgreSQL: mails are rows, states are columns, changes are transactions.

This file is the contract; `pg` has the rest: `pg.staging` the two phases, `pg.mails` what is
visible, `pg.lease` the claims, `pg.feed` what processors get.

What is safe when: what `ILease.settle` did survives the death of the process at once; against a
crash of the server, outcomes of a mail that stays are safe at once too, and removals with the
next `sync`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

from zope.interface import implementer

from ..envelope import Envelope, parse_block
from ..errors import InvalidEnvelope
from ..interfaces import (
    Doubt,
    Entry,
    ISettlesTogether,
    ISpool,
    LaneNote,
    Record,
    SweepReport,
    Verdict,
)
from ..pg.connections import Connection, Connections
from ..pg.inside import Home, Inside
from ..pg.lanes import LaneNotes
from ..pg.lease import Lease, Leases
from ..pg.mails import CHANNEL, Mails, Row, some
from ..pg.staging import Staging
from ..pg.transit import Transit
from ..pg.watch import Watch
from ..pg.workers import Workers
from .outcomes import DamagedSide, load_side

log = logging.getLogger("cpsmailaccess_delivery.spool")

#: Seconds that a lease lasts without a sign of life of its holder.
LEASE: Final = 30.0


@implementer(ISpool, ISettlesTogether)
class PostgresSpool:
    """See `ISpool`.

    `connections`: to the server; closed with the spool.  `lease`: seconds after which the mails
    of a worker that is silent are another's.  `clock`: seconds since the epoch, for ids and due
    times; the server's.
    """

    def __init__(
        self,
        connections: Connections,
        *,
        lease: float = LEASE,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.location = connections.location
        self.paces: dict[str, float] = {}  # of who drains; a `Feed` has its own
        self.connections = connections
        self.mails = Mails(connections)
        self.leases = Leases(connections, self.mails, lease)
        self.staging = Staging(connections, clock or connections.now)
        self.home = Home(connections)
        self.lanes = LaneNotes(connections)
        self.workers = Workers(connections)
        self.transit = Transit(connections)
        self._watches: list[Watch] = []

    def __repr__(self) -> str:
        return f"<PostgresSpool {self.location}>"

    # The two phases of a transaction

    def stage(self, envelope: Envelope, message: bytes) -> Entry:
        """See `ISpool`."""
        return self.staging.stage(envelope, message)

    def prepare(
        self, entries: Sequence[Entry], *, witnessed: bool = False, alone: bool = False
    ) -> None:
        """See `ISpool`."""
        self.staging.prepare(entries, witnessed=witnessed, alone=alone)

    def publish(self, entries: Sequence[Entry]) -> None:
        """See `ISpool`."""
        self.staging.publish(entries)

    def discard(self, entries: Sequence[Entry]) -> None:
        """See `ISpool`."""
        self.staging.discard(entries)

    def inside(self, connection: Any) -> Inside:
        """Return what puts mails into a transaction of the application's own: see `pg.inside`."""
        return Inside(self.connections, self.home, self.staging, connection)

    def key_holder(self, key: str) -> str | None:
        """See `ISpool`."""
        return self.staging.key_holder(key)

    # What processors do

    def scan(self) -> Iterator[Entry]:
        """See `ISpool`.  What comes or goes while it runs may be told or not."""
        return self.mails.scan()

    def watch(self) -> Watch:
        """See `ISpool`."""
        watch = Watch(self.connections, CHANNEL, _entries_of, self._watches.remove)
        self._watches.append(watch)
        return watch

    def serves(self, lane: str) -> bool:
        """See `ISpool`."""
        return True

    def claim(self, entry: Entry) -> Lease | None:
        """See `ISpool`."""
        token = uuid.uuid4()
        row = self.mails.claim(entry, token, self.leases.seconds)
        return None if row is None else self.lease_of(row, token)

    def lease_of(self, row: Row, token: uuid.UUID) -> Lease | None:
        """Return the lease of a mail that was claimed; None: it cannot be read, and is held."""
        try:
            envelope, _ = parse_block(row.block)
            side = load_side(row.side)
        except (InvalidEnvelope, DamagedSide) as error:
            log.error("%s is held: %s", row.entry.id, error)
            with self.connections.use("free a mail") as connection:
                self.mails.free(connection, row.entry.id, token)
            self.mails.hold(row.entry, str(error))
            return None
        lease = Lease(self.leases, row, token, envelope, side)
        self.leases.add(lease)
        return lease

    def settle_accepted(self, leases: Sequence[Lease]) -> Sequence[Lease]:
        """See `ISettlesTogether`."""
        return self.leases.settle_accepted(leases)

    def leased(self, entry: Entry) -> bool:
        """See `ISpool`."""
        return self.mails.leased(entry)

    def sync(self) -> None:
        """See `ISpool`: a transaction that waits for the disk brings all before it there."""
        with self.connections.use("make removals durable") as connection:
            connection.execute("SELECT pg_logical_emit_message(true, 'cpsmail', '')")

    # What people do

    def find(self, message_id: str) -> list[Record]:
        """See `ISpool`."""
        return self.mails.find(message_id)

    def holding(self, message_ids: Collection[str]) -> set[str]:
        """See `ISpool`."""
        return self.mails.holding(message_ids)

    def look_up(self, entry_id: str) -> Entry:
        """See `ISpool`."""
        return self.mails.look_up(entry_id)

    def load(self, entry: Entry) -> Record:
        """See `ISpool`."""
        return self.mails.load(entry)

    def read_message(self, entry: Entry) -> bytes:
        """See `ISpool`."""
        return self.mails.message(entry.id)

    def requeue(self, entry: Entry, *, unclear: bool = False) -> Entry:
        """See `ISpool`."""
        return self.mails.requeue(entry, unclear=unclear)

    def hold(self, entry: Entry, reason: str) -> Entry:
        """See `ISpool`."""
        return self.mails.hold(entry, reason)

    def cancel(self, entry: Entry) -> Record:
        """See `ISpool`."""
        return self.mails.cancel(entry)

    # Why lanes wait

    def note_lane(self, key: str, note: LaneNote | None) -> None:
        """See `ISpool`."""
        self.lanes.write(key, note)

    def lane_note(self, key: str) -> LaneNote | None:
        """See `ISpool`."""
        return self.lanes.read(key)

    def lane_notes(self) -> dict[str, LaneNote]:
        """See `ISpool`."""
        return self.lanes.all()

    # Upkeep

    def refused_before(self, when: float) -> Iterator[Entry]:
        """See `ISpool`."""
        return self.mails.refused_before(when)

    def sweep(self) -> SweepReport:
        """See `ISpool`."""
        return self.staging.sweep()

    def left_overs(self) -> Sequence[str]:
        """See `ISpool`."""
        return self.staging.left_overs()

    def doubts(self) -> Sequence[Doubt]:
        """See `ISpool`."""
        return self.staging.doubts()

    def resolve(self, doubt: Doubt, verdict: Verdict) -> Record | None:
        """See `ISpool`."""
        return self.staging.resolve(doubt, verdict)

    def close(self) -> None:
        """See `ISpool`."""
        for watch in list(self._watches):
            watch.close()
        self.staging.close()
        self.leases.close()
        self.connections.close()


def _entries_of(connection: Connection, payloads: list[str]) -> list[Entry]:
    ids = dict.fromkeys(one for payload in payloads for one in payload.split(",") if one)
    return some(connection, list(ids))
