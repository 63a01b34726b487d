"""The vault: a directory with one file per account, see `seal`.

::

    accounts/<digest of mailbox>.account
    accounts/<digest of mailbox>-<random>-<token of the transaction>-<of the process>.staged
        the same before it is published, or a deletion; mode 1600: a witness will know
    accounts/register-<key id>, lock
        which file is the last of each account, see `register`

    stage --> prepare (register, fsync) --> publish (rename, fsync of the directory, register)
      +-- discard --+                         +-- died before: `sweep` removes and reports, or
                                                  leaves it to a witness, and `resolve`
                                                  publishes or removes

The files and their register are in `vault_files`, how accounts are read in `sealed`.  Not here: who
may change an account, transactions, and what ``password_from`` names.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from zope.interface import implementer

from .account import Account
from .envelope import digest
from .errors import VaultError
from .files import sync_path, write_new
from .interfaces import IAccountStore, Verdict
from .key import Key, KeySource
from .seal import parse, seal, staged_mailbox
from .sealed import ANNOUNCED, PUBLISHED, parsed
from .vault_files import STAGED, WITNESSED, VaultFiles, read_file
from .watch import NotifyWatch, PollingWatch, watch_folders

__all__ = ["Presence", "Vault"]

log = logging.getLogger(__name__)


class Presence(Protocol):
    """Tells living processes from dead ones: `spool.presence`."""

    @property
    def token(self) -> str:
        """Name of this process; has no ``/``."""

    def is_alive(self, token: str) -> bool:
        """Tell whether the process of this token lives."""


@implementer(IAccountStore)
class Vault(VaultFiles):
    """See `IAccountStore`.  Thread-safe.

    ``directory`` is made by the first change.  Mailboxes are keys, as
    `account.normalise_mailbox` returns them.
    """

    def __init__(
        self, directory: str | os.PathLike[str], key: KeySource, presence: Presence
    ) -> None:
        super().__init__(os.fspath(directory), key)
        self._presence = presence
        self._staged: dict[str, int] = {}  # token -> process: a forked child commits nothing

    def stage(self, mailbox: str, account: Account | None, transaction: str = "") -> str:
        """See `IAccountStore`.  Raises `VaultError`, `WrongKey`."""
        if account is not None and account.mailbox != mailbox:
            raise ValueError(f"the account of {account.mailbox} cannot be put as {mailbox}")
        names = (digest(mailbox), secrets.token_hex(4), transaction, self._presence.token)
        token = "-".join(names) + STAGED
        try:
            self._make()
            # A key that is current here is current until the file is there: see `reseal`.
            with self._register.locked(shared=True):
                write_new(self._path(token), self._sealed(mailbox, account))
        except OSError as error:
            raise self._cannot(f"write the account {mailbox}", error) from error
        self._staged[token] = os.getpid()
        return token

    def prepare(self, tokens: Sequence[str], *, witnessed: bool = False) -> None:
        """See `IAccountStore`.  Raises `VaultError`."""
        try:
            for token in tokens:
                if witnessed:
                    os.chmod(self._path(token), WITNESSED)
                sync_path(self._path(token))
            if tokens:
                with self._register.locked():
                    self._announce(tokens)
                    sync_path(self.location)
        except OSError as error:
            raise self._cannot("make changes of accounts durable", error) from error

    def publish(self, tokens: Sequence[str]) -> None:
        """See `IAccountStore`."""
        if tokens:
            with self._lock_anyway():
                self._publish(tokens)

    def _publish(self, tokens: Sequence[str]) -> None:
        for token in tokens:
            path = self._path(token)
            if self._staged.pop(token, 0) != os.getpid():
                log.critical("%s was staged by another process: a fork?  Not published", path)
                continue
            try:
                self._put_in_place(token)
            except OSError as error:
                log.error(
                    "the account change %s was committed but is not in use: %s: put it again",
                    path,
                    error.strerror,
                )
        try:
            sync_path(self.location)  # before the register forgets the former files
            self._settle({token.partition("-")[0] for token in tokens})
        except (OSError, VaultError) as error:
            log.error("%s: accounts were changed, but %s: see to the disk", self.location, error)

    def discard(self, tokens: Sequence[str]) -> None:
        """See `IAccountStore`."""
        for token in tokens:
            if self._staged.pop(token, 0) != os.getpid():
                continue
            try:
                Path(self._path(token)).unlink(missing_ok=True)
            except OSError as error:
                log.error("cannot remove %s: %s", self._path(token), error.strerror)

    def sweep(self) -> tuple[str, ...]:
        """See `IAccountStore`.

        Whether such a change was committed nobody knows: it is to be put again.
        """
        swept = []
        for name in self.left_overs():
            path = self._path(name)
            try:
                if self._is_witnessed(path):
                    continue
                mailbox = staged_mailbox(read_file(path))
                os.unlink(path)
            except FileNotFoundError:
                continue  # another sweeper was faster, and reports it
            except OSError as error:
                log.error("cannot sweep %s: %s", path, error.strerror)
                continue
            swept.append(mailbox or f"(unreadable: {name})")
        self._settle_crashes()
        return tuple(swept)

    def left_overs(self) -> list[str]:
        """See `IAccountStore`."""
        return [
            name
            for name in self._names(STAGED)
            if not self._presence.is_alive(name.removesuffix(STAGED).split("-", 3)[-1])
        ]

    def doubts(self) -> list[tuple[str, str]]:
        """See `IAccountStore`."""
        found = []
        for name in self.left_overs():
            try:
                status = os.lstat(self._path(name))
            except OSError:
                continue  # resolved meanwhile
            if stat.S_IMODE(status.st_mode) == WITNESSED:
                transaction = name.removesuffix(STAGED).split("-")[2]
                found.append((status.st_mtime_ns, name, transaction))
        return [(name, transaction) for _, name, transaction in sorted(found)]

    def resolve(self, change: str, verdict: Verdict) -> str:
        """See `IAccountStore`.  Raises `VaultError`."""
        path = self._path(change)
        try:
            with self._register.locked():
                mailbox = staged_mailbox(read_file(path))
                if verdict is Verdict.COMMITTED and not self._overtaken(change):
                    self._put_in_place(change)
                    sync_path(self.location)
                else:
                    os.unlink(path)
                self._settle((change.partition("-")[0],))
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise self._cannot(f"resolve {change}", error) from error
        return mailbox or f"(unreadable: {change})"

    def watch(self) -> NotifyWatch | PollingWatch:
        """See `IAccountStore`."""
        try:
            self._make()
            return watch_folders(self.location, (".",))
        except OSError as error:
            raise self._cannot("watch the accounts", error) from error

    # Another key

    def reseal(self, most: int = 100) -> int:
        """Seal some accounts anew that the current key does not open; return how many.

        0: there are no more.  Whoever stages at the same time uses the current key: it is
        changed under the same lock, see `rekey`.  Raises `VaultError`.
        """
        try:
            with self._register.locked():
                return self._reseal(self._current_key(), most)
        except OSError as error:
            raise self._cannot("seal accounts anew", error) from error

    def _reseal(self, key: Key, most: int) -> int:
        new: dict[str, bytes] = {}
        for name in self._names(PUBLISHED):
            stored = self._read(name)
            if stored is None or stored.key_id == key.id:
                continue
            new[name] = seal(self._open(stored), key)
            if len(new) == most:
                break
        if not new:
            for name in self._names(PUBLISHED + ".new"):  # of one who died in between
                os.unlink(self._path(name))
            return 0
        listed = self._page(key).accounts
        versions = {n.removesuffix(PUBLISHED): parse(data).version for n, data in new.items()}
        self._register.write(
            key,
            {
                name: [*listed.get(name, ()), ANNOUNCED + version]
                for name, version in versions.items()
            },
        )
        for name, data in new.items():
            temporary = self._path(name + ".new")
            Path(temporary).unlink(missing_ok=True)  # of one who died under the lock
            write_new(temporary, data, sync=True)
            was = os.lstat(self._path(name))  # put when it was put: see `_overtaken`
            os.utime(temporary, ns=(was.st_atime_ns, was.st_mtime_ns))
        sync_path(self.location)
        for name in new:
            os.replace(self._path(name + ".new"), self._path(name))
        sync_path(self.location)
        self._settle(versions)
        return len(new)

    def needs(self, key: Key) -> int:
        """Return how many accounts, and changes under way, are sealed with a key.

        Under the lock: a change that is published meanwhile would be seen in neither place.
        Raises `VaultError`.
        """
        try:
            with self._register.locked():
                names = (*self._names(PUBLISHED), *self._names(STAGED))
                found = [parsed(self._data(name, "")) for name in names]
        except OSError as error:
            raise self._cannot("look for a key's accounts", error) from error
        return sum(stored is not None and stored.key_id == key.id for stored in found)

    def forget(self, key: Key) -> None:
        """Forget what is known of a key that nothing needs any more.  Raises `VaultError`."""
        try:
            self._register.forget(key)
            sync_path(self.location)
        except OSError as error:
            raise self._cannot("remove the former register", error) from error

    def locked(self) -> AbstractContextManager[None]:
        """Return the lock under which the key is changed.  Entering raises OSError."""
        self._make()
        return self._register.locked()
