"""The server's side of AUTH (RFC 4954): PLAIN, LOGIN and CRAM-MD5, one step at a time."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
from collections.abc import Generator, Mapping
from typing import Final, TypeAlias

MECHANISMS: Final = ("CRAM-MD5", "PLAIN", "LOGIN")

#: Yields challenges, is sent the client's answers, returns the user name and whether
#: the password was right.
Exchange: TypeAlias = Generator[bytes, bytes, tuple[str, bool]]


def exchange(mechanism: str, users: Mapping[str, str], initial: bytes | None) -> Exchange:
    """Return the dialogue of a mechanism.  `initial`: the client's first answer, decoded.

    UnicodeDecodeError and ValueError from it mean that the client sent nonsense.
    """
    if mechanism == "PLAIN":
        return _plain(users, initial)
    if mechanism == "LOGIN":
        return _login(users, initial)
    return _cram_md5(users, initial)


def decode(line: bytes) -> bytes:
    """Return what a line of the dialogue holds.  Raises ValueError."""
    try:
        return b"" if line == b"=" else base64.b64decode(line, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def _right(users: Mapping[str, str], username: str, password: str) -> bool:
    return username in users and hmac.compare_digest(users[username].encode(), password.encode())


def _plain(users: Mapping[str, str], initial: bytes | None) -> Exchange:
    answer = (yield b"") if initial is None else initial
    _, username, password = answer.decode().split("\0")
    return username, _right(users, username, password)


def _login(users: Mapping[str, str], initial: bytes | None) -> Exchange:
    username = ((yield b"Username:") if initial is None else initial).decode()
    password = (yield b"Password:").decode()
    return username, _right(users, username, password)


def _cram_md5(users: Mapping[str, str], initial: bytes | None) -> Exchange:
    if initial is not None:
        raise ValueError("CRAM-MD5 has no initial response")
    challenge = b"<%s@test>" % os.urandom(8).hex().encode()
    username, _, digest = (yield challenge).decode().rpartition(" ")
    known = users.get(username)
    if known is None:
        return username, False
    expected = hmac.digest(known.encode(), challenge, "md5").hex()
    return username, hmac.compare_digest(expected, digest)
