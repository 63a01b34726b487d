"""One mail in the database, and every change of it: what the files of a Maildir are there.

The row is the mail; its job, in the engine's table, only says that it is next.  Who changes a
mail shows the token of its lease, or finds that there is none: so a worker that was stopped for
longer than its lease changes nothing when it goes on.

What need not survive a crash of the server (a claim; a removal, until the next `sync`) does not
wait for its disk: ``synchronous_commit`` is off for that one statement.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from sys import intern
from typing import Any, Final, NamedTuple

from ..envelope import Envelope, digest, parse_block
from ..errors import EntryBusy, InvalidEnvelope, NoSuchEntry
from ..interfaces import Entry, Record, State
from ..spool.outcomes import NOTHING, DamagedSide, Side, dump_side, load_side
from .connections import Connection, Connections
from .engine import DELETE_JOB, FREE_JOB, SCHEMA
from .functions import FREE, give_jobs, tell

log = logging.getLogger("cpsmailaccess_delivery.spool")

MAILS: Final = f"{SCHEMA}.mails"
KEYS: Final = f"{SCHEMA}.keys"
CHANNEL: Final = "cpsmail"

#: Bytes of the largest message that comes with its claim; a larger one is read when it is sent.
#: Less of those that are leased ahead: a worker keeps a thousand of them.
INLINE: Final = 1024 * 1024
INLINE_AHEAD: Final = 64 * 1024

#: States that nobody sees: before the commit; of a transaction that a witness has seen abort; and
#: of a mail that comes from another outbox.
STAGED: Final = "staged"
ABORTED: Final = "aborted"
ARRIVING: Final = "arriving"
VISIBLE: Final = f"state NOT IN ('{STAGED}', '{ABORTED}', '{ARRIVING}')"

#: Bytes of a message that are read at a time; it is stored so that the rest is not touched.
SLICE: Final = 1024 * 1024

_ID = re.compile(r"\d{10}\.M\d{6}R[0-9a-f]{6}\.[0-9a-f]{16}", re.ASCII)
_PAGE: Final = 5_000

ENTRY: Final = "id, lane, state, due, attempts, priority, expires"
_WIDTH: Final = 7  # columns
_LAZY: Final = "set_config('synchronous_commit', 'off', true)"

#: How long a settlement waits for a lock, in the loop of a processor: for the renewal of its
#: leases, not for a person.  Then the mail is kept, and tried again.
_WAIT: Final = "500ms"
_WAIT_AGAIN: Final = "20ms"
_SETTLED_BY: Final = "set_config('lock_timeout', %(wait)s, true) IS NOT NULL AND lease = %(lease)s"

_CLAIMED: Final = f"{ENTRY}, block, CASE WHEN size <= %(inline)s THEN message END, side, job"

CLAIM: Final = f"""
UPDATE {MAILS} SET lease = %(lease)s,
    leased_until = clock_timestamp() + make_interval(secs => %(seconds)s)
