"""The register of a vault: which file of each account is the one that was put last.

::

    accounts/register-<key id>
    {"accounts": {"<digest of mailbox>": ["<version>", "+<version>"]}, "generation": 7,
     "key": "<key id>", "seal": "<base64>", "version": 1}

A seal tells who wrote a file, not when: without a register, the file of last year with the
password and the relay of then would open like today's.  The register is sealed with the key
of the accounts that it lists, each key has its own, and no file counts that it does not list.

A change is announced ("+") before it is visible, and both versions count until it is settled: a
crash leaves none that the register does not know.  Who puts the whole directory back, accounts and
register together, is told from a restored backup by nothing that lies in it; processes
that run remember the generation, and refuse an earlier one.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from .files import READ, read_all, write_new
from .key import Key

VERSION: Final = 1

_PREFIX: Final = "register-"
_NONCE_SIZE: Final = 12  # bytes


class Unusable(ValueError):
    """Says why a register cannot be believed."""


@dataclass(slots=True)
class Page:
    """What a register lists: by digest of a mailbox, versions that may stand in its file."""

    accounts: dict[str, list[str]] = field(default_factory=dict)
    generation: int = 0


class Register:
    """The registers of one vault, and its lock."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._read: dict[str, tuple[object, Page]] = {}  # key id -> (which file, its content)
        self._seen: dict[str, int] = {}  # key id -> the highest generation

    @contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the lock of the vault: `shared` to stage, alone to publish.  Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(f"{self._directory}/lock", flags, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def page(self, key: Key) -> Page | None:
        """Return what is listed for a key; None: nothing ever was.  Not to be changed.

        Raises `Unusable`, OSError.
        """
        try:
            handle = os.open(self._path(key), READ)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(handle)
            which = (status.st_ino, status.st_mtime_ns, status.st_size)
            known = self._read.get(key.id)
            if known is not None and known[0] == which:
                return known[1]
            page = load_page(read_all(handle, status.st_size), key)
        finally:
            os.close(handle)
        check_generation(page, self._seen.get(key.id, 0))
        self._seen[key.id] = page.generation
        self._read[key.id] = which, page
        return page

    def write(self, key: Key, changed: Mapping[str, list[str]]) -> None:
        """List these versions for these accounts ([]: none any more).  Under the lock.

        Durable but for its name.  Raises `Unusable`, OSError.
        """
        new = changed_page(self.page(key) or Page(), changed, self._seen.get(key.id, 0))
        if new is None:
            return
        path = self._path(key)
        temporary = f"{path}.new"
        try:
            os.unlink(temporary)  # of one who died under the lock
        except FileNotFoundError:
            pass
        write_new(temporary, dump_page(new, key), sync=True)
        os.replace(temporary, path)

    def forget(self, key: Key) -> None:
        """Remove the register of a key that seals nothing any more.  Raises OSError."""
        self._seen.pop(key.id, None)
        for path in (self._path(key), self._path(key) + ".new"):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    def _path(self, key: Key) -> str:
        return f"{self._directory}/{_PREFIX}{key.id}"


def check_generation(page: Page, seen: int) -> None:
    """Raises `Unusable` for a state before the generation that was seen."""
    if page.generation < seen:
        raise Unusable(
            "is an earlier state than this process has seen: were the accounts put back?"
            " If that was you, restart it"
        )


def changed_page(page: Page, changed: Mapping[str, list[str]], seen: int) -> Page | None:
    """Return the page after `page` and all that were seen; None: nothing changes."""
    accounts = {name: new for name, new in {**page.accounts, **changed}.items() if new}
    if accounts == page.accounts:
        return None
    return Page(accounts, max(page.generation, seen) + 1)


def dump_page(page: Page, key: Key) -> bytes:
    """Return a register as it is kept."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    document = {
        "accounts": page.accounts,
        "generation": page.generation,
        "key": key.id,
        "version": VERSION,
    }
    nonce = secrets.token_bytes(_NONCE_SIZE)
    tag = ChaCha20Poly1305(key.reveal()).encrypt(nonce, b"", _canonical(document))
    return _canonical(document | {"seal": base64.b64encode(nonce + tag).decode()}) + b"\n"


def load_page(data: bytes, key: Key) -> Page:
    """Return what a register lists.  Raises `Unusable`."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        document = json.loads(data)
        sealed = base64.b64decode(document.pop("seal"), validate=True)
        bound = _canonical(document)
        ChaCha20Poly1305(key.reveal()).decrypt(sealed[:_NONCE_SIZE], sealed[_NONCE_SIZE:], bound)
        if document["version"] != VERSION:
            raise Unusable(f"has version {document['version']!r}; this release reads {VERSION}")
        return Page(document["accounts"], document["generation"])
    except Unusable:
        raise
    except (
        InvalidTag, binascii.Error, ValueError, TypeError, KeyError, AttributeError, RecursionError,
    ):  # fmt: skip
        raise Unusable("was edited or damaged, its seal does not hold") from None


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
