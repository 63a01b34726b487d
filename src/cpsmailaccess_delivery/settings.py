"""The settings of an outbox, from a TOML file, the environment and options.

::

    outbox = "var/outbox"          # a relative path is relative to the file; or postgresql://...
    size_limit = 52428800          # bytes
    helo_name = "app.example.org"
    max_sessions = 200
    connections_per_relay = 20
    metrics_port = 9125            # of `cpsmail run`: Prometheus; none by default
    metrics_address = "127.0.0.1"
    unclear = "retry"              # or "hold": see `retry.Schedule`

    [retry]
    first = 60.0                   # seconds; see `retry.Schedule`
    give_up = 432000.0

Later ones win: the file, ``CPSMAIL_OUTBOX`` (``CPSMAIL_RETRY_FIRST``, ...), options.
Secrets are no settings: see `key` and ``Account.password_from``.
"""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from .address import ascii_host
from .errors import InvalidAddress, InvalidSettings
from .message import DEFAULT_SIZE_LIMIT
from .outbox import Outbox
from .parts import is_url, without_password
from .processor import MAX_SESSIONS
from .relays import CONNECTIONS_PER_RELAY
from .retry import UNCLEAR_POLICIES, Schedule

#: Names the settings file when no option does.
CONFIG_VARIABLE: Final = "CPSMAIL_CONFIG"

#: Looked for, in this order, when nothing names a file.
CONFIG_FILES: Final = (Path("cpsmail.toml"), Path("/etc/cpsmail/cpsmail.toml"))

_PREFIX: Final = "CPSMAIL_"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an `Outbox` is made from.  ``source``: the settings file, if there was one."""

    outbox: Path | str = field(repr=False)  # a URL may hold a password
    size_limit: int = DEFAULT_SIZE_LIMIT
    helo_name: str | None = None
    max_sessions: int = MAX_SESSIONS
    connections_per_relay: int = CONNECTIONS_PER_RELAY
    metrics_port: int | None = None
    metrics_address: str = "127.0.0.1"
    unclear: str = "retry"
    retry: Schedule = field(default_factory=Schedule)
    source: Path | None = None

    @property
    def location(self) -> str:
        """Where the outbox is; a password in its URL is left out."""
        return without_password(str(self.outbox))

    def open(self) -> Outbox:
        """Return the outbox.  Raises what `Outbox` does."""
        return Outbox(
            self.outbox,
            size_limit=self.size_limit,
            schedule=self.retry,
            helo_name=self.helo_name,
            max_sessions=self.max_sessions,
            connections_per_relay=self.connections_per_relay,
            unclear=self.unclear,
        )


def load_settings(
    config: str | os.PathLike[str] | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    options: Mapping[str, str] | None = None,
) -> Settings:
    """Return the settings in force.  Raises `InvalidSettings`.

    `config`: the settings file; by default the one that ``CPSMAIL_CONFIG`` names, else
    the first of `CONFIG_FILES` that is there.  `options`: values by setting
    (``retry.first``), as text.
    """
    source = _find_file(config, environ)
    values: dict[str, Any] = {}
    if source is not None:
        values.update(_from_file(source))
    for key in _RULES:
        variable = _PREFIX + key.replace(".", "_").upper()
        if text := environ.get(variable):
            values[key] = _checked(key, _parsed(key, text), f"environment variable {variable}")
    for key, text in (options or {}).items():
        values[key] = _checked(key, _parsed(key, text), f"option {key}")
        if key == "outbox" and without_password(text) != text:
            raise InvalidSettings(
                "option outbox: everybody on this host sees a password in a command line: leave it"
                " to ~/.pgpass, PGPASSFILE or the variable CPSMAIL_OUTBOX"
            )
    if "outbox" not in values:
        raise InvalidSettings(
            "outbox: is not set: name its directory with --outbox, CPSMAIL_OUTBOX, or"
            f" outbox = ... in {' or '.join(map(str, CONFIG_FILES))}"
        )
    retry = {key[6:]: values.pop(key) for key in list(values) if key.startswith("retry.")}
    return Settings(**values, retry=Schedule(**retry), source=source)


def _find_file(config: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> Path | None:
    named = config or environ.get(CONFIG_VARIABLE)
    if named:
        return Path(named)
    return next((path for path in CONFIG_FILES if path.is_file()), None)


def _from_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = dict(_flat(tomllib.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise InvalidSettings(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{path}: is no TOML: {error}") from None
    except RecursionError:
        raise InvalidSettings(f"{path}: is nested too deep: there are no such settings") from None
    for key, value in content.items():
        value = _checked(key, value, str(path))
        yield key, path.parent / value if isinstance(value, Path) else value


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _parsed(key: str, text: str) -> object:
    """Return the number that a text stands for, where the setting is one."""
    if key in ("outbox", "helo_name", "metrics_address", "unclear"):
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _checked(key: str, value: object, where: str) -> Any:
    if key not in _RULES:
        raise InvalidSettings(f"{where}: {key}: no such setting; there are {', '.join(_RULES)}")
    check, rule = _RULES[key]
    checked = check(value)
    if checked is None:
        raise InvalidSettings(f"{where}: {key} = {value!r}: {key} {rule}")
    return checked


def _location(value: object) -> Path | str | None:
    if not isinstance(value, str) or not value or "\0" in value:
        return None
    if is_url(value):
        return value
    try:
        return Path(value).expanduser()
    except RuntimeError:  # no such user
        return None


def _helo_name(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    try:
        host = ascii_host(value)
    except InvalidAddress:
        return None
    if host.replace(".", "").isdigit() or ":" in host:
        return value if value.startswith("[") else None
    return host


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _port(value: object) -> int | None:
    port = _whole(value)
    return port if port is not None and port <= 65_535 else None


def _ip_address(value: object) -> str | None:
    try:
        return str(ip_address(value)) if isinstance(value, str) else None
    except ValueError:
        return None


def _number(least: float, most: float = math.inf) -> Callable[[object], float | None]:
    def check(value: object) -> float | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if least <= number <= most and math.isfinite(number) else None

    return check


def _unclear(value: object) -> str | None:
    return value if isinstance(value, str) and value in UNCLEAR_POLICIES else None


_SECONDS: Final = (_number(0.001), "is a number of seconds over 0")

_RULES: Final[dict[str, tuple[Callable[[object], Any], str]]] = {
    "outbox": (
        _location,
        "is the path of a directory, ~NAME a user's home; or postgresql://...",
    ),
    "size_limit": (_whole, "is a whole number of bytes, at least 1"),
    "helo_name": (_helo_name, "is a host name, or an IP address in brackets"),
    "max_sessions": (_whole, "is a whole number of at least 1"),
    "connections_per_relay": (_whole, "is a whole number of at least 1"),
    "metrics_port": (_port, "is a port, 1 to 65535"),
    "metrics_address": (_ip_address, "is an IP address"),
    "unclear": (_unclear, "is retry or hold"),
    "retry.first": _SECONDS,
    "retry.factor": (_number(1.0), "is a number of at least 1"),
    "retry.longest": _SECONDS,
    "retry.jitter": (_number(0.0, 1.0), "is a number from 0 to 1"),
    "retry.give_up": _SECONDS,
    "retry.delay_notice": (_number(0.0), "is a number of seconds; 0: never"),
}
