"""The format of an account file: settings in the open, the secret sealed and bound to them.

::

    {"account": {public settings}, "key": "<key id>", "sealed": "<base64>", "version": 1}

Everything but ``sealed`` is the associated data of the seal (ChaCha20-Poly1305, RFC 8439):
where a setting was edited, it does not open, and no password goes to a relay that the
owner of the key did not choose.  An account without a secret is sealed as well.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
from functools import lru_cache
from typing import Any, Final, NamedTuple

from .account import HIDDEN, Account
from .key import Key

VERSION: Final = 1
MAX_SIZE: Final = 16 * 1024  # bytes of an account file

_NONCE_SIZE: Final = 12  # bytes
_TAG_SIZE: Final = 16  # bytes
_KEYS: Final = {"version", "account", "key", "sealed"}


class Stored(NamedTuple):
    """An account file that was read, but not opened."""

    account: Account  # a password as `HIDDEN`
    key_id: str
    sealed: bytes
    bound: bytes  # what the seal vouches for

    @property
    def version(self) -> str:
        """Names this seal: each has a nonce of its own."""
        return hashlib.blake2b(self.sealed, digest_size=8).hexdigest()


def seal(account: Account, key: Key) -> bytes:
    """Return the file of an account."""
    # Here, not above: to import the package, and to send, takes no cryptography.
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    document = {"version": VERSION, "account": account.public(), "key": key.id}
    # One character in front tells an empty password from none.
    password = f"={account.secret.reveal()}" if account.secret else ""
    nonce = secrets.token_bytes(_NONCE_SIZE)
    sealed = ChaCha20Poly1305(key.reveal()).encrypt(
        nonce, password.encode("utf-8", "surrogatepass"), _canonical(document)
    )
    return _canonical(document | {"sealed": base64.b64encode(nonce + sealed).decode()}) + b"\n"


def unseal(stored: Stored, key: Key) -> Account | None:
    """Return the account with its secret, or None: the seal does not hold."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce, sealed = stored.sealed[:_NONCE_SIZE], stored.sealed[_NONCE_SIZE:]
    try:
        plain = ChaCha20Poly1305(key.reveal()).decrypt(nonce, sealed, stored.bound)
    except (InvalidTag, ValueError):
        return None
    if not plain:
        return stored.account
    return stored.account.replace(password=plain[1:].decode("utf-8", "surrogatepass"))


# By content, so that a cached answer is never older than the file: saves the checks of
# `Account`, half the cost of a look-up.
@lru_cache(maxsize=4096)
def parse(data: bytes) -> Stored:
    """Read the file of an account.  Raises ValueError, saying why; never quotes a secret."""
    document = _document(data)
    if document.keys() != _KEYS:
        raise ValueError("is no account file")
    settings, key_id = document["account"], document["key"]
    try:
        sealed = base64.b64decode(document.pop("sealed"), validate=True)
        has_secret = len(sealed) > _NONCE_SIZE + _TAG_SIZE
        account = Account(**settings, password=HIDDEN if has_secret else None)
    except (TypeError, binascii.Error):
        raise ValueError("is damaged") from None
    if not isinstance(key_id, str):
        raise ValueError("names no key")
    return Stored(account, key_id, sealed, _canonical(document))


def deletion(mailbox: str) -> bytes:
    """Return the staged file that stands for a deletion."""
    return _canonical({"delete": mailbox, "version": VERSION})


def is_deletion(data: bytes) -> bool:
    """Tell a staged deletion from a staged account, which we wrote, too."""
    return data.startswith(b'{"delete":')


def staged_mailbox(data: bytes) -> str:
    """Return whose change was staged; "" where the file is cut off."""
    try:
        document = _document(data)
        return str(document.get("delete") or document["account"]["mailbox"])
    except (ValueError, LookupError, TypeError):
        return ""


def _document(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_SIZE:
        raise ValueError(f"has more than {MAX_SIZE} bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("is cut off or damaged") from None
    if not isinstance(document, dict) or "version" not in document:
        raise ValueError("is no account file")
    if document["version"] != VERSION:
        raise ValueError(f"has version {document['version']!r:.20}; this release reads {VERSION}")
    return document


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
