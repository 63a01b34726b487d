"""Mails that come from another spool, until they are admitted: rows that nobody sees."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

from zope.interface import implementer

from ..envelope import digest, format_block
from ..interfaces import ITransit, KeyNote, Record
from ..spool import names
from ..spool.doubts import is_in_doubt
from ..spool.outcomes import Side, dump_side
from .connections import Connections
from .functions import give_jobs, tell
from .mails import ARRIVING, ENTRY, KEYS, MAILS, entry_of, is_takeable
from .schema import place_of

_ARRIVE: Final = f"""
INSERT INTO {MAILS} ({ENTRY}, digest, block, message, size, doubt, witnessed, side, next_state,
    origin)
VALUES (%s, %s, '{ARRIVING}', %s, %s, %s, %s, %s, %b, %b, %s, %s, %s, %s, %s, %s)
ON CONFLICT (id) DO NOTHING RETURNING id"""  # noqa: S608

_ADMIT: Final = f"""
UPDATE {MAILS} SET state = next_state, next_state = NULL, origin = NULL,
    settled_at = clock_timestamp()
WHERE id = ANY(%s) AND state = '{ARRIVING}' RETURNING {ENTRY}"""  # noqa: S608

_DISMISS: Final = f"DELETE FROM {MAILS} WHERE id = ANY(%s) AND state = '{ARRIVING}'"  # noqa: S608

_PAGE: Final = 5_000


@implementer(ITransit)
class Transit:
    """See `ITransit`."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def place(self) -> tuple[object, ...]:
        """See `ITransit`."""
        with self._connections.use("look which outbox this is") as connection:
            return place_of(connection)

    def arrive(self, mails: Sequence[tuple[Record, bytes]], origin: str) -> Collection[str]:
        """See `ITransit`."""
        taken: list[str] = []
        with self._connections.use("keep mails that arrive") as connection:  # noqa: SIM117
            with connection.transaction():
                connection.execute(_DISMISS, [[record.entry.id for record, _ in mails]])
                for record, message in mails:
                    row = connection.execute(
                        _ARRIVE, [*_values(record, message), origin]
                    ).fetchone()
                    taken += row or ()
        return taken

    def arrived(self, origin: str) -> Collection[str]:
        """See `ITransit`."""
        query = f"SELECT id FROM {MAILS} WHERE state = '{ARRIVING}' AND origin = %s"  # noqa: S608
        with self._connections.use("look for mails that arrive") as connection:
            return [row[0] for row in connection.execute(query, [origin])]

    def admit(self, ids: Collection[str]) -> None:
        """See `ITransit`."""
        with self._connections.use("admit mails") as connection, connection.transaction():
            rows = connection.execute(_ADMIT, [list(ids)]).fetchall()
            entries = [entry_of(row) for row in rows]
            give_jobs(connection, [entry.id for entry in entries if is_takeable(entry)])
            tell(connection, [entry.id for entry in entries])

    def dismiss(self, ids: Collection[str]) -> None:
        """See `ITransit`."""
        with self._connections.use("forget mails that arrived") as connection:
            connection.execute(_DISMISS, [list(ids)])

    def close(self) -> None:
        """See `ITransit`: of several at once each has other mails, by their leases."""

    def key_notes(self) -> Iterator[KeyNote]:
        """See `ITransit`."""
        after = ""
        query = (
            f"SELECT digest, mail, message_id, extract(epoch FROM until)::float8 FROM {KEYS}"  # noqa: S608
            f" WHERE digest > %s AND until > clock_timestamp() ORDER BY digest LIMIT {_PAGE}"
        )
        while True:
            with self._connections.use("list the keys") as connection:
                page = connection.execute(query, [after], binary=True).fetchall()
            for key, mail, message_id, until in page:
                yield KeyNote(key, mail, message_id.decode("utf-8", "surrogatepass"), until)
            if len(page) < _PAGE:
                return
            after = page[-1][0]

    def keep_keys(self, notes: Iterable[KeyNote]) -> None:
        """See `ITransit`."""
        query = (
            f"INSERT INTO {KEYS} (digest, mail, message_id, until)"  # noqa: S608
            " VALUES (%s, %s, %b, to_timestamp(%s)) ON CONFLICT DO NOTHING"
        )
        values = [
            [note.digest, note.entry, note.message_id.encode("utf-8", "surrogatepass"), note.until]
            for note in notes
        ]
        if values:
            with self._connections.use("keep keys") as connection, connection.transaction():  # noqa: SIM117
                with connection.cursor() as cursor:
                    cursor.executemany(query, values)


def _values(record: Record, message: bytes) -> list[object]:
    entry, envelope = names.normal(record.entry), record.envelope
    known = Side(
        *(entry.state, entry.due, entry.attempts),
        *(record.reason, record.outcomes, record.cancel),
    )
    trivial = known == Side(entry.state, entry.due)
    side = None if trivial else dump_side(known).decode()
    doubt = is_in_doubt(known)
    return [
        *(entry.id, entry.lane, entry.due, entry.attempts, entry.priority, entry.expires),
        *(digest(envelope.message_id), format_block(envelope), message, len(message)),
        *(doubt, doubt, side, entry.state.value),
    ]
