"""What an outbox is made of: a directory's parts, or those of a back end that a URL names."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from .errors import InvalidSettings
from .journal import Journal
from .key import KeySource
from .spool.maildir import Maildir
from .spool.presence import Presence
from .vault import Vault

#: Under this group a distribution names, by URL scheme, what opens an outbox: see `Opener`.
GROUP: Final = "cpsmailaccess_delivery.backends"

#: Where an extra of ours is what is missing.
_EXTRAS: Final = {"postgresql": "postgres", "postgres": "postgres"}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one outbox, by the contracts that they keep.

    ``presence``: an `IPresence`.  ``clock``: seconds since the epoch,
    the same on all hosts.  ``feed``: makes the spool of a processor that runs for ever, where
    that is another than the one in which people look; None: the same.  It also has ``part``: our
    part of a limit over all workers; and ``totals``: how many mails of each state there are.
    """

    spool: Any
    keys: KeySource
    vault: Any
    journal: Any
    presence: Any
    clock: Callable[[], float] = time.time
    feed: Callable[[], Any] | None = None


#: Called with the URL and the key that the application gave.
Opener = Callable[[str, bytes | None], Parts]


def is_url(location: object) -> bool:
    """Tell the URL of a back end from a path."""
    return isinstance(location, str) and "://" in location


def without_password(location: str) -> str:
    """Return a URL without the password that it may have; a path as it is."""
    if not is_url(location):
        return location
    start, mark, query = location.partition("?")
    scheme, slashes, rest = start.partition("://")
    netloc, slash, path = rest.partition("/")
    user, at, host = netloc.rpartition("@")
    pairs = [pair for pair in query.split("&") if not pair.lower().startswith("password=")]
    shown = f"{scheme}{slashes}{user.partition(':')[0]}{at}{host}{slash}{path}"
    return shown + (mark + "&".join(pairs) if any(pairs) else "")


def open_parts(location: str | os.PathLike[str], key: bytes | None) -> Parts:
    """Return the parts of an outbox.  Raises `InvalidSettings`, `SpoolError`."""
    if not is_url(location):
        return _of_directory(Path(location).absolute(), key)
    url = str(location)
    scheme = url.partition("://")[0]
    for entry_point in entry_points(group=GROUP, name=scheme):
        try:
            opener: Opener = entry_point.load()
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get(scheme)
            way_out = f": pip install 'cpsmailaccess_delivery[{extra}]'" if extra else ""
            raise InvalidSettings(
                f"outbox {scheme}://...: needs {error.name}, which is not installed{way_out}"
            ) from None
        return opener(url, key)
    raise InvalidSettings(
        f"outbox {scheme}://...: no back end is installed for it; there are directories and"
        " postgresql://"
    )


def _of_directory(directory: Path, key: bytes | None) -> Parts:
    presence = Presence(directory / "presence")
    try:
        spool = Maildir(directory, presence)
    except BaseException:  # an interrupt, too, must not keep the lock
        presence.close()
        raise
    keys = KeySource(key, file=directory.with_name(directory.name + ".key"))
    return Parts(
        spool=spool,
        keys=keys,
        vault=Vault(directory / "accounts", keys, presence),
        journal=Journal(directory / "journal.sqlite"),
        presence=presence,
    )
