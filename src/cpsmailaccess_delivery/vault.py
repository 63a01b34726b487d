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

Routes need no secret: `Vault.peek` needs no key, and no cryptography.
Not here: who may change an account, transactions, and what ``password_from`` names.
"""

from __future__ import annotations

import errno
import hashlib
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
from .errors import BrokenSeal, NoSuchAccount, VaultError, WrongKey
from .files import make_private, open_inside, refuse_link, sync_path, write_new
from .interfaces import IAccountStore, Verdict
from .key import Key, KeySource
from .register import Page, Register, Unusable
from .seal import MAX_SIZE, Stored, deletion, is_deletion, parse, seal, staged_mailbox, unseal
from .watch import NotifyWatch, PollingWatch, watch_folders

__all__ = ["Presence", "Vault"]

log = logging.getLogger(__name__)

_PUBLISHED: Final = ".account"
_STAGED: Final = ".staged"
_ANNOUNCED: Final = "+"  # in front of a version in the register: not in force yet
_WITNESSED: Final = 0o1600


class Presence(Protocol):
    """Tells living processes from dead ones: `spool.presence`."""

    @property
    def token(self) -> str:
        """Name of this process; has no ``/``."""

    def is_alive(self, token: str) -> bool:
        """Tell whether the process of this token lives."""


@implementer(IAccountStore)
class Vault:
    """See `IAccountStore`.  Thread-safe.

    ``directory`` is made by the first change.  Mailboxes are keys, as
    `account.normalise_mailbox` returns them.
    """

    def __init__(
        self, directory: str | os.PathLike[str], key: KeySource, presence: Presence
    ) -> None:
        self.location = os.fspath(directory)
        self._keys = key
        self._presence = presence
        self._register = Register(self.location)
        self._staged: dict[str, int] = {}  # token -> process: a forked child commits nothing

    def __repr__(self) -> str:
        return f"<Vault {self.location}>"

    def get(self, mailbox: str) -> Account:
        """See `IAccountStore`."""
        name = digest(mailbox) + _PUBLISHED
        data = self._data(name, mailbox)
        while data is not None:
            try:
                return self._open(self._parse(name, mailbox, data))
            except VaultError:
                before, data = data, self._data(name, mailbox)
                if data == before:
                    raise  # not because it was put again meanwhile
        raise NoSuchAccount(f"no account {mailbox} in {self.location}: put one")

    def peek(self, mailbox: str) -> Account | None:
        """See `IAccountStore`.  Raises `BrokenSeal` when the file is no account's."""
        stored = self._read(digest(mailbox) + _PUBLISHED, mailbox)
        return stored.account if stored else None

    def version(self, mailbox: str) -> str:
        """See `IAccountStore`.  Each seal has a nonce of its own, so the bytes tell."""
        data = self._data(digest(mailbox) + _PUBLISHED, mailbox)
        return hashlib.blake2b(data, digest_size=8).hexdigest() if data is not None else ""

    def mailboxes(self) -> Iterator[str]:
        """See `IAccountStore`.  Files that cannot be read are logged: see `problems`."""
        for name in self._names(_PUBLISHED):
            try:
                stored = self._read(name)
            except VaultError as error:
                log.error("%s", error)
                continue
            if stored:
                yield stored.account.mailbox

    def problems(self) -> Iterator[VaultError]:
        """Open every account with the key, and yield what is wrong: for the doctor."""
        for name in self._names(_PUBLISHED):
            try:
                stored = self._read(name)
                if stored:
                    self.get(stored.account.mailbox)
            except NoSuchAccount:
                continue
            except VaultError as error:
                yield error
        try:
            missing = self._missing()
        except VaultError as error:
            yield error
            return
        for name in missing:
            yield VaultError(
                f"{self._path(name)} was removed, but not by us: put that account again; if it"
                " is to go, then remove it with `cpsmail`"
            )

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
                data = seal(account, self._current_key()) if account else deletion(mailbox)
                if len(data) > MAX_SIZE:
                    raise VaultError(
                        f"account {mailbox}: has {len(data)} bytes of settings: shorten them"
                    )
                write_new(self._path(token), data)
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
        path, target = self._path(token), self._path(token.partition("-")[0] + _PUBLISHED)
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
        target = self._path(token.partition("-")[0] + _PUBLISHED)
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

    def _read(self, name: str, mailbox: str = "") -> Stored | None:
        """Read one file as an account; None: there is none.  Raises as `_data`."""
        data = self._data(name, mailbox)
        return None if data is None else self._parse(name, mailbox, data)

    def _parse(self, name: str, mailbox: str, data: bytes) -> Stored:
        try:
            stored = parse(data)
        except ValueError as error:
            raise self._broken(name, mailbox, str(error)) from None
        found = stored.account.mailbox
        if found != mailbox and (mailbox or name != digest(found) + _PUBLISHED):
            raise self._broken(name, mailbox, f"is the account of {found} under another's name")
        return stored

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

    def _open(self, stored: Stored) -> Account:
        mailbox = stored.account.mailbox
        key = self._key()
        if key.id != stored.key_id:
            key = self._keys.find(stored.key_id) or key
        if key.id != stored.key_id:
            raise WrongKey(
                f"account {mailbox}: sealed with the key {stored.key_id:.16}, but {key.origin}"
                f" holds {key.id}: give the former key back, or put the account again"
                " with its password"
            )
        account = unseal(stored, key)
        if account is None:
            why = "was edited or damaged, its seal does not hold"
            raise self._broken(digest(mailbox) + _PUBLISHED, mailbox, why)
        self._check_last(stored, key)
        return account

    def _check_last(self, stored: Stored, key: Key) -> None:
        """Raises `BrokenSeal` for a file that was put back: sealed by us, but not the last."""
        mailbox = stored.account.mailbox
        name = digest(mailbox)
        listed = self._page(key).accounts.get(name)
        if listed is None:
            why = "was put back after its account was removed, or its register was lost"
        elif not {stored.version, _ANNOUNCED + stored.version} & set(listed):
            why = "is an older state of this account, put back after it was changed"
        else:
            return
        raise self._broken(name + _PUBLISHED, mailbox, why)

    def _page(self, key: Key) -> Page:
        try:
            return self._register.page(key) or Page()
        except Unusable as error:
            raise BrokenSeal(
                f"the register of the accounts in {self.location} {error}; else remove"
                f" register-{key.id} and put the accounts again with their passwords"
            ) from None
        except OSError as error:
            raise self._cannot("read the register of accounts", error) from error

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
                versions.append(_ANNOUNCED + stored.version)
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
        files = [name + _PUBLISHED for name in names]
        files += [name for name in self._names(_STAGED) if name.partition("-")[0] in names]
        there = {name: _parsed(self._data(name, "")) for name in files}
        for key in self._keys.known():
            listed = self._page(key).accounts
            changed: dict[str, list[str]] = {name: [] for name in names}
            for file, stored in there.items():
                if stored is not None and stored.key_id == key.id:
                    name = file[: len(digest(""))]
                    if file.endswith(_PUBLISHED):
                        changed[name].append(stored.version)
                    elif _ANNOUNCED + stored.version in listed.get(name, ()):
                        changed[name].append(_ANNOUNCED + stored.version)
            self._register.write(key, changed)

    def _missing(self) -> list[str]:
        """Return the files of accounts that are listed and not there."""
        try:
            with self._register.locked(shared=True):
                there = set(self._names(_PUBLISHED))
                return sorted(
                    name + _PUBLISHED
                    for key in self._keys.known()
                    for name, versions in self._page(key).accounts.items()
                    if name + _PUBLISHED not in there
                    and not all(version.startswith(_ANNOUNCED) for version in versions)
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
                if any(version.startswith(_ANNOUNCED) for version in versions)
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
        for name in self._names(_PUBLISHED):
            stored = self._read(name)
            if stored is None or stored.key_id == key.id:
                continue
            new[name] = seal(self._open(stored), key)
            if len(new) == most:
                break
        if not new:
            for name in self._names(_PUBLISHED + ".new"):  # of one who died in between
                os.unlink(self._path(name))
            return 0
        listed = self._page(key).accounts
        versions = {n.removesuffix(_PUBLISHED): parse(data).version for n, data in new.items()}
        self._register.write(
            key,
            {
                name: [*listed.get(name, ()), _ANNOUNCED + version]
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
        for name in (*self._names(_PUBLISHED), *self._names(_STAGED)):
            stored = _parsed(self._data(name, ""))
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

    def _current_key(self) -> Key:
        """Return the key as it is now, not as it was when this process began."""
        self._keys.reload()
        return self._key()

    def _key(self) -> Key:
        key = self._keys.load()
        if key is not None:
            return key
        if not self._names(_PUBLISHED):
            return self._keys.make()
        key = self._keys.load()  # made since, and then the first account
        if key is None:
            raise WrongKey(
                f"the key of {self.location} is lost: there are accounts, but no key in"
                f" {self._keys.where()}: restore it; or delete the accounts and put them"
                " again with their passwords"
            )
        return key

    def _broken(self, name: str, mailbox: str, why: str) -> BrokenSeal:
        whose = f"account {mailbox}: " if mailbox else ""
        return BrokenSeal(f"{whose}{self._path(name)} {why}: remove it and put the account again")

    def _cannot(self, what: str, error: OSError) -> VaultError:
        return VaultError(
            f"cannot {what} in {self.location}: {error.strerror}: see to the disk and its"
            " permissions"
        )


def _parsed(data: bytes | None) -> Stored | None:
    """Return what an account file holds; None: there is none, or it is something else."""
    try:
        return parse(data) if data is not None else None
    except ValueError:
        return None


def _read_file(path: str) -> bytes:
    handle = open_inside(*os.path.split(path))
    try:
        return os.read(handle, MAX_SIZE + 1)
    finally:
        os.close(handle)
