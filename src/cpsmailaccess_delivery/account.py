"""The SMTP account of one mailbox: a value, checked when it is made.

No I/O here: where a secret is sealed, or read from (``password_from``), is `vault`'s
business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, get_args

from .address import ascii_host, check_address, is_loopback, relay_name, without_quotes
from .errors import InvalidAccount, InvalidAddress
from .networks import check_networks

Security = Literal["tls", "starttls", "plain"]

DEFAULT_MAILBOX: Final = "*"

#: The port that belongs to each security: RFC 8314 section 3.3, RFC 6409, RFC 5321.
DEFAULT_PORT: Final[dict[str, int]] = {"tls": 465, "starttls": 587, "plain": 25}

_PASSWORD_FROM = re.compile(r"(env:[A-Za-z_][A-Za-z0-9_]*|file:[^\0\r\n]+)\Z")
#: Characters of an owner's name.
_MAX_OWNER: Final = 400

_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, lone surrogates


class Secret:
    """A string that does not show itself: ``repr`` and ``str`` are ``***``.

    It cannot be pickled, so that no ZODB, cache or child process ever gets it by
    accident.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the secret itself; for the SMTP login and the vault only."""
        return self._value

    @property
    def hidden(self) -> bool:
        """Whether this only says that there is a secret: see `HIDDEN`."""
        return False

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> Any:
        raise TypeError("a Secret is not pickled: read the account from the outbox instead")


class _HiddenSecret(Secret):
    __slots__ = ()

    hidden = True

    def reveal(self) -> str:
        raise TypeError("secrets are write-only: this account was read without its password")


#: The password of an account that was read: it has one, but reading does not give it.
#: An account put back with it keeps the password that is stored.
HIDDEN: Final[Secret] = _HiddenSecret("")


@dataclass(frozen=True, kw_only=True)
class Account:
    """The SMTP settings of one mailbox.

    ``mailbox``
        an address (``alice@example.org``), a domain (``@example.org``) or ``*``.
    ``host``, ``port``, ``security``
        the relay.  ``security`` is ``tls`` (from the first byte, RFC 8314), ``starttls``
        (RFC 3207, required) or ``plain``.  Without a port, the one usual for the
        security.
    ``username``, ``password`` or ``password_from``
        the login; ``password_from`` is ``env:NAME`` or ``file:PATH``, read at each login.
    ``verify``
        ``True``: the system's certificate authorities; a path: that CA file;
        ``False``: no check, explicitly.
    ``connect_timeout``, ``command_timeout``, ``data_timeout``
        seconds: to connect including the TLS handshake; for each reply (RFC 5321
        section 4.5.3.2); for the reply to the end of data.
    ``connections``, ``mails_per_session``, ``mails_per_minute``
        limits.  The defaults live within what large providers publish; a provider
        that wants less is in `limits`.  ``mails_per_minute=None``: no limit of ours.
    ``owner``
        whose the account is, in words of the application; ``""``: the site's.
    ``networks``
        where its relay may be, see `networks`; empty: anywhere.  Asked of the address at
        each connection, so that a name which changes its address gets nobody elsewhere.

    Raises `InvalidAccount`, naming the field, the value and the rule.
    """

    mailbox: str
    host: str
    port: int = 0
    security: Security = "starttls"
    username: str | None = None
    password: Secret | str | None = None  # kept as a Secret
    password_from: str | None = None
    verify: bool | str = True
    connect_timeout: float = 30.0
    command_timeout: float = 300.0
    data_timeout: float = 600.0
    connections: int = 3
    mails_per_session: int = 100
    mails_per_minute: int | None = None
    owner: str = ""
    networks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the dataclass is frozen; this is its constructor
        set_(self, "mailbox", normalise_mailbox(self.mailbox))
        try:
            set_(self, "host", ascii_host(self.host))
        except InvalidAddress as error:
            raise InvalidAccount(f"account {self.mailbox}: host: {error}") from None
        if self.security not in get_args(Security):
            self._refuse("security", self.security, "is one of tls, starttls, plain")
        if not self.port:
            set_(self, "port", DEFAULT_PORT[self.security])
        if isinstance(self.password, str):
            set_(self, "password", Secret(self.password))
        self._check_numbers()
        self._check_login()
        self._check_owner()

    @property
    def secret(self) -> Secret | None:
        """The password given here, if any; never the one behind ``password_from``."""
        return self.password if isinstance(self.password, Secret) else None

    @property
    def relay(self) -> str:
        """The relay as people write it: ``host:port``."""
        return relay_name(self.host, self.port)

    def replace(self, **changes: Any) -> Account:
        """Return a copy with these fields changed, checked again."""
        return replace(self, **changes)

    @classmethod
    def without_login(cls, host: str, port: int) -> Account:
        """Return how a relay is reached that a route names without a mailbox.

        By its port: 465 is TLS, 587 is STARTTLS, any other plain, as the 2005 system had.
        """
        by_port: dict[int, Security] = {465: "tls", 587: "starttls"}
        security = by_port.get(port, "plain")
        return cls(mailbox=DEFAULT_MAILBOX, host=host, port=port, security=security)

    def without_secret(self) -> Account:
        """Return a copy whose password, if it has one, is `HIDDEN`."""
        return self.replace(password=HIDDEN) if self.password is not None else self

    def public(self) -> dict[str, Any]:
        """Return every field but the password, for display and storage."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "password"}

    def _refuse(self, field: str, value: object, rule: str) -> None:
        raise InvalidAccount(f"account {self.mailbox}: {field}={value!r}: {field} {rule}")

    def _check_numbers(self) -> None:
        if not _is_int(self.port) or not 0 < self.port < 65536:
            self._refuse("port", self.port, "is a whole number from 1 to 65535")
        for field in ("connect_timeout", "command_timeout", "data_timeout"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or isinstance(value, bool):
                self._refuse(field, value, "is a number of seconds")
            if not 0 < value <= 3600:
                self._refuse(field, value, "is over 0 and at most 3600 seconds")
        for field in ("connections", "mails_per_session", "mails_per_minute"):
            value = getattr(self, field)
            if field == "mails_per_minute" and value is None:
                continue
            if not _is_int(value) or value < 1:
                self._refuse(field, value, "is a whole number of at least 1")

    def _check_owner(self) -> None:
        owner = self.owner
        if not isinstance(owner, str) or len(owner) > _MAX_OWNER or _UNFIT.search(owner):
            self._refuse("owner", owner, f"is a line of text of at most {_MAX_OWNER} characters")
        if isinstance(self.networks, str) or not all(isinstance(n, str) for n in self.networks):
            self._refuse("networks", self.networks, "is a sequence of texts")
        try:
            object.__setattr__(self, "networks", check_networks(self.networks))
        except ValueError as error:
            raise InvalidAccount(f"account {self.mailbox}: networks: {error}") from None

    def _check_login(self) -> None:
        if not isinstance(self.verify, bool | str) or self.verify == "":
            self._refuse("verify", self.verify, "is True, False or the path of a CA file")
        if self.password is not None and self.password_from is not None:
            raise InvalidAccount(
                f"account {self.mailbox}: password_from excludes password: give one of them"
            )
        if self.password is not None and not isinstance(self.password, Secret):
            raise InvalidAccount(f"account {self.mailbox}: password is a string")
        source = self.password_from
        if source is not None and not (isinstance(source, str) and _PASSWORD_FROM.match(source)):
            # without the value: whoever mistakes the field has put the password there
            raise InvalidAccount(f"account {self.mailbox}: password_from is env:NAME or file:PATH")
        has_password = self.password is not None or self.password_from is not None
        if has_password and not self.username:
            self._refuse("username", self.username, "is needed with a password")
        if self.username is None:
            return
        if not has_password:  # a login with an empty one would only lock the mailbox
            self._refuse("username", self.username, "needs password or password_from")
        if not isinstance(self.username, str) or not self.username or _UNFIT.search(self.username):
            self._refuse("username", self.username, "is a line of text without control characters")
        if self.password and not self.password.hidden and _UNFIT.search(self.password.reveal()):
            raise InvalidAccount(
                f"account {self.mailbox}: the password has a control character, or is not UTF-8"
            )
        if self.security == "plain" and self.verify is not False and not is_loopback(self.host):
            self._refuse(
                "security",
                self.security,
                "would send the password in clear over the network: use tls or starttls"
                " (or say verify=False if that is what you want)",
            )


def goes_elsewhere(before: Account, account: Account) -> bool:
    """Tell whether a login of one account would be read by others, were it the other's.

    Where no certificate says who is there, another port is somebody else, too.
    """
    is_checked = account.security != "plain" and account.verify is not False
    weaker = (account.security == "plain" and before.security != "plain") or (
        account.verify is False and before.verify is not False
    )
    moved = account.host != before.host or (account.port != before.port and not is_checked)
    return moved or weaker


def normalise_mailbox(mailbox: str) -> str:
    """Return the mailbox as a key, see `mailbox_key`; ``*`` and ``@domain`` are kept.

    Raises `InvalidAccount`.
    """
    if mailbox == DEFAULT_MAILBOX:
        return mailbox
    try:
        if isinstance(mailbox, str) and mailbox.startswith("@"):
            return "@" + _domain_key(mailbox[1:])
        return mailbox_key(check_address(mailbox))
    except InvalidAddress as error:
        raise InvalidAccount(f"mailbox {mailbox!r}: is an address, @domain or *: {error}") from None


def mailbox_key(address: str) -> str:
    """Return a checked address as the key of an account: lower case, domain in ASCII, no quotes.

    RFC 5321 section 2.4 lets a host tell local parts apart by case; nobody's does, and
    a sender who writes ``Alice@`` must not leave through another account than ``alice@``.
    """
    local, _, domain = address.rpartition("@")
    local = without_quotes(local).encode().lower().decode()  # ASCII only: the Kelvin sign is no k
    return f"{local}@{_domain_key(domain)}"


def _domain_key(domain: str) -> str:
    if domain.startswith("["):  # an address literal
        check_address(f"postmaster@{domain}")
        return domain.lower()
    return ascii_host(domain)


def candidates(address: str) -> tuple[str, str, str]:
    """Return the mailboxes that may serve a sender, the most particular first."""
    key = mailbox_key(address)
    return key, key[key.rindex("@") :], DEFAULT_MAILBOX


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
