"""What the account store says of its accounts, from their sealed bytes: see `seal`.

Routes need no secret: `SealedAccounts.peek` needs no key, and no cryptography.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Final

from ..account import Account
from ..envelope import digest
from ..errors import BrokenSeal, NoSuchAccount, VaultError, WrongKey
from ..key import Key, KeySource
from ..seal import MAX_SIZE, Stored, deletion, parse, seal, unseal

log = logging.getLogger(__name__)

#: An account is kept under the digest of its mailbox, and this.
PUBLISHED: Final = ".account"


class SealedAccounts(ABC):
    """The half of `IAccountStore` that reads.  `location`: where it is, without secrets."""

    def __init__(self, location: str, key: KeySource) -> None:
        self.location = location
        self._keys = key

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.location}>"

    @abstractmethod
    def _names(self) -> list[str]:
        """Return the names of what is published.  Raises `VaultError`."""

    @abstractmethod
    def _data(self, name: str, mailbox: str) -> bytes | None:
        """Return what is kept under a name; None: nothing.  Raises `VaultError`."""

    @abstractmethod
    def _path(self, name: str) -> str:
        """Return what a person would look for."""

    def sealed(self, mailbox: str, account: Account | None) -> bytes:
        """Return what is kept of an account (None: of its deletion).

        Raises `VaultError`, `WrongKey`.
        """
        if account is None:
            return deletion(mailbox)
        if account.mailbox != mailbox:
            raise ValueError(f"the account of {account.mailbox} cannot be put as {mailbox}")
        data = seal(account, self._key())
        if len(data) > MAX_SIZE:
            raise VaultError(f"account {mailbox}: has {len(data)} bytes of settings: shorten them")
        return data

    def get(self, mailbox: str) -> Account:
        """See `IAccountStore`."""
        stored = self._read(digest(mailbox) + PUBLISHED, mailbox)
        if stored is None:
            raise NoSuchAccount(f"no account {mailbox} in {self.location}: put one")
        return self._open(stored)

    def peek(self, mailbox: str) -> Account | None:
        """See `IAccountStore`.  Raises `BrokenSeal` when the file is no account's."""
        stored = self._read(digest(mailbox) + PUBLISHED, mailbox)
        return stored.account if stored else None

    def version(self, mailbox: str) -> str:
        """See `IAccountStore`.  Each seal has a nonce of its own, so the bytes tell."""
        data = self._data(digest(mailbox) + PUBLISHED, mailbox)
        return hashlib.blake2b(data, digest_size=8).hexdigest() if data is not None else ""

    def mailboxes(self) -> Iterator[str]:
        """See `IAccountStore`.  Files that cannot be read are logged: see `problems`."""
        for name in self._names():
            try:
                stored = self._read(name)
            except VaultError as error:
                log.error("%s", error)
                continue
            if stored:
                yield stored.account.mailbox

    def problems(self) -> Iterator[VaultError]:
        """Open every account with the key, and yield what is wrong: for the doctor."""
        for name in self._names():
            try:
                stored = self._read(name)
                if stored:
                    self._open(stored)
            except VaultError as error:
                yield error

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
        if found != mailbox and (mailbox or name != digest(found) + PUBLISHED):
            raise self._broken(name, mailbox, f"is the account of {found} under another's name")
        return stored

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
            raise self._broken(digest(mailbox) + PUBLISHED, mailbox, why)
        return account

    def _key(self) -> Key:
        key = self._keys.load()
        if key is not None:
            return key
        if not self._names():
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