WHERE id = %(id)s AND state = %(state)s AND due = %(due)s AND attempts = %(attempts)s AND {FREE}
RETURNING {_CLAIMED}, {_LAZY}"""  # noqa: S608

_REMOVE: Final = f"""
WITH mail AS (
    DELETE FROM {MAILS} WHERE id = %(id)s AND {_SETTLED_BY} RETURNING id, job, {_LAZY}
), done AS ({DELETE_JOB}){{freed}}
SELECT count(*) FROM mail"""  # noqa: S608
_FREED: Final = f", freed AS (DELETE FROM {KEYS} WHERE mail IN (SELECT id FROM mail))"  # noqa: S608

_REMOVE_ALL: Final = f"""
WITH held AS (
    SELECT mails.id FROM unnest(%(ids)s::text[], %(leases)s::uuid[]) each (id, lease)
    JOIN {MAILS} USING (id, lease) WHERE set_config('lock_timeout', %(wait)s, true) IS NOT NULL
    FOR UPDATE OF mails SKIP LOCKED
), mail AS (
    DELETE FROM {MAILS} USING held WHERE mails.id = held.id RETURNING mails.id, mails.job, {_LAZY}
), done AS ({DELETE_JOB})
SELECT id FROM mail"""  # noqa: S608

_RECORD: Final = f"""
WITH mail AS (
    UPDATE {MAILS} SET state = %(state)s, due = %(due)s, attempts = %(attempts)s, side = %(side)s,
        lease = NULL, leased_until = NULL, settled_at = clock_timestamp(), doubt = false
    WHERE id = %(id)s AND {_SETTLED_BY} RETURNING job
), done AS ({{job}}), told AS (SELECT pg_notify('{CHANNEL}', %(id)s) FROM mail)
SELECT count(*) FROM mail, told"""  # noqa: S608

_RELEASE: Final = f"""
WITH mail AS (
    UPDATE {MAILS} SET state = %(state)s, due = %(due)s, side = %(side)s,
        lease = NULL, leased_until = NULL
    WHERE id = %(id)s AND {_SETTLED_BY} RETURNING job, {_LAZY}
), done AS ({FREE_JOB})
SELECT count(*) FROM mail"""  # noqa: S608


class Row(NamedTuple):
    """A mail that was claimed.  ``message``: None: too large to come along."""

    entry: Entry
    block: bytes
    message: bytes | None
    side: str | None
    job: int | None


def entry_of(row: Sequence[Any]) -> Entry:
    """Return the entry in the first columns of a row, see `ENTRY`."""
    entry_id, lane, state, due, attempts, priority, expires = row[:_WIDTH]
    return Entry(entry_id, intern(lane), State(state), due, attempts, priority, expires)


def row_of(row: Sequence[Any]) -> Row:
    """Return what `CLAIM` returned."""
    block, message, side, job = row[_WIDTH : _WIDTH + 4]
    return Row(entry_of(row), block, message, side, job)


def is_takeable(entry: Entry) -> bool:
    """Tell whether a processor takes such a mail: now, or when it is due."""
    if entry.state is State.QUEUED:
        return True
    return entry.state in (State.DEFERRED, State.UNCLEAR) and entry.due > 0


class Mails:
    """The rows that are visible, by their entries."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    # Looking

    def scan(self) -> Iterator[Entry]:
        """Yield the visible entries, the oldest first; no transaction stays open meanwhile."""
        after = ""
        query = f"SELECT {ENTRY} FROM {MAILS} WHERE id > %s AND {VISIBLE} ORDER BY id LIMIT {_PAGE}"  # noqa: S608
        while True:
            with self._connections.use("list the mails") as connection:
                page = [entry_of(row) for row in connection.execute(query, [after])]
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1].id

    def some(self, ids: Sequence[str]) -> list[Entry]:
        """Return the entries of these ids, as they are now."""
        with self._connections.use("look at mails") as connection:
            return some(connection, ids)

    def look_up(self, entry_id: str) -> Entry:
        """Return an entry by its id.  Raises `NoSuchEntry`."""
        found = self.some([entry_id]) if _ID.fullmatch(entry_id) else []
        if not found:
            raise NoSuchEntry(
                f"{self._connections.location}: no mail has the id {entry_id!r}: delivered,"
                " cancelled or never committed"
            )
        return found[0]

    def find(self, message_id: str) -> list[Record]:
        """Return the mails with this Message-Id."""
        query = (
            f"SELECT {ENTRY}, block, side, size FROM {MAILS}"  # noqa: S608
            f" WHERE digest = %s AND {VISIBLE} ORDER BY id"
        )
        with self._connections.use("find a mail") as connection:
            rows = connection.execute(query, [digest(message_id)]).fetchall()
        records = []
        for row in rows:
            try:
                record = record_of(row)
            except InvalidEnvelope:
                continue  # nobody knows its Message-Id
            if record.envelope.message_id == message_id:
                records.append(record)
        return records

    def holding(self, message_ids: Collection[str]) -> set[str]:
        """Return those of these Message-Ids under which there is a mail."""
        wanted = {digest(message_id): message_id for message_id in message_ids}
        query = f"SELECT DISTINCT digest FROM {MAILS} WHERE digest = ANY(%s) AND {VISIBLE}"  # noqa: S608
        with self._connections.use("look for mails") as connection:
            return {wanted[row[0]] for row in connection.execute(query, [list(wanted)])}

    def load(self, entry: Entry) -> Record:
        """Return a mail as it is now.  Raises `NoSuchEntry`, `InvalidEnvelope`."""
        return record_of(self._read(entry.id, "block, side, size"))

    def message(self, entry_id: str) -> bytes:
        """Return the message of a mail.  Raises `NoSuchEntry`.

        In slices: what server and driver have in memory beside it is one of them.
        """
        parts: list[bytes] = []
        while not parts or len(parts[-1]) == SLICE:
            start = len(parts) * SLICE + 1
            column = f"substring(message FROM {start} FOR {SLICE})"
            parts.append(self._read(entry_id, column)[_WIDTH])
        return b"".join(parts)

    def leased(self, entry: Entry) -> bool:
        """Tell whether somebody has the lease of this entry."""
        query = (
            f"SELECT 1 FROM {MAILS} WHERE id = %s AND state = %s AND due = %s AND attempts = %s"  # noqa: S608
            f" AND NOT {FREE}"
        )
        values = [entry.id, entry.state.value, entry.due, entry.attempts]
        with self._connections.use("look at a lease") as connection:
            return connection.execute(query, values).fetchone() is not None

    def refused_before(self, when: float) -> Iterator[Entry]:
        """Yield the mails that were refused, and settled, before a time."""
        query = (
            f"SELECT {ENTRY} FROM {MAILS} WHERE state = 'refused'"  # noqa: S608
            " AND settled_at < to_timestamp(%s) ORDER BY settled_at LIMIT 1000"
        )
        with self._connections.use("look for refused mails") as connection:
            entries = [entry_of(row) for row in connection.execute(query, [when])]
        yield from (entry for entry in entries if entry.staged_at < when)

    # What the holder of a lease does; False: the lease is another's now

    def claim(self, entry: Entry, lease: uuid.UUID, seconds: float) -> Row | None:
        """Take the lease of an entry, or None: gone, changed or leased."""
        values = {
            "id": entry.id,
            "state": entry.state.value,
            "due": entry.due,
            "attempts": entry.attempts,
            "lease": lease,
            "seconds": seconds,
            "inline": INLINE,
        }
        with self._connections.use(f"lease {entry.id}") as connection:
            row = connection.execute(CLAIM, values, binary=True).fetchone()
        return row_of(row) if row else None

    def remove(
        self, entry_id: str, lease: uuid.UUID, *, free_key: bool = False, again: bool = False
    ) -> bool:
        """Remove a mail, with its key or without; safe against a crash of the server with the
        next `sync`."""
        query = _REMOVE.format(freed=_FREED if free_key else "")
        return self._settle(query, {"id": entry_id, "lease": lease}, again=again)

    def remove_all(self, mails: Sequence[tuple[str, uuid.UUID]]) -> set[str]:
        """Remove mails, by id and lease, as `remove` does; return the ids of those removed.

        What somebody has locked is not waited for.
        """
        values = {
            "ids": [each for each, _ in mails],
            "leases": [lease for _, lease in mails],
            "wait": _WAIT,
        }
        with self._connections.use("settle mails") as connection:
            return {row[0] for row in connection.execute(_REMOVE_ALL, values)}

    def record(self, after: Entry, side: Side, lease: uuid.UUID, *, again: bool) -> bool:
        """Write what an attempt left, durably, and end the lease."""
        job = FREE_JOB if is_takeable(after) else DELETE_JOB
        return self._settle(_RECORD.format(job=job), _values(after, side, lease), again=again)

    def set_aside(self, entry: Entry, side: Side, lease: uuid.UUID) -> bool:
        """Hold a mail, durably, for as long as its lease lasts, and longer."""
        query = (
            f"UPDATE {MAILS} SET state = %(state)s, due = %(due)s, side = %(side)s,"  # noqa: S608
            f" doubt = doubt OR %(doubt)s WHERE id = %(id)s AND {_SETTLED_BY} RETURNING 1"
        )
        values = {**_values(entry, side, lease), "doubt": side.cancel is not None}
        return self._settle(query, values)

    def release(self, before: Entry, side: str | None, lease: uuid.UUID) -> bool:
        """End a lease; the mail is as it was."""
        values = {**_values(before, NOTHING, lease), "side": side}
        return self._settle(_RELEASE, values)

    def put_back(self, before: Entry, side: str | None, lease: uuid.UUID, *, doubt: bool) -> bool:
        """End a lease after `set_aside`: the mail is as it was.  `doubt`: it was in doubt.

        Its job may be gone: the engine was told that a held mail has none, see `functions`.
        """
        values = {**_values(before, NOTHING, lease), "side": side, "doubt": doubt}
        query = (
            f"WITH mail AS (UPDATE {MAILS} SET state = %(state)s, due = %(due)s, side = %(side)s,"  # noqa: S608
            " doubt = %(doubt)s, lease = NULL, leased_until = NULL"
            f" WHERE id = %(id)s AND lease = %(lease)s RETURNING job), done AS ({DELETE_JOB})"
            " SELECT count(*) FROM mail"
        )
        with self._connections.use(f"put back {before.id}") as connection:  # noqa: SIM117
            with connection.transaction():
                row = connection.execute(query, values).fetchone()
                done = bool(row and row[0])
                if done and is_takeable(before):
                    give_jobs(connection, [before.id])
                    tell(connection, [before.id])
        return done

    def _settle(self, query: str, values: dict[str, Any], *, again: bool = False) -> bool:
        """`again`: it could not be done before."""
        values["wait"] = _WAIT_AGAIN if again else _WAIT
        with self._connections.use(f"settle {values['id']}") as connection:
            row = connection.execute(query, values).fetchone()
        return bool(row and row[0])

    def free(self, connection: Connection, entry_id: str, lease: uuid.UUID) -> None:
        """End a lease without a change of its mail or its job."""
        query = f"UPDATE {MAILS} SET lease = NULL, leased_until = NULL WHERE id = %s AND lease = %s"  # noqa: S608
        connection.execute(query, [entry_id, lease])

    # What people do: the mail is theirs unless it is leased

    def requeue(self, entry: Entry, *, unclear: bool) -> Entry:
        """Make a mail due now."""
        with self._connections.use(f"requeue {entry.id}") as connection:  # noqa: SIM117
            with connection.transaction():
                before, side = self._lock(connection, entry.id)
                outcomes = side.outcomes
                if unclear:
                    outcomes = {r: o._replace(held=False) for r, o in outcomes.items()}
                after = before._replace(state=State.QUEUED, due=0.0)
                self._write(connection, after, replace(side, outcomes=outcomes))
        return after

    def hold(self, entry: Entry, reason: str) -> Entry:
        """Set a mail aside."""
        with self._connections.use(f"hold {entry.id}") as connection:  # noqa: SIM117
            with connection.transaction():
                before, side = self._lock(connection, entry.id)
                after = before._replace(state=State.HELD, due=0.0)
                self._write(connection, after, replace(side, reason=reason))
        return after

    def cancel(self, entry: Entry) -> Record:
        """Remove a mail."""
        with self._connections.use(f"cancel {entry.id}") as connection:  # noqa: SIM117
            with connection.transaction():
                before, _ = self._lock(connection, entry.id)
                row = connection.execute(
                    f"WITH mail AS (DELETE FROM {MAILS} WHERE id = %s RETURNING *),"  # noqa: S608
                    f" done AS ({DELETE_JOB})"
                    f" SELECT {ENTRY}, block, side, size FROM mail",
                    [entry.id],
                ).fetchone()
                if not before.attempts:
                    connection.execute(f"DELETE FROM {KEYS} WHERE mail = %s", [entry.id])  # noqa: S608
        assert row is not None  # noqa: S101 - locked above
        try:
            return record_of(row)
        except InvalidEnvelope as error:  # to cancel it may be all that one can do
            return Record(before, Envelope("", ()), {}, 0, str(error))

    def _lock(self, connection: Connection, entry_id: str) -> tuple[Entry, Side]:
        """Keep a mail as it is until the end of the transaction.  Raises as people are told."""
        query = f"SELECT {ENTRY}, side, {FREE} FROM {MAILS} WHERE id = %s AND {VISIBLE} FOR UPDATE"  # noqa: S608
        row = connection.execute(query, [entry_id]).fetchone()
        if row is None:
            raise NoSuchEntry(f"{self._connections.location}: {entry_id} is no longer there")
        side, is_free = row[_WIDTH:]
        if not is_free:
            raise EntryBusy(f"{entry_id}: is being delivered right now; try again in a moment")
        try:
            return entry_of(row), load_side(side)
        except DamagedSide:
            return entry_of(row), NOTHING

    def _write(self, connection: Connection, after: Entry, side: Side) -> None:
        """Write a mail that `_lock` has; give it a job, or take it.

        Whatever was in doubt, a person has decided.
        """
        side = replace(side, state=after.state, due=after.due, attempts=after.attempts, cancel=None)
        values = {**_values(after, side, None), "note": after.id}
        query = (
            f"WITH mail AS (UPDATE {MAILS} SET state = %(state)s, due = %(due)s, side = %(side)s,"  # noqa: S608
            " lease = NULL, leased_until = NULL, doubt = false, settled_at = clock_timestamp()"
            f" WHERE id = %(id)s RETURNING job), done AS ({DELETE_JOB})"
            f" SELECT pg_notify('{CHANNEL}', %(id)s)"
        )
        connection.execute(query, values)
        if is_takeable(after):
            give_jobs(connection, [after.id])

    def _read(self, entry_id: str, columns: str) -> Sequence[Any]:
        query = f"SELECT {ENTRY}, {columns} FROM {MAILS} WHERE id = %s AND {VISIBLE}"  # noqa: S608
        with self._connections.use(f"read {entry_id}") as connection:
            row: Sequence[Any] | None = connection.execute(
                query, [entry_id], binary=True
            ).fetchone()
        if row is None:
            raise NoSuchEntry(
                f"{self._connections.location}: no mail has the id {entry_id!r}: delivered,"
                " cancelled or never committed"
            )
        return row


