"""The files of the vault, and what its register lists of them: see `vault`."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from .envelope import digest
from .errors import VaultError, WrongKey
from .files import make_private, open_inside, refuse_link, sync_path
from .key import Key, KeySource
from .register import Page, Register
from .seal import MAX_SIZE, is_deletion, parse
from .sealed import ANNOUNCED, PUBLISHED, SealedAccounts, parsed

log = logging.getLogger(__name__)

STAGED: Final = ".staged"

#: Mode of what was staged, when a witness will know whether it was committed.
WITNESSED: Final = 0o1600


class VaultFiles(SealedAccounts):
    """What a directory keeps of accounts; ``location``: the directory."""

    def __init__(self, location: str, key: KeySource) -> None:
        super().__init__(location, key)
        self._register = Register(location)

    def _put_in_place(self, token: str) -> None:
        path, target = self._path(token), self._path(token.partition("-")[0] + PUBLISHED)
        if is_deletion(read_file(path)):
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
        return stat.S_IMODE(os.lstat(path).st_mode) == WITNESSED

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
            return read_file(self._path(name))
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
            data = read_file(self._path(token))
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
        files += [name for name in self._names(STAGED) if name.partition("-")[0] in names]
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

    def _cannot(self, what: str, error: OSError) -> VaultError:
        return VaultError(
            f"cannot {what} in {self.location}: {error.strerror}: see to the disk and its"
            " permissions"
        )


def read_file(path: str) -> bytes:
    """Return what a file holds; one that is too large for an account, cut.  Raises OSError."""
    handle = open_inside(*os.path.split(path))
    try:
        return os.read(handle, MAX_SIZE + 1)
    finally:
        os.close(handle)
