"""Mails in a transaction of the application's own, where its database is the outbox's.

The database commits both or neither: there is no vote, no finish, and nothing can be in doubt.
"""

from __future__ import annotations

import weakref
from typing import Any

import psycopg
from psycopg import errors
from psycopg.rows import tuple_row

from ..envelope import Envelope
from ..errors import InvalidSettings
from ..interfaces import Entry
from .connections import Connection, Connections
from .schema import place_of
from .staging import Staging, holder_of


class Home:
    """Tells whether connections lead to the database of the outbox; asks each of them once."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._place: tuple[object, ...] = ()
        self._known: weakref.WeakSet[Connection] = weakref.WeakSet()

    def check(self, connection: Connection) -> None:
        """Raises `InvalidSettings`, `SpoolError`, and what the database does."""
        if connection in self._known:
            return
        try:
            there = place_of(connection)
        except (errors.UndefinedTable, errors.InvalidSchemaName):
            there = ()
        if not there or there != self._place:
            with self._connections.use("look which outbox this is") as own:
                self._place = place_of(own)  # again: it may have been put back elsewhere
        if there != self._place:
            info = connection.info
            raise InvalidSettings(
                f"within: the connection leads to the database {info.dbname!r} at"
                f" {info.host}:{info.port}, which is not the one of {self._connections.location}:"
                " the mail would be queued there or nowhere: connect to the same, or make an"
                " Outbox of that database"
            )
        self._known.add(connection)


class Inside:
    """What `send` needs of a spool; `connection`: of psycopg 3, or a session or connection of
    SQLAlchemy on that driver.  Raises `InvalidSettings`.
    """

    def __init__(
        self, connections: Connections, home: Home, staging: Staging, connection: Any
    ) -> None:
        self.location = connections.location
        self._connections = connections
        self._home = home
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
        self._home.check(self._connection)
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
