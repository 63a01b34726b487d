"""Login mechanisms (RFC 4954): CRAM-MD5 (RFC 2195), PLAIN (RFC 4616), LOGIN."""

from __future__ import annotations

import hmac
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from collections.abc import Set
from hashlib import algorithms_available
from json import dumps
from typing import Final
from urllib.parse import quote

from ..account import Secret
from .reply import ProtocolError

#: The strongest first.  Some systems forbid MD5.
MECHANISMS: Final = ("CRAM-MD5", "PLAIN", "LOGIN")

#: How programs write a byte that is not ASCII.
_ESCAPES: Final = (b"\\x%02x", b"\\x%02X", b"\\%03o", b"%%%02x", b"%%%02X", b"=%02X")


def spoken_forms(username: str, secret: Secret) -> tuple[bytes, ...]:
    """Return the password as it is, and as PLAIN and LOGIN say it: no log may show them.

    All of them, whatever is said now: a relay may know it from an earlier session.  And as its
    programs may quote it, where it is not plain ASCII: for C, Python, JSON and URLs.
    """
    text = secret.reveal()
    user, password = username.encode(), text.encode()
    quoted = (ascii(text)[1:-1], repr(password)[2:-1], dumps(text)[1:-1], quote(text, safe=""))
    return (
        *(password, b64encode(password), b64encode(b"\0%b\0%b" % (user, password))),
        *(each.encode() for each in quoted),
        *(_escaped(password, form) for form in _ESCAPES),
    )


def _escaped(text: bytes, form: bytes) -> bytes:
    return b"".join(b"%c" % byte if 32 <= byte < 127 else form % byte for byte in text)


def usable(offered: Set[str]) -> list[str]:
    """Return the mechanisms that both sides know, the strongest first."""
    return [
        mechanism
        for mechanism in MECHANISMS
        if mechanism in offered and (mechanism != "CRAM-MD5" or "md5" in algorithms_available)
    ]


class Login:
    """One login by one mechanism: the lines that we say.  Never shows what it holds."""

    __slots__ = ("_secret", "_step", "_username", "mechanism", "said")

    def __init__(self, mechanism: str, username: str, secret: Secret) -> None:
        self.mechanism = mechanism
        self._username = username.encode()
        self._secret = secret
        self._step = 0
        self.said: list[bytes] = []  # what a relay might echo, and no log may show

    def command(self) -> bytes:
        """Return the AUTH command, without its line end."""
        if self.mechanism != "PLAIN":
            return b"AUTH " + self.mechanism.encode()
        return b"AUTH PLAIN " + self._say(b"\0%b\0%b" % (self._username, self._password()))

    def answer(self, challenge: bytes) -> bytes:
        """Return the answer to the text of a 334 reply.  Raises `ProtocolError`."""
        self._step += 1
        if self.mechanism == "LOGIN" and self._step == 1:
            return self._say(self._username)
        if self.mechanism == "LOGIN" and self._step == 2:
            return self._say(self._password())
        if self.mechanism == "CRAM-MD5" and self._step == 1:
            try:
                text = b64decode(challenge.strip(), validate=True)
            except Base64Error:
                raise ProtocolError("the relay's login challenge is not base64") from None
            digest = hmac.new(self._password(), text, "md5").hexdigest()
            return self._say(self._username + b" " + digest.encode())
        raise ProtocolError(f"the relay asks for more than {self.mechanism} has to say")

    def _password(self) -> bytes:
        return self._secret.reveal().encode()

    def _say(self, text: bytes) -> bytes:
        token = b64encode(text)
        self.said.append(token)
        return token
