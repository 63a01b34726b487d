"""Mails in a transaction of the application's own, where its database is the outbox's.

The database commits both or neither: there is no vote, no finish, and nothing can be in doubt.
"""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.rows import tuple_row

from ..envelope import Envelope
from ..errors import InvalidSettings
from ..interfaces import Entry
from .connections import Connection, Connections
from .staging import Staging, holder_of


class Inside:
    """What `send` needs of a spool; `connection`: of psycopg 3, or a session or connection of
    SQLAlchemy on that driver.  Raises `InvalidSettings`.
    """

    def __init__(self, connections: Connections, staging: Staging, connection: Any) -> None:
        self.location = connections.location
        self._connections = connections
        self._staging = staging
        self._connection = _driver_connection(connection)

    def stage(self, envelope: Envelope, message: bytes) -> Entry:
        """Put a mail into the transaction.  Raises `SpoolError`, `KeyTaken`."""
        connection = self._connection
        idle = psycopg.pq.TransactionStatus.IDLE
        if connection.autocommit and connection.info.transaction_status == idle:
            raise InvalidSettings(
                "within: the connection is in autocommit mode, and in no transaction: the mail"
                " would be committed at once: open one with `with connection.transaction():`"
            )
        try:
            return self._staging.insert(self._cursor(), envelope, message)
        except psycopg.Error as error:
            raise self._connections.error("put a mail into the transaction", error) from error

    def key_holder(self, key: str) -> str | None:
        """See `ISpool`.  The transaction's own mails have theirs, too."""
        try:
            own = holder_of(self._cursor(), key)
        except psycopg.Error as error:
            raise self._connections.error("look for a key", error) from error
        return own or self._staging.key_holder(key)

    def _cursor(self) -> psycopg.Cursor[Any]:
        """Return a cursor of our kind, whatever kind the connection makes."""
        return psycopg.Cursor(self._connection, row_factory=tuple_row)


def _driver_connection(connection: Any) -> Connection:
    if not isinstance(connection, psycopg.Connection) and hasattr(connection, "get_bind"):
        connection = connection.connection()  # of a session
    if not isinstance(connection, psycopg.Connection):
        connection = getattr(connection, "connection", connection)  # of SQLAlchemy's connection
        connection = getattr(connection, "driver_connection", connection)
    if not isinstance(connection, psycopg.Connection):
        raise InvalidSettings(
            f"within: {type(connection).__name__} is no connection of psycopg 3, nor one of"
            " SQLAlchemy on that driver (postgresql+psycopg://)"
        )
    return connection
