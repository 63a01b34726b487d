"""From `stage` to `publish`, and what a crash in between leaves.

::

    stage        prepare                    publish
    in memory -> a row, state staged   ->   queued, with a job; one transaction
       |         (committed: durable)          `-- not reached: in doubt
       | dead:      | in doubt after a while: held, doubt stays until somebody decides
       | gone       |       |-- a witness: committed: queued; aborted: unseen, then gone
       |            `-- publish comes after all: queued

`PREPARE TRANSACTION` would do the same with the server's own means; it is refused beside NOTIFY,
and was slower.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import psycopg

from ..envelope import Envelope, digest, format_block, parse_block
from ..errors import InvalidEnvelope, KeyTaken, OutboxClosed, SpoolError
from ..interfaces import Doubt, Entry, Record, State, SweepReport, Verdict
from ..spool import forks, names
from ..spool.doubts import (
    ASKED,
    CANCEL_IN_DOUBT,
    IN_DOUBT,
    doubt_of,
    is_asked_about,
    is_in_doubt,
    key_in_doubt,
)
from ..spool.outcomes import DamagedSide, Side, dump_side, load_side
from .connections import Connection, Connections, Executor
from .engine import DELETE_JOB
from .functions import give_jobs, publish, tell
from .mails import (
    ABORTED,
    COPY,
    COPY_TYPES,
    ENTRY,
    INSERT,
    KEYS,
    MAILS,
    STAGED,
    entry_of,
    is_takeable,
    record_of,
)

log = logging.getLogger("cpsmailaccess_delivery.spool")

#: Seconds after which a staged mail is in doubt: from vote to finish it takes milliseconds.
DOUBT_AFTER: Final = 300.0

#: Seconds between two tries to publish what is committed.
_LATE: Final = 1.0

#: For so long nobody else commits a key; from the due time of its mail on.
_KEPT: Final = "interval '30 days'"

#: Which mails somebody has left between vote and finish; those of which a witness may know.
_LEFT: Final = (
    f"doubt AND state = '{STAGED}' AND staged_at < clock_timestamp() - make_interval(secs => %s)"
)
_ASKABLE: Final = (
    "doubt AND state = 'held' AND (leased_until IS NULL"
    " OR leased_until < clock_timestamp() - make_interval(secs => %s))"
)
_ABORTED_KEPT: Final = "interval '1 day'"


@dataclass(slots=True)
class _Staged:
    entry: Entry
    envelope: Envelope
    block: bytes
    message: bytes
    generation: int
    prepared: bool = False


class Staging:
    """The mails that this process has staged, and those that somebody has left in doubt.

    `clock`: the server's, in seconds since the epoch.
    """

    def __init__(self, connections: Connections, clock: Callable[[], float]) -> None:
        self._connections = connections
        self._clock = clock
        self._staged: dict[str, _Staged] = {}
        self._closed = False
        self._begin()

    def _begin(self) -> None:
        self._generation = forks.generation()
        self._late: deque[list[_Staged]] = deque()  # committed, and not published yet
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def stage(self, envelope: Envelope, message: bytes) -> Entry:
        """See `ISpool`.  Nothing is asked of the server."""
        if self._closed:
            raise OutboxClosed(f"outbox {self._connections.location}: was closed")
        staged = self._new(envelope, message)
        self._staged[staged.entry.id] = staged
        return staged.entry

    def _new(self, envelope: Envelope, message: bytes) -> _Staged:
        block = format_block(envelope)  # refuses what no spool could keep
        entry_id = names.new_id(self._clock(), os.urandom(3).hex(), envelope.message_id)
        entry = names.first_entry(entry_id, envelope)
        return _Staged(entry, envelope, block, bytes(message), forks.generation())

    def prepare(
        self, entries: Sequence[Entry], *, witnessed: bool = False, alone: bool = False
    ) -> None:
        """See `ISpool`."""
        staged = [self._mine(entry) for entry in entries]
        if not staged:
            return
        # First: where the answer to the commit is lost, `discard` has something to remove.
        for each in staged:
            each.prepared = True
        has_keys = any(each.envelope.key for each in staged)
        state = ABORTED if alone else STAGED  # which `publish` finds, and nobody else
        with self._connections.use("make mails durable") as connection:  # noqa: SIM117
            # One statement is a transaction of its own, and two round trips less.
            with connection.transaction() if has_keys else nullcontext():
                if has_keys:
                    _take_keys(connection, staged)
                _insert(connection, staged, state=state, witnessed=witnessed)

    def publish(self, entries: Sequence[Entry]) -> None:
        """See `ISpool`."""
        mine = []
        for entry in entries:
            staged = self._staged.pop(entry.id, None)
            if staged is None or staged.generation != forks.generation():
                log.critical("%s: published, but not staged by this process", entry.id)
            else:
                mine.append(staged)
        if not mine:
            return
        if not self._try_to_publish(mine):
            self._publish_later(mine)

    def _try_to_publish(self, staged: Sequence[_Staged]) -> bool:
        for _ in range(2):  # a connection may have been lost since the vote
            try:
                self._publish(staged)
                return True
            except SpoolError as error:
                failure = error
        log.error("committed mails cannot be published now: %s; trying until they are", failure)
        return False

    def _publish_later(self, staged: list[_Staged]) -> None:
        """Go on trying, as long as this process lives: it knows that they are committed."""
        if self._generation != forks.generation():
            self._begin()  # the parent's are the parent's, and its thread is not here
        with self._lock:
            self._late.append(staged)
            if self._thread is None:
                thread = threading.Thread(
                    target=self._catch_up, name="cpsmail-publish", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads, or the process ends
                    ids = ", ".join(each.entry.id for each in staged)
                    log.critical("committed, but in doubt in the database: %s: %s", ids, error)
                    return
                self._thread = thread

    def _catch_up(self) -> None:
        while not self._ended.wait(_LATE):
            while self._late and self._try_to_publish(self._late[0]):
                self._late.popleft()
            with self._lock:
                if not self._late:
                    self._thread = None
                    return

    def _publish(self, staged: Sequence[_Staged]) -> None:
        ids = [each.entry.id for each in staged]
        keys = [each.entry.id for each in staged if each.envelope.key]
        with self._connections.use("publish mails") as connection:  # noqa: SIM117
            with connection.transaction() if keys else nullcontext():
                there = publish(connection, ids, [each.entry.due for each in staged])
                if keys:
                    _confirm_keys(connection, keys)
        for missing in set(ids) - there:
            log.critical("%s: published already, or cancelled by somebody while in doubt", missing)

    def discard(self, entries: Sequence[Entry]) -> None:
        """See `ISpool`."""
        prepared = []
        for entry in entries:
            staged = self._staged.get(entry.id)
            if staged is not None and staged.generation == forks.generation():
                del self._staged[entry.id]
                if staged.prepared:
                    prepared.append(entry.id)
        if not prepared:
            return
        try:
            with self._connections.use("discard mails") as connection:
                connection.execute(
                    f"WITH gone AS (DELETE FROM {MAILS} WHERE id = ANY(%s) AND doubt RETURNING id)"  # noqa: S608
                    f" DELETE FROM {KEYS} WHERE mail IN (SELECT id FROM gone)",
                    [prepared],
                )
        except SpoolError as error:
            log.error("%s: discarded mails may come back held: %s", ", ".join(prepared), error)

    def insert(self, cursor: psycopg.Cursor[Any], envelope: Envelope, message: bytes) -> Entry:
        """Put a mail into a transaction of the application's own: visible with its commit.

        Raises `KeyTaken`, and what the database does.
        """
        staged = [self._new(envelope, message)]
        entry = staged[0].entry
        if envelope.key:
            _take_keys(cursor, staged)
        cursor.execute(INSERT, _values(staged[0], State.QUEUED, witnessed=False))
        if envelope.key:
            _confirm_keys(cursor, [entry.id])
        give_jobs(cursor, [entry.id])
        tell(cursor, [entry.id])
        return entry

    def key_holder(self, key: str) -> str | None:
        """See `ISpool`."""
        with self._connections.use("look for a key") as connection:
            return holder_of(connection, key)

    def sweep(self) -> SweepReport:
        """See `ISpool`: hold what has been staged for long, and forget old keys."""
        held = []
        with self._connections.use("sweep") as connection:  # noqa: SIM117
            with connection.transaction():
                for witnessed, reason in ((True, ASKED), (False, IN_DOUBT)):
                    side = dump_side(Side(State.HELD, reason=reason)).decode()
                    rows = connection.execute(
                        f"UPDATE {MAILS} SET state = 'held', due = 0, side = %s WHERE id IN ("  # noqa: S608
                        f"SELECT id FROM {MAILS} WHERE {_LEFT} AND witnessed = %s"
                        " FOR UPDATE SKIP LOCKED) RETURNING id",
                        [side, DOUBT_AFTER, witnessed],
                    )
                    held += [row[0] for row in rows]
                if held:
                    connection.execute(
                        f"UPDATE {KEYS} SET until = clock_timestamp() + {_KEPT}"  # noqa: S608
                        " WHERE mail = ANY(%s) AND until IS NULL",
                        [held],
                    )
                    tell(connection, held)
                connection.execute(f"DELETE FROM {KEYS} WHERE until < clock_timestamp()")  # noqa: S608
                connection.execute(
                    f"DELETE FROM {MAILS} WHERE doubt AND state = '{ABORTED}'"  # noqa: S608
                    f" AND staged_at < clock_timestamp() - {_ABORTED_KEPT}"
                )
        return SweepReport(held=tuple(sorted(held)))

    def doubts(self) -> list[Doubt]:
        """See `ISpool`."""
        query = f"SELECT {ENTRY}, block, side FROM {MAILS} WHERE {_ASKABLE} ORDER BY id"  # noqa: S608
        with self._connections.use("look for mails in doubt") as connection:
            rows = connection.execute(query, [DOUBT_AFTER], binary=True).fetchall()
        found = (_doubt_of(entry_of(row), *row[-2:]) for row in rows)
        return [doubt for doubt in found if doubt is not None]

    def resolve(self, doubt: Doubt, verdict: Verdict) -> Record | None:
        """See `ISpool`.

        Should its process have stood still rather than died, and commit after all: what has
        aborted is kept, unseen, for a day, and `publish` finds it; and what was to be cancelled
        still shows the lease of who cancels it, until somebody else takes it.
        """
        entry = doubt.entry
        with self._connections.use(f"resolve {entry.id}") as connection:  # noqa: SIM117
            with connection.transaction():
                query = (
                    f"SELECT {ENTRY}, block, side, size FROM {MAILS}"  # noqa: S608
                    f" WHERE id = %s AND {_ASKABLE} FOR UPDATE"
                )
                row = connection.execute(query, [entry.id, DOUBT_AFTER], binary=True).fetchone()
                if row is None or _doubt_of(entry_of(row), *row[-3:-1]) != doubt:
                    return None
                record = record_of(row)
                if doubt.cancels:
                    self._decide_cancel(connection, record, load_side(row[-2]), verdict)
                else:
                    self._decide(connection, record, verdict)
                tell(connection, [entry.id])
        return record

    def _decide(self, connection: Connection, record: Record, verdict: Verdict) -> None:
        entry = record.entry
        if verdict is Verdict.COMMITTED:
            entry = names.first_entry(entry.id, record.envelope)  # due when its sender wants it
            connection.execute(
                f"UPDATE {MAILS} SET state = 'queued', due = %s, side = NULL, doubt = false"  # noqa: S608
                " WHERE id = %s",
                [entry.due, entry.id],
            )
            give_jobs(connection, [entry.id])
        elif verdict is Verdict.ABORTED:
            connection.execute(f"UPDATE {MAILS} SET state = '{ABORTED}' WHERE id = %s", [entry.id])  # noqa: S608
            connection.execute(f"DELETE FROM {KEYS} WHERE mail = %s", [entry.id])  # noqa: S608
        else:
            side = dump_side(Side(State.HELD, reason=IN_DOUBT)).decode()
            connection.execute(f"UPDATE {MAILS} SET side = %s WHERE id = %s", [side, entry.id])  # noqa: S608

    def _decide_cancel(
        self, connection: Connection, record: Record, side: Side, verdict: Verdict
    ) -> None:
        entry = record.entry
        if verdict is Verdict.UNKNOWN:
            side = replace(side, reason=CANCEL_IN_DOUBT, cancel=None)
            text = dump_side(side).decode()
            connection.execute(f"UPDATE {MAILS} SET side = %s WHERE id = %s", [text, entry.id])  # noqa: S608
            return
        # Its job may be gone, or not: the engine is told when it sees a held mail.
        if verdict is Verdict.COMMITTED:
            connection.execute(
                f"WITH mail AS (DELETE FROM {MAILS} WHERE id = %s RETURNING job) {DELETE_JOB}",  # noqa: S608
                [entry.id],
            )
            if not entry.attempts:
                connection.execute(f"DELETE FROM {KEYS} WHERE mail = %s", [entry.id])  # noqa: S608
            return
        side = side.restored()
        connection.execute(
            f"WITH mail AS (UPDATE {MAILS} SET state = %s, due = %s, side = %s, doubt = %s"  # noqa: S608
            f" WHERE id = %s RETURNING job) {DELETE_JOB}",
            [side.state.value, side.due, dump_side(side).decode(), is_in_doubt(side), entry.id],
        )
        if is_takeable(entry._replace(state=side.state, due=side.due)):
            give_jobs(connection, [entry.id])

    def left_overs(self) -> list[str]:
        """See `ISpool`."""
        query = f"SELECT id FROM {MAILS} WHERE {_LEFT}"  # noqa: S608
        with self._connections.use("look for mails in doubt") as connection:
            return [row[0] for row in connection.execute(query, [DOUBT_AFTER])]

    def close(self) -> None:
        """Forget what is staged: its transaction cannot commit any more."""
        self._closed = True
        self._staged = {
            entry_id: staged for entry_id, staged in self._staged.items() if staged.prepared
        }
        if self._generation != forks.generation():
            return
        self._ended.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        for late in self._late:
            if not self._try_to_publish(late):
                ids = ", ".join(each.entry.id for each in late)
                log.critical("committed, but in doubt in the database: %s", ids)
        self._late.clear()

    def _mine(self, entry: Entry) -> _Staged:
        staged = self._staged.get(entry.id)
        if staged is None or staged.generation != forks.generation():
            raise SpoolError(
                f"{self._connections.location}: {entry.id} was not staged by this process: a"
                " transaction commits in the process that began it"
            )
        return staged


def _doubt_of(entry: Entry, block: bytes, side: str | None) -> Doubt | None:
    try:
        return doubt_of(entry, load_side(side), parse_block(block)[0].token)
    except (DamagedSide, InvalidEnvelope):
        return None  # no token to ask with


def holder_of(executor: Executor, key: str) -> str | None:
    """Return the Message-Id of the mail that has a key, as this transaction sees it.

    Raises `KeyTaken`, see `doubts.key_in_doubt`.
    """
    query = (
        f"SELECT message_id, CASE WHEN doubt THEN side END FROM {KEYS}"  # noqa: S608
        f" LEFT JOIN {MAILS} ON mails.id = keys.mail"
        " WHERE keys.digest = %s AND until > clock_timestamp()"
    )
    row = executor.execute(query, [_digest(key)], binary=True).fetchone()
    if row is None:
        return None
    message_id, side = row
    with suppress(DamagedSide):  # nobody asks about that
        if is_asked_about(load_side(side)):
            raise key_in_doubt(key)
    return str(message_id, "utf-8", "surrogatepass")


def _take_keys(executor: Executor, staged: Sequence[_Staged]) -> None:
    """Raises `KeyTaken`; who is about to commit the same one is waited for."""
    keyed = {_digest(each.envelope.key): each for each in staged if each.envelope.key}
    # Each in the same order, else two of us could wait for each other.
    executor.execute(
        f"DELETE FROM {KEYS} WHERE digest IN (SELECT digest FROM {KEYS} WHERE digest = ANY(%s)"  # noqa: S608
        " AND until < clock_timestamp() ORDER BY digest FOR UPDATE)",
        [list(keyed)],
    )
    rows = executor.execute(
        f"INSERT INTO {KEYS} (digest, mail, message_id)"  # noqa: S608
        " SELECT * FROM unnest(%s::text[], %s::text[], %s::bytea[]) each (digest, mail, id)"
        " ORDER BY digest ON CONFLICT DO NOTHING RETURNING digest",
        [
            list(keyed),
            [each.entry.id for each in keyed.values()],
            [_encoded(each.envelope.message_id) for each in keyed.values()],
        ],
    ).fetchall()
    taken = {row[0] for row in rows}
    for each in staged:
        key = each.envelope.key
        if key and (_digest(key) not in taken or keyed[_digest(key)] is not each):
            raise KeyTaken(
                f"idempotency_key={key!r}: another transaction has committed it, or is about to;"
                " begin again, and send returns its Message-Id"
            )


def _encoded(message_id: str) -> bytes:
    return message_id.encode("utf-8", "surrogatepass")


def _confirm_keys(executor: Executor, ids: Sequence[str]) -> None:
    executor.execute(
        f"UPDATE {KEYS} SET until = greatest(clock_timestamp(), to_timestamp(mails.due))"  # noqa: S608
        f" + {_KEPT} FROM {MAILS} WHERE mails.id = keys.mail AND keys.mail = ANY(%s)",
        [list(ids)],
    )


def _insert(
    connection: Connection, staged: Sequence[_Staged], *, state: str, witnessed: bool
) -> None:
    rows = [_values(each, state, witnessed=witnessed) for each in staged]
    if len(rows) == 1:
        connection.execute(INSERT, rows[0])
        return
    with connection.cursor() as cursor, cursor.copy(COPY) as copy:
        copy.set_types(COPY_TYPES)
        for row in rows:
            copy.write_row(row)


def _values(staged: _Staged, state: str, *, witnessed: bool) -> list[Any]:
    entry, size = staged.entry, len(staged.message)
    return [
        *(entry.id, entry.lane, state, entry.due, entry.attempts, entry.priority, entry.expires),
        *(digest(staged.envelope.message_id), staged.block, staged.message, size),
        *(state in (STAGED, ABORTED), witnessed),
    ]


def _digest(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
