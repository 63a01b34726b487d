"""The journal's events as a table: what all hosts did, in one place.

Written as the Maildir's journal is, in batches by a thread (`journal`).  A crash of the server
may take the last moments of it: nothing waits for the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ..errors import SpoolError
from ..journal_file import Event
from .connections import Connections
from .engine import LOG, SCHEMA

EVENTS: Final = f"{SCHEMA}.events"
_COLUMNS: Final = "at, kind, entry, message_id, mailbox, sender, recipient, attempt, reply, relay"
_NEWEST: Final = "ORDER BY at DESC, id DESC LIMIT %(limit)s"
_BY_MESSAGE_ID: Final = f"SELECT {_COLUMNS} FROM {EVENTS} WHERE message_id = %(key)s {_NEWEST}"  # noqa: S608
_BY_ADDRESS: Final = f"""
SELECT {_COLUMNS} FROM (
    (SELECT * FROM {EVENTS} WHERE lower(sender) = lower(%(key)s) {_NEWEST}) UNION
    (SELECT * FROM {EVENTS} WHERE lower(recipient) = lower(%(key)s) {_NEWEST})
) found {_NEWEST}"""  # noqa: S608
_INSERT: Final = f"""
INSERT INTO {EVENTS} ({_COLUMNS}) SELECT * FROM unnest(
    %s::float8[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[], %s::text[],
    %s::int[], %s::text[], %s::text[])"""  # noqa: S608
_GROUPS: Final = ("mailbox", "relay")
_MOST_ATTEMPTS: Final = 2**31 - 1


class EventTable:
    """See `journal.EventStore`.  Raises `SpoolError`."""

    errors: Final = (SpoolError,)

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def write(self, events: Sequence[Event]) -> None:
        """Write all events, or none; an event that is none is left out."""
        rows = [row for event in events if (row := _clean(event)) is not None]
        if not rows:
            return
        with self._connections.use("write the journal") as connection:  # noqa: SIM117
            with connection.transaction():
                connection.execute("SET LOCAL synchronous_commit = off")
                connection.execute(_INSERT, [list(column) for column in zip(*rows, strict=True)])

    def prune(self, before: float, most: int) -> int:
        """Remove at most so many of the events before a time; return how many.

        And the engine's own log, which nobody reads.
        """
        with self._connections.use("prune the journal") as connection:
            connection.execute(f"DELETE FROM {LOG} WHERE created < now() - interval '1 day'")  # noqa: S608
            return connection.execute(
                f"DELETE FROM {EVENTS} WHERE id IN"  # noqa: S608
                f" (SELECT id FROM {EVENTS} WHERE at < %s LIMIT %s)",
                [before, most],
            ).rowcount

    def close(self) -> None:
        """Nothing is kept: the connections are the outbox's."""

    def find(self, *, message_id: str | None, address: str | None, limit: int) -> list[Event]:
        """Return the newest events of a Message-Id or of an address, the oldest first."""
        query, key = (_BY_ADDRESS, address) if message_id is None else (_BY_MESSAGE_ID, message_id)
        rows = self._query(query, {"key": _text(key), "limit": limit})
        return [Event(*row) for row in reversed(rows)]

    def count(self, since: float) -> dict[str, int]:
        """Return how many events of each kind there were since a time."""
        query = f"SELECT kind, count(*) FROM {EVENTS} WHERE at >= %(since)s GROUP BY kind"  # noqa: S608
        return dict(self._query(query, {"since": since}))

    def totals(self, since: float, *, by: str) -> list[tuple[str, str, int]]:
        """Return (mailbox or relay, kind, number of events) since a time."""
        if by not in _GROUPS:
            raise KeyError(by)
        query = f"SELECT {by}, kind, count(*) FROM {EVENTS} WHERE at >= %(since)s GROUP BY 1, 2"  # noqa: S608
        return self._query(query, {"since": since})

    def series(self, since: float, step: float) -> list[tuple[int, str, int]]:
        """Return (number of the step, kind, number of events) since a time, step by step."""
        query = (
            "SELECT trunc((at - %(since)s) / %(step)s)::bigint, kind, count(*)"  # noqa: S608
            f" FROM {EVENTS} WHERE at >= %(since)s GROUP BY 1, 2 ORDER BY 1"
        )
        return self._query(query, {"since": since, "step": step})

    def _query(self, query: str, values: dict[str, Any]) -> list[Any]:
        with self._connections.use("read the journal") as connection:
            return connection.execute(query, values).fetchall()


def _clean(event: Event) -> list[Any] | None:
    """Return an event with values that the database takes, or None."""
    try:
        at, attempt = float(event.at), min(int(event.attempt), _MOST_ATTEMPTS)
    except (TypeError, ValueError, OverflowError):
        return None
    texts = [_text(each) for each in event[1:7]]
    return [at, *texts, attempt, _text(event.reply), _text(event.relay)]


def _text(value: object) -> str:
    """Return a text without what PostgreSQL has no place for: NUL, halves of characters."""
    return str(value).replace("\0", "\\x00").encode("utf-8", "backslashreplace").decode()
