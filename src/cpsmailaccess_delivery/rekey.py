"""A new key for the vault, while processes run: crash-safe, and said again it goes on.

::

    former key kept --> new key in its place --> accounts sealed anew --> nothing needs the
    former one --> it is removed

Every step is durable before the next; a crash leaves both keys, and processes know both
(`key.KeySource.find`).  What others stage meanwhile is sealed with the key that is current
then: the key changes under the lock that they hold while they stage.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .errors import VaultError
from .key import Key, KeySource


class Rekeyed(NamedTuple):
    """``resealed``: accounts.  ``needed``: changes that still need the former key, because
    their transactions began with it, or are in doubt: to be said again."""

    key: Key
    former: Key | None
    resealed: int
    needed: int


def rekey(vault: Any, keys: KeySource) -> Rekeyed:
    """Change the key, or finish a change that was cut short.

    `vault`: of a directory, or of a database.  Raises `VaultError` and its children; accounts
    that cannot be opened stop it, and keep the former key.
    """
    try:
        with vault.locked():
            former, key = keys.former(), keys.reload()
            if former is None or key is None or former.id == key.id:
                former, key = key, keys.renew()
    except OSError as error:
        raise VaultError(f"cannot lock {vault.location}: {error.strerror}") from error
    vault.sweep()
    resealed = 0
    while count := vault.reseal():
        resealed += count
    needed = vault.needs(former) if former is not None else 0
    if former is not None and not needed:
        vault.forget(former)
        keys.forget_former()
    return Rekeyed(key, former, resealed, needed)
