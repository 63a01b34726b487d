"""What an account store says of its accounts, from their sealed bytes: see `seal`.

Half of `IAccountStore`, whatever the store is made of: `vault` has files, `pg.vault` rows.
Routes need no secret: `SealedAccounts.peek` needs no key, and no cryptography.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Final

from .account import Account
from .envelope import digest
from .errors import BrokenSeal, NoSuchAccount, VaultError, WrongKey
from .key import Key, KeySource
from .register import Page, Unusable
from .seal import MAX_SIZE, Stored, deletion, parse, seal, unseal

log = logging.getLogger(__name__)

#: An account is kept under the digest of its mailbox, and this.
PUBLISHED: Final = ".account"

ANNOUNCED: Final = "+"  # in front of a version in the register: not in force yet


class SealedAccounts(ABC):
    """``location``: where they are, without secrets.  Thread-safe, as far as the store is."""

    def __init__(self, location: str, key: KeySource) -> None:
        self.location = location
        self._keys = key

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.location}>"

    @abstractmethod
    def _published(self) -> list[str]:
        """Return the names of what is published.  Raises `VaultError`."""

    @abstractmethod
    def _data(self, name: str, mailbox: str) -> bytes | None:
        """Return what is kept under a name; None: nothing.  Raises `VaultError`, `BrokenSeal`."""

    @abstractmethod
    def _path(self, name: str) -> str:
        """Return what a person would look for."""

    @abstractmethod
    def _listed(self, key: Key) -> Page | None:
        """Return the register of a key, see `register`; None: nothing was ever listed.

        Raises `Unusable`, `VaultError`.
        """

    @abstractmethod
    def _missing(self) -> list[str]:
        """Return the names of accounts that are listed and not there.  Raises `VaultError`."""

    def get(self, mailbox: str) -> Account:
        """See `IAccountStore`."""
        return self.current(mailbox)[1]

    def current(self, mailbox: str) -> tuple[str, Account]:
        """See `IAccountStore`."""
        name = digest(mailbox) + PUBLISHED
        data = self._data(name, mailbox)
        while data is not None:
            try:
                return version_of(data), self._open(self._parse(name, mailbox, data))
            except VaultError:
                before, data = data, self._data(name, mailbox)
                if data == before:
                    raise  # not because it was put again meanwhile
        raise NoSuchAccount(f"no account {mailbox} in {self.location}: put one")

    def peek(self, mailbox: str) -> Account | None:
        """See `IAccountStore`.  Raises `BrokenSeal` when the file is no account's."""
        stored = self._read(digest(mailbox) + PUBLISHED, mailbox)
        return stored.account if stored else None

    def version(self, mailbox: str) -> str:
        """See `IAccountStore`.  Each seal has a nonce of its own, so the bytes tell."""
        data = self._data(digest(mailbox) + PUBLISHED, mailbox)
        return version_of(data) if data is not None else ""

    def accounts(self) -> Iterator[Account]:
        """See `IAccountStore`, and `problems`."""
        for name in self._published():
            try:
                stored = self._read(name)
            except VaultError as error:
                log.error("%s", error)
                continue
            if stored:
                yield stored.account

    def problems(self) -> Iterator[VaultError]:
        """Open every account with the key, and yield what is wrong: for the doctor."""
        for name in self._published():
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

    def _sealed(self, mailbox: str, account: Account | None) -> bytes:
        """Return what is kept of an account; None: of its deletion.

        Raises `VaultError`, `WrongKey`.
        """
        if account is None:
            return deletion(mailbox)
        data = seal(account, self._current_key())
        if len(data) > MAX_SIZE:
            raise VaultError(f"account {mailbox}: has {len(data)} bytes of settings: shorten them")
        return data

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
        if found != mailbox and (mailbox or name != digest(found) + PUBLISHED):
            raise self._broken(name, mailbox, f"is the account of {found} under another's name")
        return stored

    def _open(self, stored: Stored, page_of: Callable[[Key], Page] | None = None) -> Account:
        mailbox = stored.account.mailbox
        key = self._key()
        if key.id != stored.key_id:
            key = self._keys.find(stored.key_id) or key
        if key.id != stored.key_id:
            raise WrongKey(
                f"account {mailbox}: sealed with the key {stored.key_id:.16}, but {key.origin}"
                f" holds {key.id}: give this process the key {stored.key_id:.16}, or put the"
                " account again with its password"
            )
        account = unseal(stored, key)
        if account is None:
            why = "was edited or damaged, its seal does not hold"
            raise self._broken(digest(mailbox) + PUBLISHED, mailbox, why)
        self._check_last(stored, (page_of or self._page)(key))
        return account

    def _check_last(self, stored: Stored, page: Page) -> None:
        """Raises `BrokenSeal` for a file that was put back: sealed by us, but not the last."""
        mailbox = stored.account.mailbox
        name = digest(mailbox)
        listed = page.accounts.get(name)
        if listed is None:
            why = "was put back after its account was removed, or its register was lost"
        elif not {stored.version, ANNOUNCED + stored.version} & set(listed):
            why = "is an older state of this account, put back after it was changed"
        else:
            return
        raise self._broken(name + PUBLISHED, mailbox, why)

    def _page(self, key: Key) -> Page:
        try:
            return self._listed(key) or Page()
        except Unusable as error:
            raise self._unusable(key, error) from None

    def _unusable(self, key: Key, error: Unusable) -> BrokenSeal:
        return BrokenSeal(
            f"the register of the accounts in {self.location} {error}; else remove"
            f" register-{key.id} and put the accounts again with their passwords"
        )

    def _current_key(self) -> Key:
        """Return the key as it is now, not as it was when this process began."""
        self._keys.reload()
        return self._key()

    def _key(self) -> Key:
        key = self._keys.load()
        if key is not None:
            return key
        if not self._published():
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


def version_of(data: bytes) -> str:
    """Return a text that differs for other sealed bytes."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def parsed(data: bytes | None) -> Stored | None:
    """Return what an account file holds; None: there is none, or it is something else."""
    try:
        return parse(data) if data is not None else None
    except ValueError:
        return None
