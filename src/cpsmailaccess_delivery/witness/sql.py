"""The witness of an SQL database: a table with one column, written by the application's own
transaction.

::

    CREATE TABLE cpsmail_transactions (token VARCHAR(60) PRIMARY KEY)

    follow   before the commit, the token is inserted on the application's connection, and the
             rows of this process's earlier transactions, which have ended, are removed
    ask      inserts the token on a connection of its own, and takes it back: refused as a
             duplicate, the transaction has committed.  One that is still ending is waited for
             by the database itself

The table has a row for each thread that commits, and one for each crash.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, Final

from zope.interface import implementer

from ..datamanager import TOKEN_NAME
from ..interfaces import ITransactionWitness, Verdict

_TABLE: Final = "cpsmail_transactions"
_PLACEHOLDERS: Final = {
    "qmark": "?",
    "format": "%s",
    "pyformat": "%s",
    "numeric": ":1",
    "named": ":1",
}
_MOST: Final = 100  # rows removed by one transaction


@implementer(ITransactionWitness)
class SQLWitness:
    """See `ITransactionWitness`.

    `connect`: returns a new DB-API connection to the database (``engine.raw_connection`` of
    SQLAlchemy, ``lambda: psycopg.connect(dsn)``); `placeholder`: ``?`` or ``%s``, where the
    connection does not tell of which driver it is.  Makes the table when it is missing.  Raises
    ValueError, and what the driver does.
    """

    def __init__(self, connect: Callable[[], Any], *, placeholder: str | None = None) -> None:
        self._connect = connect
        self._ended: list[str] = []  # tokens whose row nobody needs any more
        self._lock = threading.Lock()
        with closing(connect()) as connection:
            mark = placeholder or _placeholder_of(connection)
            self._insert = f"INSERT INTO {_TABLE} (token) VALUES ({mark})"  # noqa: S608
            self._delete = f"DELETE FROM {_TABLE} WHERE token = {mark}"  # noqa: S608
            connection.cursor().execute(
                f"CREATE TABLE IF NOT EXISTS {_TABLE} (token VARCHAR(60) PRIMARY KEY)"
            )
            connection.commit()

    def follow(self, transaction: Any, execute: Callable[[str, tuple[str, ...]], object]) -> None:
        """Let this transaction leave its trace.  Call it once, anywhere in the transaction.

        `execute`: runs a statement on the connection whose work this transaction commits;
        called just before that, and only when the transaction changes the outbox.
        """
        transaction.addBeforeCommitHook(self._write, (transaction, execute))

    def follow_session(self, transaction: Any, session: Any) -> None:
        """Do the same for a session of SQLAlchemy that `zope.sqlalchemy` has joined to it."""
        from zope.sqlalchemy import mark_changed

        def execute(statement: str, values: tuple[str, ...]) -> None:
            session.connection().exec_driver_sql(statement, values)
            # Else it is rolled back as one that has only read.
            mark_changed(session, transaction_manager=_Manager(transaction))

        self.follow(transaction, execute)

    def mark(self, transaction: Any) -> str:
        """See `ITransactionWitness`."""
        return ""

    def expects(self, transaction: Any) -> bool:
        """See `ITransactionWitness`."""
        try:
            return bool(transaction.data(self))
        except KeyError:
            return False  # nobody has called `follow`

    def ask(self, tokens: Sequence[str]) -> Mapping[str, Verdict]:
        """See `ITransactionWitness`."""
        verdicts = {}
        with closing(self._connect()) as connection:
            for token in tokens:
                try:
                    connection.cursor().execute(self._insert, (token,))
                    verdicts[token] = Verdict.ABORTED
                except connection.IntegrityError:
                    verdicts[token] = Verdict.COMMITTED
                finally:
                    connection.rollback()
        return verdicts

    def _write(self, transaction: Any, execute: Callable[[str, tuple[str, ...]], object]) -> None:
        token = transaction.extension.get(TOKEN_NAME)
        if not token:
            return
        with self._lock:
            ended = self._ended[:_MOST]
            del self._ended[:_MOST]
        for other in ended:
            execute(self._delete, (other,))
        execute(self._insert, (token,))
        transaction.set_data(self, token)
        transaction.addAfterCommitHook(self._after, (token, ended))

    def _after(self, committed: bool, token: str, removed: list[str]) -> None:
        with self._lock:
            self._ended += [token] if committed else removed


def _placeholder_of(connection: Any) -> str:
    """Return how a parameter is written for the driver of a connection (PEP 249, paramstyle)."""
    driver = getattr(connection, "driver_connection", connection)  # of one of SQLAlchemy's
    name = type(driver).__module__.partition(".")[0]
    try:
        return _PLACEHOLDERS[getattr(sys.modules.get(name), "paramstyle", "")]
    except KeyError:
        raise ValueError(
            f"SQLWitness: a connection of {name} does not tell how its driver writes parameters:"
            ' say placeholder="?" or placeholder="%s"'
        ) from None


class _Manager:
    """A transaction manager with one transaction, for `mark_changed`."""

    def __init__(self, transaction: Any) -> None:
        self._transaction = transaction

    def get(self) -> Any:
        return self._transaction
