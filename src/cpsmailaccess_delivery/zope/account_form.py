"""The fields of an account in a form: what was typed becomes an `Account`, or a reason.  Pure.

What a page cannot set stays as it is: where a password comes from (``password_from``) and the
CA file name things on the server, which is the business of its command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..account import HIDDEN, Account, goes_elsewhere
from ..errors import InvalidAccount

_NUMBERS: Final[dict[str, type[int] | type[float]]] = {
    "port": int,
    "connect_timeout": float,
    "command_timeout": float,
    "data_timeout": float,
    "connections": int,
    "mails_per_session": int,
    "mails_per_minute": int,
}

#: Texts of a form; the password is one that is never shown.
FIELDS: Final = ("mailbox", "host", "security", "username", "password", "owner", *_NUMBERS)


def shown(account: Account | None) -> dict[str, str]:
    """Return the texts that a form shows of an account: never its password."""
    if account is None:
        return {**dict.fromkeys(FIELDS, ""), "security": "starttls"}
    values = account.public()
    return {
        name: ""
        if values.get(name) is None
        else f"{values[name]:g}"
        if isinstance(values[name], float)
        else str(values[name])
        for name in FIELDS
    }


def password_state(account: Account) -> str:
    """Return what may be said of a password."""
    if account.password_from is not None:
        return f"read from {account.password_from}"
    return "set" if account.password is not None else "not set"


def typed(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that were typed: an empty text is the usual value.

    Only fields that are in `texts`.  Raises `InvalidAccount` for what is no number.
    """
    settings: dict[str, Any] = {}
    for name in FIELDS:
        if name not in texts:
            continue
        value = texts[name]
        if name in _NUMBERS:
            if value or name == "mails_per_minute":
                settings[name] = _number(name, value)
            elif name == "port":
                settings[name] = 0  # the one that belongs to the security
        elif name == "username":
            settings[name] = value or None
        elif name != "password":
            settings[name] = value
    return settings


def changed(existing: Account | None, texts: Mapping[str, str], *, verify: bool) -> Account:
    """Return the account that an administrator has typed.  Raises `InvalidAccount`.

    An empty password keeps the stored one; without a user name there is none.
    """
    settings = typed(texts)
    if existing is None:
        base: dict[str, Any] = {}
    else:
        base = existing.public()
        settings["mailbox"] = existing.mailbox
    if not verify:
        settings["verify"] = False
    elif existing is not None and existing.verify is False:
        settings["verify"] = True
    settings.update(login(existing, settings.get("username"), texts.get("password", "")))
    account = Account(**{**base, **settings})
    check_source(existing, account)
    return account


def login(existing: Account | None, username: str | None, password: str) -> dict[str, Any]:
    """Return the fields of the login: a new password, the stored one, or none."""
    if username is None:
        if password:
            raise InvalidAccount("a password needs a user name: give it, too")
        return {"username": None, "password": None, "password_from": None}
    if password:
        return {"username": username, "password": password, "password_from": None}
    kept = HIDDEN if existing is not None and existing.password is not None else None
    return {"username": username, "password": kept}


def check_source(before: Account | None, account: Account) -> None:
    """As `IAccounts.put` does for stored passwords: one that is read goes nowhere new.

    Raises `InvalidAccount`.
    """
    if before is None or account.password_from is None:
        return
    if goes_elsewhere(before, account):
        raise InvalidAccount(
            f"account {account.mailbox}: the password of {account.password_from} is for"
            f" {before.relay}, as securely as now: give a password for another relay, or for less"
            " security"
        )


def _number(name: str, value: str) -> int | float | None:
    if not value:
        return None
    try:
        return _NUMBERS[name](value)
    except ValueError:
        words = "a whole number" if _NUMBERS[name] is int else "a number"
        raise InvalidAccount(f"{name}={value!r}: {name} is {words}") from None
