"""The vault: a directory with one file per account, see `seal`.

::

    accounts/<digest of mailbox>.account
    accounts/<digest of mailbox>-<random>-<token of the transaction>-<of the process>.staged
        the same before it is published, or a deletion; mode 1600: a witness will know

    stage --> prepare (fsync) --> publish (rename, fsync of the directory)
      +-- discard --+               +-- died before: `sweep` removes and reports, or leaves it
                                        to a witness, and `resolve` publishes or removes

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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

from zope.interface import implementer

from .account import Account
from .envelope import digest
from .errors import BrokenSeal, NoSuchAccount, VaultError, WrongKey
from .files import make_private, open_inside, refuse_link, sync_path, write_new
from .interfaces import IAccountStore, Verdict
from .key import Key, KeySource
from .seal import MAX_SIZE, Stored, deletion, is_deletion, parse, seal, staged_mailbox, unseal
from .watch import NotifyWatch, PollingWatch, watch_folders

__all__ = ["Presence", "Vault"]

log = logging.getLogger(__name__)

_PUBLISHED: Final = ".account"
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
        self._staged: dict[str, int] = {}  # token -> process: a forked child commits nothing

    def __repr__(self) -> str:
        return f"<Vault {self.location}>"

    def get(self, mailbox: str) -> Account:
        """See `IAccountStore`."""
        stored = self._read(digest(mailbox) + _PUBLISHED, mailbox)
        if stored is None:
            raise NoSuchAccount(f"no account {mailbox} in {self.location}: put one")
        return self._open(stored)

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
                    self._open(stored)
            except VaultError as error:
                yield error

    def stage(self, mailbox: str, account: Account | None, transaction: str = "") -> str:
        """See `IAccountStore`.  Raises `VaultError`, `WrongKey`."""
        if account is not None and account.mailbox != mailbox:
            raise ValueError(f"the account of {account.mailbox} cannot be put as {mailbox}")
        data = seal(account, self._key()) if account else deletion(mailbox)
        names = (digest(mailbox), secrets.token_hex(4), transaction, self._presence.token)
        token = "-".join(names) + _STAGED
        path = self._path(token)
        if len(data) > MAX_SIZE:
            raise VaultError(f"account {mailbox}: has {len(data)} bytes of settings: shorten them")
        try:
            self._make()
            write_new(path, data)
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
                sync_path(self.location)
        except OSError as error:
            raise self._cannot("make changes of accounts durable", error) from error

    def publish(self, tokens: Sequence[str]) -> None:
        """See `IAccountStore`."""
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
            if tokens:
                sync_path(self.location)
        except OSError as error:
            log.error("cannot sync %s: %s: see to the disk", self.location, error.strerror)

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
            mailbox = staged_mailbox(_read_file(path))
            if verdict is Verdict.COMMITTED and not self._overtaken(change):
                self._put_in_place(change)
                sync_path(self.location)
            else:
                os.unlink(path)
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
        if data is None:
            return None
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
            key = self._keys.reload() or key
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
        return account

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


def _read_file(path: str) -> bytes:
    handle = open_inside(*os.path.split(path))
    try:
        return os.read(handle, MAX_SIZE + 1)
    finally:
        os.close(handle)
