"""The accounts as a table: the same sealed bytes as in the files of the vault.

All hosts need the same key: see `key`.  It is never made here, since the one that a host would
make opens nothing on another.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Final, NamedTuple

from zope.interface import implementer

from ..account import Account
from ..envelope import digest
from ..errors import SpoolError, VaultError, VaultUnreachable, WrongKey
from ..interfaces import Entry, IAccountStore, Verdict
from ..key import Key, KeySource
from ..register import Page, Unusable
from ..seal import is_deletion, seal, staged_mailbox
from ..sealed import PUBLISHED, SealedAccounts, parsed, version_of
from ..spool import forks
from .connections import Connection, Connections
from .engine import SCHEMA
from .register import RegisterTable
from .staging import DOUBT_AFTER
from .watch import Watch

log = logging.getLogger(__name__)

ACCOUNTS: Final = f"{SCHEMA}.accounts"
CHANGES: Final = f"{SCHEMA}.account_changes"
CHANNEL: Final = "cpsmail_accounts"


#: Which changes somebody has left between vote and finish.
_LEFT: Final = "staged_at < clock_timestamp() - make_interval(secs => %s)"


#: Seconds for which an account that was read ahead is good: as long as a session lives idle.
_AHEAD: Final = 10.0


class _Staged(NamedTuple):
    data: bytes
    transaction: str
    generation: int


class _Ahead(NamedTuple):
    account: Account
    version: str
    read_at: float  # monotonic


@implementer(IAccountStore)
class PostgresVault(SealedAccounts):
    """See `IAccountStore`."""

    def __init__(self, connections: Connections, key: KeySource) -> None:
        super().__init__(f"{connections.location} ({ACCOUNTS})", key)
        self._connections = connections
        self._register = RegisterTable()
        self._staged: dict[str, _Staged] = {}
        self._ahead: dict[str, _Ahead] = {}  # by mailbox
        self._told = 0  # how often somebody was told that accounts have changed

    def stage(self, mailbox: str, account: Account | None, transaction: str = "") -> str:
        """See `IAccountStore`.  Raises `VaultError`, `WrongKey`."""
        if account is not None and account.mailbox != mailbox:
            raise ValueError(f"the account of {account.mailbox} cannot be put as {mailbox}")
        data = self._sealed(mailbox, account)
        token = f"{digest(mailbox)}-{secrets.token_hex(8)}"
        self._staged[token] = _Staged(data, transaction, forks.generation())
        return token

    def prepare(self, tokens: Sequence[str], *, witnessed: bool = False) -> None:
        """See `IAccountStore`.  Raises `VaultError`."""
        rows = [(token, self._mine(token)) for token in tokens]
        keys = {key.id: key for key in self._keys.known()}
        for key in keys.values():
            self._page(key)  # what could fail in `publish` fails here
        with self._use("make changes of accounts durable") as connection:  # noqa: SIM117
            with connection.transaction():
                for token, staged in rows:
                    stored = parsed(staged.data)
                    if stored is not None and stored.key_id not in keys:
                        raise WrongKey(
                            f"the key {stored.key_id:.16} was changed meanwhile: put the account"
                            " again"
                        )
                    connection.execute(
                        f"INSERT INTO {CHANGES} (token, data, transaction, witnessed)"  # noqa: S608
                        " VALUES (%s, %b, %s, %s)",
                        [token, staged.data, staged.transaction, witnessed],
                    )

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
            except VaultError as error:
                if last:
                    log.error(
                        "changes of accounts were committed but are not in use: %s: put them again",
                        error,
                    )
                else:
                    log.warning("%s; trying once more", error)

    def _publish(self, changes: Sequence[tuple[str, bytes]]) -> None:
        with self._use("publish changes of accounts") as connection, connection.transaction():
            self._register.lock(connection)
            self._put_in_place(connection, changes)

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
                connection.execute(f"DELETE FROM {CHANGES} WHERE token = ANY(%s)", [mine])  # noqa: S608
        except SpoolError as error:
            log.error("%s", error)  # `sweep` removes them

    def sweep(self) -> tuple[str, ...]:
        """See `IAccountStore`: what was staged for long, nobody publishes any more."""
        query = f"DELETE FROM {CHANGES} WHERE {_LEFT} AND NOT witnessed RETURNING token, data"  # noqa: S608
        with self._connections.use("sweep the accounts") as connection:
            rows = connection.execute(query, [DOUBT_AFTER], binary=True).fetchall()
        return tuple(staged_mailbox(data) or f"(unreadable: {token})" for token, data in rows)

    def left_overs(self) -> Sequence[str]:
        """See `IAccountStore`."""
        query = f"SELECT token FROM {CHANGES} WHERE {_LEFT}"  # noqa: S608
        with self._connections.use("look for changes of accounts") as connection:
            return [row[0] for row in connection.execute(query, [DOUBT_AFTER])]

    def doubts(self) -> list[tuple[str, str]]:
        """See `IAccountStore`."""
        query = (
            f"SELECT token, transaction FROM {CHANGES} WHERE {_LEFT} AND witnessed"  # noqa: S608
            " ORDER BY staged_at, token"
        )
        with self._connections.use("look for changes in doubt") as connection:
            return connection.execute(query, [DOUBT_AFTER]).fetchall()

    def resolve(self, change: str, verdict: Verdict) -> str:
        """See `IAccountStore`.  Raises `VaultError`."""
        with self._use(f"resolve {change}") as connection:  # noqa: SIM117
            with connection.transaction():
                self._register.lock(connection)
                query = f"DELETE FROM {CHANGES} WHERE token = %s RETURNING data, staged_at"  # noqa: S608
                row = connection.execute(query, [change], binary=True).fetchone()
                if row is None:
                    return ""
                data, staged_at = row
                later = connection.execute(
                    f"SELECT 1 FROM {ACCOUNTS} WHERE name = %s AND changed_at > %s",  # noqa: S608
                    [_name(change), staged_at],
                ).fetchone()
                if verdict is Verdict.COMMITTED and later is None:
                    self._put_in_place(connection, [(change, data)])
        return staged_mailbox(data) or f"(unreadable: {change})"

    # Another key: see `rekey`

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Return the lock under which accounts are changed.  Raises `VaultError`."""
        with self._use("lock the accounts") as connection, connection.transaction():
            self._register.lock(connection)
            yield

    def reseal(self, most: int = 100) -> int:
        """Seal some accounts anew that the current key does not open; return how many.

        0: there are no more.  Raises `VaultError`.
        """
        key = self._current_key()
        with self._use("seal accounts anew") as connection, connection.transaction():
            self._register.lock(connection)
            names = []
            for name, data in _rows(connection, ACCOUNTS, "name"):
                stored = self._parse(name, "", data)
                if stored.key_id != key.id:
                    new = seal(self._open(stored), key)
                    # Put when it was put: a change in doubt may be older.
                    query = f"UPDATE {ACCOUNTS} SET data = %b WHERE name = %s"  # noqa: S608
                    connection.execute(query, [new, name])
                    names.append(name)
                if len(names) == most:
                    break
            if names:
                self._list(connection, names)
                connection.execute("SELECT pg_notify(%s, '')", [CHANNEL])
        return len(names)

    def needs(self, key: Key) -> int:
        """Return how many accounts, and changes under way, are sealed with a key.

        Under the lock: a change that is published meanwhile would be seen in neither place.
        Raises `VaultError`.
        """
        with self._use("look for a key's accounts") as connection, connection.transaction():
            self._register.lock(connection)
            rows = [*_rows(connection, ACCOUNTS, "name"), *_rows(connection, CHANGES, "token")]
        found = [parsed(data) for _, data in rows]
        return sum(stored is not None and stored.key_id == key.id for stored in found)

    def forget(self, key: Key) -> None:
        """Forget what is known of a key that nothing needs any more.  Raises `VaultError`."""
        with self._use("remove the former register") as connection:
            self._register.forget(connection, key)

    def watch(self) -> Watch:
        """See `IAccountStore`.  Raises `SpoolError`."""
        return _Watch(self._connections, self._forget_ahead)

    # Many at once, for who is told of changes

    def read_ahead(self, mailboxes: Collection[str]) -> None:
        """Read accounts that are needed soon: `current` gives each of them once.

        Not after a change that our watch has told of; nor much later, should it tell nothing.
        """
        told, now = self._told, time.monotonic()
        names = [digest(mailbox) + PUBLISHED for mailbox in mailboxes]
        query = f"SELECT name, data FROM {ACCOUNTS} WHERE name = ANY(%s)"  # noqa: S608
        found = {}
        try:
            with self._use("read accounts") as connection:
                rows = connection.execute(query, [names], binary=True).fetchall()
            page_of = cache(self._page)
            for name, data in rows:
                account = self._open(self._parse(name, "", data), page_of)
                found[account.mailbox] = _Ahead(account, version_of(data), now)
        except VaultError as error:  # who needs it is told
            log.debug("not read ahead: %s", error)
        ahead = {m: each for m, each in self._ahead.copy().items() if now - each.read_at < _AHEAD}
        self._ahead = {**ahead, **found}
        if told != self._told:  # after what we have read, perhaps
            self._ahead = {}

    def current(self, mailbox: str) -> tuple[str, Account]:
        """See `IAccountStore`, and `read_ahead`."""
        ahead = self._ahead.pop(mailbox, None)
        if ahead is not None and time.monotonic() - ahead.read_at < _AHEAD:
            return ahead.version, ahead.account
        return super().current(mailbox)

    def _forget_ahead(self) -> None:
        self._told += 1
        self._ahead = {}

    @contextmanager
    def _use(self, action: str) -> Iterator[Connection]:
        """Lend a connection.  Raises `VaultUnreachable` for what the database does."""
        try:
            with self._connections.use(action) as connection:
                yield connection
        except SpoolError as error:
            raise VaultUnreachable(str(error)) from error

    def _mine(self, token: str) -> _Staged:
        staged = self._staged.get(token)
        if staged is None or staged.generation != forks.generation():
            raise VaultError(
                f"{self.location}: {token} was not staged by this process: a transaction commits"
                " in the process that began it"
            )
        return staged

    # Under the lock

    def _put_in_place(self, connection: Connection, changes: Sequence[tuple[str, bytes]]) -> None:
        for token, data in changes:
            connection.execute(f"DELETE FROM {CHANGES} WHERE token = %s", [token])  # noqa: S608
            if is_deletion(data):
                connection.execute(f"DELETE FROM {ACCOUNTS} WHERE name = %s", [_name(token)])  # noqa: S608
            else:
                connection.execute(
                    f"INSERT INTO {ACCOUNTS} (name, data) VALUES (%s, %b) ON CONFLICT (name)"  # noqa: S608
                    " DO UPDATE SET data = excluded.data, changed_at = clock_timestamp()",
                    [_name(token), data],
                )
        self._list(connection, [_name(token) for token, _ in changes])
        connection.execute("SELECT pg_notify(%s, '')", [CHANNEL])

    def _list(self, connection: Connection, names: Sequence[str]) -> None:
        """List of these accounts what is in force, and nothing else."""
        query = f"SELECT name, data FROM {ACCOUNTS} WHERE name = ANY(%s)"  # noqa: S608
        rows = connection.execute(query, [list(names)], binary=True).fetchall()
        there = {name: parsed(data) for name, data in rows}
        for key in self._keys.known():
            changed: dict[str, list[str]] = {}
            for name in names:
                stored = there.get(name)
                ours = stored is not None and stored.key_id == key.id
                changed[name.removesuffix(PUBLISHED)] = [stored.version] if stored and ours else []
            try:
                self._register.write(connection, key, changed)
            except Unusable as error:
                raise self._unusable(key, error) from None

    # See `sealed`

    def accounts(self) -> Iterator[Account]:
        """See `IAccountStore`.  One question for all."""
        with self._use("list the accounts") as connection:
            rows = _rows(connection, ACCOUNTS, "name")
        for name, data in rows:
            try:
                yield self._parse(name, "", data).account
            except VaultError as error:
                log.error("%s", error)

    def _published(self) -> list[str]:
        with self._use("list the accounts") as connection:
            return [row[0] for row in connection.execute(f"SELECT name FROM {ACCOUNTS}")]  # noqa: S608

    def _data(self, name: str, mailbox: str) -> bytes | None:
        query = f"SELECT data FROM {ACCOUNTS} WHERE name = %s"  # noqa: S608
        with self._use(f"read the account {mailbox or name}") as connection:
            row = connection.execute(query, [name], binary=True).fetchone()
        return row[0] if row else None

    def _listed(self, key: Key) -> Page | None:
        with self._use("read the register of accounts") as connection:
            return self._register.page(connection, key)

    def _missing(self) -> list[str]:
        with self._use("look for accounts") as connection, connection.transaction():
            self._register.lock(connection)
            there = {name for name, _ in _rows(connection, ACCOUNTS, "name")}
            return sorted(
                name + PUBLISHED
                for key in self._keys.known()
                for name in self._page(key).accounts
                if name + PUBLISHED not in there
            )

    def _path(self, name: str) -> str:
        return f"{self._connections.location}: {ACCOUNTS} {name}"


def _rows(connection: Connection, table: str, name: str) -> list[tuple[str, bytes]]:
    query = f"SELECT {name}, data FROM {table} ORDER BY 1"  # noqa: S608
    return connection.execute(query, binary=True).fetchall()


def _name(token: str) -> str:
    return token.partition("-")[0] + PUBLISHED


class _Watch(Watch):
    """Tells that something has changed.  `forget`: called before who reads looks what it was."""

    def __init__(self, connections: Connections, forget: Callable[[], None]) -> None:
        self._forget = forget
        super().__init__(connections, CHANNEL, _something)

    def read(self) -> Iterable[Entry] | None:
        """See `IWatch`."""
        self._forget()
        return super().read()


def _something(connection: Connection, payloads: list[str]) -> list[Entry] | None:
    return None
