"""What the account of a lane is now, and what it allows: to which relay, how much, how fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .account import Account
from .address import relay_name
from .envelope import Route
from .errors import VaultError
from .limits import SessionLimit, TokenBucket, mails_per_minute


class Terms:
    """Of one route; `accounts`: where they are kept.  `now`: seconds since the epoch.

    ``relay``: host and port.  ``bucket``: lets mails pass; None: as many as there are.
    """

    def __init__(self, route: Route, accounts: Any, now: Callable[[], float]) -> None:
        self.route = route
        self._accounts = accounts
        self._now = now
        self._version = self.version()
        self.account: Account | None = None
        self.bucket: TokenBucket | None = None
        self.limit = SessionLimit(1)
        self.relay = relay_name(route.host, route.port)

    def load(self) -> Account:
        """Take the account as it is now.  Raises `VaultError`."""
        route = self.route
        if not route.mailbox:
            account = Account.without_login(route.host, route.port)
        else:
            self._version = self.version()
            account = self._accounts.get(route.mailbox)
        if account != self.account:
            per_minute = mails_per_minute(account.host, account.mails_per_minute)
            self.bucket = TokenBucket(per_minute, self._now()) if per_minute else None
            self.account = account
            self.limit = SessionLimit(account.connections)
            self.relay = account.relay
        return account

    def version(self) -> str:
        """Return what differs when the account is another."""
        if not self.route.mailbox:
            return ""
        try:
            return str(self._accounts.version(self.route.mailbox))
        except VaultError as error:
            return str(error)  # to load it will fail, and says why; mended, it differs

    @property
    def changed(self) -> bool:
        """Whether the account is another than the one that was loaded."""
        return bool(self.route.mailbox) and self._version != self.version()

    @property
    def asks_to_wait(self) -> bool:
        """Whether no mail may go just now."""
        return self.bucket is not None and self.bucket.wait(self._now()) > 0
