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

How accounts are read is in `sealed`.  Not here: who may change an account, transactions, and what
``password_from`` names.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol

from zope.interface import implementer

from .account import Account
from .envelope import digest
from .errors import VaultError, WrongKey
from .files import make_private, open_inside, refuse_link, sync_path, write_new
from .interfaces import IAccountStore, Verdict
from .key import Key, KeySource
from .register import Page, Register
from .seal import MAX_SIZE, is_deletion, parse, seal, staged_mailbox
from .sealed import ANNOUNCED, PUBLISHED, SealedAccounts, parsed
from .watch import NotifyWatch, PollingWatch, watch_folders

__all__ = ["Presence", "Vault"]

log = logging.getLogger(__name__)

_STAGED: Final = ".staged"
_WITNESSED: Final = 0o1600


class Presence(Protocol):
    """Tells living processes from dead ones: `spool.presence`."""

    @property
    def token(self) -> str:
        """Name of this process; has no ``/``."""

    def is_alive(self, token: str) -> bool:
        """Tell whether the process of this token lives."""


@implementer(IAccountStore)
class Vault(SealedAccounts):
    """See `IAccountStore`.  Thread-safe.

    ``directory`` is made by the first change.  Mailboxes are keys, as
    `account.normalise_mailbox` returns them.
    """

    def __init__(
        self, directory: str | os.PathLike[str], key: KeySource, presence: Presence
    ) -> None:
        super().__init__(os.fspath(directory), key)
        self._presence = presence
        self._register = Register(self.location)
        self._staged: dict[str, int] = {}  # token -> process: a forked child commits nothing

    def stage(self, mailbox: str, account: Account | None, transaction: str = "") -> str:
        """See `IAccountStore`.  Raises `VaultError`, `WrongKey`."""
        if account is not None and account.mailbox != mailbox:
            raise ValueError(f"the account of {account.mailbox} cannot be put as {mailbox}")
        names = (digest(mailbox), secrets.token_hex(4), transaction, self._presence.token)
        token = "-".join(names) + _STAGED
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
                    os.chmod(self._path(token), _WITNESSED)
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
                mailbox = staged_mailbox(_read_file(path))
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
            for name in self._names(_STAGED)
            if not self._presence.is_alive(name.removesuffix(_STAGED).split("-", 3)[-1])
        ]

    def doubts(self) -> list[tuple[str, str]]:
        """See `IAccountStore`."""
        found = []
        for name in self.left_overs():
            try:
                status = os.lstat(self._path(name))
            except OSError:
                continue  # resolved meanwhile
            if stat.S_IMODE(status.st_mode) == _WITNESSED:
                transaction = name.removesuffix(_STAGED).split("-")[2]
                found.append((status.st_mtime_ns, name, transaction))
        return [(name, transaction) for _, name, transaction in sorted(found)]

    def resolve(self, change: str, verdict: Verdict) -> str:
        """See `IAccountStore`.  Raises `VaultError`."""
        path = self._path(change)
        try:
            with self._register.locked():
                mailbox = staged_mailbox(_read_file(path))
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

    def _put_in_place(self, token: str) -> None:
        path, target = self._path(token), self._path(token.partition("-")[0] + PUBLISHED)
        if is_deletion(_read_file(path)):
            Path(target).unlink(missing_ok=True)
            sync_path(self.location)  # first: what says that it was wanted goes last
            os.unlink(path)
            return
        os.replace(path, target)
        if self._is_witnessed(target):
            os.chmod(target, 0o600)  # only now: as long as it is staged, the mode is a promise

    def _overtaken(self, token: str) -> bool:
        """Tell whether the account was put again after this change was staged."""
        target = self._path(token.partition("-")[0] + PUBLISHED)
        try:
            return os.lstat(target).st_mtime_ns > os.lstat(self._path(token)).st_mtime_ns
        except FileNotFoundError:
            return False

    @staticmethod
    def _is_witnessed(path: str) -> bool:
        return stat.S_IMODE(os.lstat(path).st_mode) == _WITNESSED

    def _make(self) -> None:
        make_private(os.path.dirname(self.location))  # the outbox, or what is one later
        refuse_link(self.location)
        make_private(self.location)

    def _path(self, name: str) -> str:
        return f"{self.location}/{name}"

    def _names(self, suffix: str) -> list[str]:
        try:
            refuse_link(self.location)
            return [name for name in os.listdir(self.location) if name.endswith(suffix)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._cannot("list the accounts", error) from error

    def _published(self) -> list[str]:
        return self._names(PUBLISHED)

    def _listed(self, key: Key) -> Page | None:
        try:
            return self._register.page(key)
        except OSError as error:
            raise self._cannot("read the register of accounts", error) from error

    def _data(self, name: str, mailbox: str) -> bytes | None:
        """Read one file; None: there is none.  Raises `VaultError`, `BrokenSeal`."""
        try:
            return _read_file(self._path(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.filename == self.location:  # the directory itself
                raise self._cannot(f"read {mailbox or name}", error) from error
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EAGAIN):
                raise self._broken(name, mailbox, "is no regular file") from None
            raise self._cannot(f"read {mailbox or name}", error) from error

    # The register.  All under its lock.

    def _announce(self, tokens: Sequence[str]) -> None:
        """List what is staged beside what is in force."""
        news: dict[str, dict[str, list[str]]] = {}  # by key id, by digest
        for token in tokens:
            data = _read_file(self._path(token))
            if not is_deletion(data):
                stored = parse(data)
                by_name = news.setdefault(stored.key_id, {})
                versions = by_name.setdefault(token.partition("-")[0], [])
                versions.append(ANNOUNCED + stored.version)
        for key_id, by_name in news.items():
            key = self._keys.find(key_id)
            if key is None:
                raise WrongKey(f"the key {key_id:.16} was changed meanwhile: put the account again")
            listed = self._page(key).accounts
            self._register.write(
                key, {name: [*listed.get(name, ()), *new] for name, new in by_name.items()}
            )

    def _settle(self, names: Iterable[str]) -> None:
        """List of these accounts what is in force or announced, and nothing else."""
        names = set(names)
        files = [name + PUBLISHED for name in names]
        files += [name for name in self._names(_STAGED) if name.partition("-")[0] in names]
        there = {name: parsed(self._data(name, "")) for name in files}
        for key in self._keys.known():
            listed = self._page(key).accounts
            changed: dict[str, list[str]] = {name: [] for name in names}
            for file, stored in there.items():
                if stored is not None and stored.key_id == key.id:
                    name = file[: len(digest(""))]
                    if file.endswith(PUBLISHED):
                        changed[name].append(stored.version)
                    elif ANNOUNCED + stored.version in listed.get(name, ()):
                        changed[name].append(ANNOUNCED + stored.version)
            self._register.write(key, changed)

    def _missing(self) -> list[str]:
        """Return the files of accounts that are listed and not there."""
        try:
            with self._register.locked(shared=True):
                there = set(self._names(PUBLISHED))
                return sorted(
                    name + PUBLISHED
                    for key in self._keys.known()
                    for name, versions in self._page(key).accounts.items()
                    if name + PUBLISHED not in there
                    and not all(version.startswith(ANNOUNCED) for version in versions)
                )
        except FileNotFoundError:
            return []  # nothing was ever put
        except OSError as error:
            raise self._cannot("lock the accounts", error) from error

    def _settle_crashes(self) -> None:
        """Settle the accounts whose change a crash has cut short."""
        try:
            unsettled = {
                name
                for key in self._keys.known()
                for name, versions in self._page(key).accounts.items()
                if any(version.startswith(ANNOUNCED) for version in versions)
            }
            if unsettled:
                with self._register.locked():
                    self._settle(unsettled)
        except (OSError, VaultError) as error:
            log.error("the register of %s cannot be settled: %s", self.location, error)

    @contextmanager
    def _lock_anyway(self) -> Iterator[None]:
        """Hold the lock; without it where there is none to be had: a commit goes on."""
        try:
            lock = self._register.locked()
            lock.__enter__()
        except OSError as error:
            log.error("%s cannot be locked: %s", self.location, error.strerror)
            yield
            return
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

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
        """Return how many accounts, and changes under way, are sealed with a key."""
        found = 0
        for name in (*self._names(PUBLISHED), *self._names(_STAGED)):
            stored = parsed(self._data(name, ""))
            found += stored is not None and stored.key_id == key.id
        return found

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

    def _cannot(self, what: str, error: OSError) -> VaultError:
        return VaultError(
            f"cannot {what} in {self.location}: {error.strerror}: see to the disk and its"
            " permissions"
        )


def _read_file(path: str) -> bytes:
    handle = open_inside(*os.path.split(path))
    try:
        return os.read(handle, MAX_SIZE + 1)
    finally:
        os.close(handle)
