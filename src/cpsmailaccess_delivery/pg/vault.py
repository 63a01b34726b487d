"""The accounts as a table: the same sealed bytes as in the files of the vault.

All hosts need the same key: see `key`.  It is never made here, since the one that a host would
make opens nothing on another.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn

from zope.interface import implementer

from ..account import Account
from ..envelope import digest
from ..errors import SpoolError, VaultError
from ..interfaces import Entry, IAccountStore, Verdict
from ..key import KeySource
from ..seal import is_deletion, staged_mailbox
from ..spool import forks
from .connections import Connection, Connections
from .engine import SCHEMA
from .sealed import PUBLISHED, SealedAccounts
from .staging import DOUBT_AFTER
from .watch import Watch

log = logging.getLogger(__name__)

ACCOUNTS: Final = f"{SCHEMA}.accounts"
CHANGES: Final = f"{SCHEMA}.account_changes"
CHANNEL: Final = "cpsmail_accounts"


#: Which changes somebody has left between vote and finish.
_LEFT: Final = "staged_at < clock_timestamp() - make_interval(secs => %s)"


class _Staged(NamedTuple):
    data: bytes
    transaction: str
    generation: int


@implementer(IAccountStore)
class PostgresVault(SealedAccounts):
    """See `IAccountStore`."""

    def __init__(self, connections: Connections, key: KeySource) -> None:
        super().__init__(f"{connections.location} ({ACCOUNTS})", key)
        self._connections = connections
        self._staged: dict[str, _Staged] = {}

    def stage(self, mailbox: str, account: Account | None, transaction: str = "") -> str:
        """See `IAccountStore`.  Raises `VaultError`, `WrongKey`."""
        data = self.sealed(mailbox, account)
        token = f"{digest(mailbox)}-{secrets.token_hex(8)}"
        self._staged[token] = _Staged(data, transaction, forks.generation())
        return token

    def prepare(self, tokens: Sequence[str], *, witnessed: bool = False) -> None:
        """See `IAccountStore`.  Raises `VaultError`."""
        rows = [(token, self._mine(token)) for token in tokens]
        try:
            with self._connections.use("make changes of accounts durable") as connection:
                with connection.transaction():
                    for token, staged in rows:
                        connection.execute(
                            f"INSERT INTO {CHANGES} (token, data, transaction, witnessed)"
                            " VALUES (%s, %b, %s, %s)",
                            [token, staged.data, staged.transaction, witnessed],
                        )
        except SpoolError as error:
            raise VaultError(str(error)) from error

    def publish(self, tokens: Sequence[str]) -> None:
        """See `IAccountStore`."""
        changes = []
        for token in tokens:
            staged = self._staged.pop(token, None)
            if staged is None or staged.generation != forks.generation():
                log.critical("%s was staged by another process: a fork?  Not published", token)
            else:
                changes.append((token, staged.data))
        for last in (False, True):
            try:
                self._publish(changes)
                return
            except SpoolError as error:
                if last:
                    log.error(
                        "changes of accounts were committed but are not in use: %s: put them again",
                        error,
                    )
                else:
                    log.warning("%s; trying once more", error)

    def _publish(self, changes: Sequence[tuple[str, bytes]]) -> None:
        with self._connections.use("publish changes of accounts") as connection:
            with connection.transaction():
                for token, data in changes:
                    _put_in_place(connection, token, data)

    def discard(self, tokens: Sequence[str]) -> None:
        """See `IAccountStore`."""
        mine = []
        for token in tokens:
            staged = self._staged.pop(token, None)
            if staged is not None and staged.generation == forks.generation():
                mine.append(token)
        if not mine:
            return
        try:
            with self._connections.use("discard changes of accounts") as connection:
                connection.execute(f"DELETE FROM {CHANGES} WHERE token = ANY(%s)", [mine])
        except SpoolError as error:
            log.error("%s", error)  # `sweep` removes them

    def sweep(self) -> tuple[str, ...]:
        """See `IAccountStore`: what was staged for long, nobody publishes any more."""
        query = f"DELETE FROM {CHANGES} WHERE {_LEFT} AND NOT witnessed RETURNING token, data"
        with self._connections.use("sweep the accounts") as connection:
            rows = connection.execute(query, [DOUBT_AFTER], binary=True).fetchall()
        return tuple(staged_mailbox(data) or f"(unreadable: {token})" for token, data in rows)

    def left_overs(self) -> Sequence[str]:
        """See `IAccountStore`."""
        query = f"SELECT token FROM {CHANGES} WHERE {_LEFT}"
        with self._connections.use("look for changes of accounts") as connection:
            return [row[0] for row in connection.execute(query, [DOUBT_AFTER])]

    def doubts(self) -> list[tuple[str, str]]:
        """See `IAccountStore`."""
        query = (
            f"SELECT token, transaction FROM {CHANGES} WHERE {_LEFT} AND witnessed"
            " ORDER BY staged_at, token"
        )
        with self._connections.use("look for changes in doubt") as connection:
            return connection.execute(query, [DOUBT_AFTER]).fetchall()

    def resolve(self, change: str, verdict: Verdict) -> str:
        """See `IAccountStore`.  Raises `SpoolError`."""
        with self._connections.use(f"resolve {change}") as connection:
            with connection.transaction():
                query = f"DELETE FROM {CHANGES} WHERE token = %s RETURNING data, staged_at"
                row = connection.execute(query, [change], binary=True).fetchone()
                if row is None:
                    return ""
                data, staged_at = row
                later = connection.execute(
                    f"SELECT 1 FROM {ACCOUNTS} WHERE name = %s AND changed_at > %s",
                    [_name(change), staged_at],
                ).fetchone()
                if verdict is Verdict.COMMITTED and later is None:
                    _put_in_place(connection, change, data)
        return staged_mailbox(data) or f"(unreadable: {change})"

    def locked(self) -> NoReturn:
        """Raises `VaultError`: `rekey` knows directories only."""
        raise VaultError(
            f"{self.location}: the key cannot be changed here: give all hosts the new key, and put"
            " the accounts again with their passwords"
        )

    def watch(self) -> Watch:
        """See `IAccountStore`.  Raises `SpoolError`."""
        return Watch(self._connections, CHANNEL, _something)

    def _mine(self, token: str) -> _Staged:
        staged = self._staged.get(token)
        if staged is None or staged.generation != forks.generation():
            raise VaultError(
                f"{self.location}: {token} was not staged by this process: a transaction commits"
                " in the process that began it"
            )
        return staged

    def _names(self) -> list[str]:
        try:
            with self._connections.use("list the accounts") as connection:
                return [row[0] for row in connection.execute(f"SELECT name FROM {ACCOUNTS}")]
        except SpoolError as error:
            raise VaultError(str(error)) from error

    def _data(self, name: str, mailbox: str) -> bytes | None:
        query = f"SELECT data FROM {ACCOUNTS} WHERE name = %s"
        try:
            with self._connections.use(f"read the account {mailbox or name}") as connection:
                row = connection.execute(query, [name], binary=True).fetchone()
        except SpoolError as error:
            raise VaultError(str(error)) from error
        return row[0] if row else None

    def _path(self, name: str) -> str:
        return f"{self._connections.location}: {ACCOUNTS} {name}"


def _put_in_place(connection: Connection, token: str, data: bytes) -> None:
    connection.execute(f"DELETE FROM {CHANGES} WHERE token = %s", [token])
    if is_deletion(data):
        connection.execute(f"DELETE FROM {ACCOUNTS} WHERE name = %s", [_name(token)])
    else:
        connection.execute(
            f"INSERT INTO {ACCOUNTS} (name, data) VALUES (%s, %b) ON CONFLICT (name)"
            " DO UPDATE SET data = excluded.data, changed_at = clock_timestamp()",
            [_name(token), data],
        )
    connection.execute("SELECT pg_notify(%s, '')", [CHANNEL])


def _name(token: str) -> str:
    return token.partition("-")[0] + PUBLISHED


def _something(connection: Connection, payloads: list[str]) -> list[Entry] | None:
    return None
