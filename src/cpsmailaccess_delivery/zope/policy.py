"""What users may set up for themselves, as the administrator has decided.  Pure.

The site's own accounts are the administrator's and are not concerned.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Final

from ..account import Account, normalise_mailbox
from ..address import ascii_host
from ..errors import InvalidAccount, InvalidAddress
from ..networks import PUBLIC, check_networks, is_within
from ..wording import counted
from .account_form import check_source

#: Fields of an account that users may choose themselves; others come from the site's relay.
RELAY_FIELDS: Final = ("host", "port", "security")
LOGIN_FIELDS: Final = ("username", "password")
LIMIT_FIELDS: Final = ("connections", "mails_per_minute")
USER_FIELDS: Final = RELAY_FIELDS + LOGIN_FIELDS + LIMIT_FIELDS

#: Before the @, of addresses that are nobody's own: sites write in their name, and who had one as a
#: mailbox would have their mail leave through his relay (RFC 2142, and what is usual).
_ROLES: Final = (
    "abuse admin administrator bounce bounces do-not-reply donotreply help hostmaster info"
    " mailer-daemon no-reply noc noreply postmaster root security service support system"
    " webmaster www zope"
)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The decisions; they are stored with the *Mail accounts* object.

    ``fields``: of `USER_FIELDS`, those that users may choose.
    ``domains``: users may set up mailboxes in these; none: only those they were given.
    ``relays``: host names that users may choose, ``*.example.org`` for all below; empty: any.
    ``networks``: where those relays may be, see `networks`.
    ``accounts``: at most, of one user.  ``connections``, ``mails_per_minute``: at most, of one
    account of a user; ``None``: no limit of ours.

    Raises `InvalidAccount`, naming the value and the rule.
    """

    fields: tuple[str, ...] = RELAY_FIELDS + LOGIN_FIELDS
    domains: tuple[str, ...] = ()
    relays: tuple[str, ...] = ()
    networks: tuple[str, ...] = (PUBLIC,)
    accounts: int = 5
    connections: int = 3
    mails_per_minute: int | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the dataclass is frozen; this is its constructor
        if unknown := set(self.fields) - set(USER_FIELDS):
            raise InvalidAccount(f"fields: {', '.join(sorted(unknown))}: is nothing to choose")
        set_(self, "fields", tuple(name for name in USER_FIELDS if name in self.fields))
        set_(self, "domains", tuple(normalise_mailbox("@" + d.lstrip("@")) for d in self.domains))
        set_(self, "relays", tuple(_pattern(relay) for relay in self.relays))
        if not self.networks:
            raise InvalidAccount(f"networks: name at least one network; {PUBLIC} is the Internet")
        try:
            set_(self, "networks", check_networks(self.networks))
        except ValueError as error:
            raise InvalidAccount(f"networks: {error}") from None
        for name in ("accounts", "connections", "mails_per_minute"):
            value = getattr(self, name)
            if value is None and name == "mails_per_minute":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidAccount(f"{name}: {value!r}: is a whole number of at least 1")

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> Policy:
        """Return the policy of `stored`; what it does not say is as in a new one."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})

    def stored(self) -> dict[str, Any]:
        """Return it in plain values, for the ZODB."""
        return asdict(self)

    def may_add(self, mailbox: str, owned: int) -> None:
        """Check that a user who has `owned` accounts may set up this mailbox, too.

        Raises `InvalidAccount`.
        """
        mailbox = normalise_mailbox(mailbox)
        if not mailbox.rpartition("@")[0]:
            raise InvalidAccount(f"mailbox {mailbox!r}: is an address: local@domain")
        if mailbox[mailbox.rindex("@") :] not in self.domains:
            allowed = ", ".join(self.domains) or "none"
            raise InvalidAccount(
                f"mailbox {mailbox}: the administrator lets you set up mailboxes in: {allowed}"
            )
        if mailbox.partition("@")[0].partition("+")[0] in _ROLES.split():
            raise InvalidAccount(
                f"mailbox {mailbox}: is an address of the site, not of a person: ask the"
                " administrator"
            )
        if owned >= self.accounts:
            accounts = counted(owned, "account", "accounts")
            raise InvalidAccount(f"mailbox {mailbox}: you have {accounts}, which is the limit")

    def account(
        self,
        mailbox: str,
        *,
        owner: str,
        chosen: Mapping[str, Any],
        existing: Account | None,
        site: Account | None,
    ) -> Account:
        """Return the account of a user as he wants it, within what is allowed.

        `chosen`: fields of an account, of which only `Policy.fields` count.  `existing`: the
        account as it was, which is his.  `site`: the default account, whose relay he gets when
        he chooses none.  A password that the administrator reads from somewhere
        (``password_from``) goes nowhere else.  Raises `InvalidAccount`.
        """
        wanted = {name: value for name, value in chosen.items() if name in self.fields}
        relay = {name: getattr(site, name) for name in RELAY_FIELDS} if site else {}
        base = existing.public() if existing else {"mailbox": mailbox}
        settings = {**relay, **base, **wanted, "owner": owner}
        if "host" not in settings:
            raise InvalidAccount(
                f"mailbox {mailbox}: the site has no default relay, and you may choose none: ask"
                " the administrator"
            )
        if existing is None or settings["host"] != existing.host:
            # As the administrator verifies that relay, or as usual.
            settings["verify"] = site.verify if site and settings["host"] == site.host else True
        if existing and "password" not in wanted:
            settings["password"] = existing.password
        if settings.get("password") is not None or settings.get("username") is None:
            settings["password_from"] = None
        trusted = {
            account.relay for account in (site, existing) if account and not account.networks
        }
        account = self.limited(Account(**settings), trusted)
        if account.networks and not _may_be_within(account.host, account.networks):
            raise InvalidAccount(
                f"account {account.mailbox}: host={account.host!r}: is in no network that the"
                f" administrator allows: {', '.join(account.networks)}"
            )
        check_source(existing, account)
        return account

    def limited(self, account: Account, trusted: Collection[str] = ()) -> Account:
        """Return a user's account with the limits and networks of now.

        `trusted`: relays, as `Account.relay`, that the administrator has chosen.  Raises
        `InvalidAccount` when its relay is none of them and not allowed.
        """
        per_minute = account.mails_per_minute
        if self.mails_per_minute is not None:
            per_minute = min(per_minute or self.mails_per_minute, self.mails_per_minute)
        is_trusted = account.relay in trusted
        if not is_trusted:
            self._check_relay(account)
        return account.replace(
            connections=min(account.connections, self.connections),
            mails_per_minute=per_minute,
            networks=() if is_trusted else self.networks,
        )

    def _check_relay(self, account: Account) -> None:
        if self.relays and not any(fnmatchcase(account.host, each) for each in self.relays):
            raise InvalidAccount(
                f"account {account.mailbox}: host={account.host!r}: the administrator allows"
                f" {', '.join(self.relays)}"
            )


def _may_be_within(host: str, networks: Collection[str]) -> bool:
    """Tell whether a host may be in these networks: of a name only a connection knows."""
    try:
        return is_within(host, networks)
    except ValueError:
        return True


def _pattern(relay: str) -> str:
    wildcard, name = ("*.", relay[2:]) if relay.startswith("*.") else ("", relay)
    try:
        return wildcard + ascii_host(name)
    except InvalidAddress as error:
        raise InvalidAccount(f"relays: {error}; write smtp.example.org or *.example.org") from None