def some(connection: Connection, ids: Sequence[str]) -> list[Entry]:
    """Return the visible entries of these ids, the oldest first."""
    query = f"SELECT {ENTRY} FROM {MAILS} WHERE id = ANY(%s) AND {VISIBLE} ORDER BY id"  # noqa: S608
    return [entry_of(row) for row in connection.execute(query, [list(ids)])]


def _values(after: Entry, side: Side, lease: uuid.UUID | None) -> dict[str, Any]:
    return {
        "id": after.id,
        "state": after.state.value,
        "due": after.due,
        "attempts": after.attempts,
        "side": dump_side(side).decode(),
        "lease": lease,
    }


def record_of(row: Sequence[Any]) -> Record:
    """Return the record in a row of `ENTRY`, block, side, size.  Raises `InvalidEnvelope`."""
    entry, (block, side, size) = entry_of(row), row[_WIDTH:]
    envelope, _ = parse_block(block)
    try:
        known = load_side(side)
    except DamagedSide as error:
        known = Side(reason=str(error))
    reason = "" if entry.state is State.QUEUED else known.reason
    return Record(entry, envelope, known.outcomes, size, reason, known.cancel)


_COLUMNS: Final = f"{ENTRY}, digest, block, message, size, doubt, witnessed"
INSERT: Final = (
    f"INSERT INTO {MAILS} ({_COLUMNS})"  # noqa: S608
    " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %b, %b, %s, %s, %s)"
)

#: The same for many at once: a third of the time.
COPY: Final = f"COPY {MAILS} ({_COLUMNS}) FROM STDIN (FORMAT binary)"
COPY_TYPES: Final = (
    *("text", "text", "text", "float8", "int4", "int2", "float8"),
    *("text", "bytea", "bytea", "int4", "bool", "bool"),
)
