"""What the account of a lane is now, and what it allows: to which relay, how much, how fast."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from .account import Account
from .address import relay_name
from .envelope import Route, lane_key
from .errors import VaultError
from .limits import Pace, SessionLimit, mails_per_minute


class Terms:
    """Of one route; `accounts`: where they are kept.  `paces`: see `ISpool`.

    ``relay``: host and port.
    """

    def __init__(self, route: Route, accounts: Any, paces: MutableMapping[str, float]) -> None:
        self.route = route
        self._accounts = accounts
        self._paces = paces
        self._key = lane_key(route)
        self._version: str | None = None  # of the account that was loaded, or asked for first
        self.account: Account | None = None
        self._pace: Pace | None = None  # None: as many as there are
        self.limit = SessionLimit(1)
        self.relay = relay_name(route.host, route.port)

    def load(self) -> Account:
        """Take the account as it is now.  Raises `VaultError`."""
        route = self.route
        if not route.mailbox:
            account = Account.without_login(route.host, route.port)
        else:
            account = self._current()
        if account != self.account:
            per_minute = mails_per_minute(account.host, account.mails_per_minute)
            self._pace = Pace(per_minute) if per_minute else None
            self.account = account
            self.limit = SessionLimit(account.connections)
            self.relay = account.relay
        return account

    def _current(self) -> Account:
        account: Account
        try:
            self._version, account = self._accounts.current(self.route.mailbox)
        except VaultError:  # it may be mended between two questions: first that for its version
            self._version = None
            self.version()
            account = self._accounts.get(self.route.mailbox)
        return account

    def version(self) -> str:
        """Return what differs when the account is another."""
        if not self.route.mailbox:
            return ""
        try:
            found = str(self._accounts.version(self.route.mailbox))
        except VaultError as error:
            # To load it will fail, and says why; mended, it differs.  It counts as changed, so that
            # sessions end: it may be gone.
            found = str(error)
        if self._version is None:
            self._version = found
        return found

    @property
    def changed(self) -> bool:
        """Whether the account is another than the one that was loaded, or asked for first."""
        return self._version is not None and self._version != self.version()

    def take(self, now: float) -> float:
        """Take leave to send one mail: return 0.0, or the seconds until there is some."""
        wait = self.wait(now)
        if self._pace is not None and not wait:
            self._paces[self._key] = self._pace.spend(self._paces.get(self._key, 0.0), now)
        return wait

    def give_back(self) -> None:
        """Return a leave that was not used."""
        if self._pace is not None:
            self._paces[self._key] = self._pace.give_back(self._paces.get(self._key, 0.0))

    def wait(self, now: float) -> float:
        """Return the seconds until a mail may go."""
        if self._pace is None:
            return 0.0
        spent = self._pace.believed(self._paces.get(self._key, 0.0), now)
        self._paces[self._key] = spent
        return self._pace.wait(spent, now)
