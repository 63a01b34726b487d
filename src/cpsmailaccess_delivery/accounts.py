"""The accounts as an application sees them: changes follow the transaction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transaction.interfaces import NoTransaction
from zope.interface import implementer

from .account import Account, candidates, goes_elsewhere, normalise_mailbox
from .address import check_address
from .datamanager import join, kept_for
from .errors import InvalidAccount, NoSuchAccount, UnknownMailbox
from .interfaces import IAccounts

#: Accounts are published before the mails that need them.
_RANK = 0

_Change = tuple[str, Account | None]


@dataclass(slots=True)
class _Doings:
    """What the current transaction has changed, in order, and what it has found."""

    changes: list[_Change] = field(default_factory=list)
    found: dict[str, Account] = field(default_factory=dict)


@implementer(IAccounts)
class Accounts:
    """See `IAccounts`."""

    def __init__(self, store: Any, manager: Any, witness: Any = None) -> None:
        self._store = store
        self._manager = manager
        self._witness = witness

    def put(self, account: Account) -> None:
        """See `IAccounts`."""
        if not isinstance(account, Account):
            raise TypeError(f"put takes an Account, not {type(account).__name__}")
        if account.secret is not None and account.secret.hidden:
            self._check_kept(account)
            account = account.replace(password=self._kept_secret(account.mailbox))
        self._change(account.mailbox, account)

    def delete(self, mailbox: str) -> None:
        """See `IAccounts`."""
        self._change(self.get(mailbox).mailbox, None)

    def get(self, mailbox: str) -> Account:
        """See `IAccounts`."""
        account = self._look(normalise_mailbox(mailbox))
        if account is None:
            raise NoSuchAccount(
                f"mailbox {mailbox!r}: has no account in {self._store.location}; `cpsmail accounts"
                " list` shows those that are there"
            )
        return account

    def list(self) -> list[Account]:
        """See `IAccounts`."""
        found = {account.mailbox: account for account in self._store.accounts()}
        for mailbox, account in self._doings().changes:
            if account is None:
                found.pop(mailbox, None)
            else:
                found[mailbox] = account.without_secret()
        return [found[mailbox] for mailbox in sorted(found)]

    def find(self, sender: str) -> Account:
        """See `IAccounts`."""
        if isinstance(sender, str) and (sender == "*" or sender.startswith("@")):
            tried = tuple(dict.fromkeys((normalise_mailbox(sender), "*")))
        else:
            tried = candidates(check_address(sender))
        for mailbox in tried:
            account = self._look(mailbox)
            if account is not None:
                return account
        raise UnknownMailbox(
            f"sender {sender!r}: no account for {', '.join(tried)} in {self._store.location}; add"
            f" one with outbox.accounts.put(Account(mailbox={tried[0]!r}, ...)) or"
            " `cpsmail accounts set`"
        )

    def find_once(self, sender: str) -> Account:
        """See `IAccounts`."""
        if not isinstance(sender, str):
            return self.find(sender)  # which says what is wrong with it
        found = self._doings(create=True).found
        account = found.get(sender)
        if account is None:
            account = found[sender] = self.find(sender)
        return account

    def _look(self, mailbox: str) -> Account | None:
        for changed, account in reversed(self._doings().changes):
            if changed == mailbox:
                return account.without_secret() if account is not None else None
        found: Account | None = self._store.peek(mailbox)
        return found

    def _check_kept(self, account: Account) -> None:
        """A password that nobody can read must not be sent elsewhere to be read there."""
        before = self._look(account.mailbox)
        if before is None or before.secret is None:
            raise InvalidAccount(
                f"account {account.mailbox}: has no stored password to keep: give the password"
            )
        if goes_elsewhere(before, account):
            raise InvalidAccount(
                f"account {account.mailbox}: the stored password is for {before.relay}, as securely"
                " as now: give it again for another relay, or for less security"
            )

    def _kept_secret(self, mailbox: str) -> Any:
        for changed, account in reversed(self._doings().changes):
            if changed == mailbox:
                return account.password if account is not None else None
        return self._store.get(mailbox).password

    def _change(self, mailbox: str, account: Account | None) -> None:
        doings = self._doings(create=True)
        change = (mailbox, account)

        def forget() -> None:
            # by identity: the same account may be put twice
            doings.changes[:] = [other for other in doings.changes if other is not change]
            doings.found.clear()

        join(
            self._manager,
            self._store,
            lambda token: self._store.stage(mailbox, account, token),
            rank=_RANK,
            on_abort=forget,
            witness=self._witness,
        )
        doings.changes.append(change)
        doings.found.clear()

    def _doings(self, create: bool = False) -> _Doings:
        try:
            transaction = self._manager.get()
        except NoTransaction:  # explicit mode: reading needs none
            if create:
                raise
            return _Doings()
        return kept_for(transaction, self, _Doings)
