"""Strict syntax of MAIL and RCPT (RFC 5321 section 4.1.1, RFC 6531)."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_PATH = (
    rb'<((?:"(?:[^"\\\x00-\x1f]|\\[ -~])*"|[^<>()\[\],;:\\"@\s\x00-\x1f]+)@[^<>@\s\x00-\x1f]+|)>'
)
_PARAMS = rb"((?: [A-Za-z0-9][A-Za-z0-9-]*(?:=[!-<>-~]+)?)*)\Z"
_MAIL = re.compile(rb"MAIL FROM:" + _PATH + _PARAMS, re.IGNORECASE)
_RCPT = re.compile(rb"RCPT TO:" + _PATH + _PARAMS, re.IGNORECASE)
_POSTMASTER = re.compile(rb"RCPT TO:<(postmaster)>" + _PARAMS, re.IGNORECASE)

#: Keyword of a parameter: the extension that brings it.
_MAIL_PARAMS: Final = {
    "SIZE": "SIZE",
    "BODY": "8BITMIME",
    "SMTPUTF8": "SMTPUTF8",
    "RET": "DSN",
    "ENVID": "DSN",
    "AUTH": "AUTH",
}
_RCPT_PARAMS: Final = {"NOTIFY": "DSN", "ORCPT": "DSN"}


class Path(NamedTuple):
    """An address with its parameters, by upper-case keyword."""

    address: str
    params: dict[str, str]


class SyntaxRefused(ValueError):
    """The text is the reply."""


def parse_mail(line: bytes, offered: frozenset[str]) -> Path:
    """Return the sender; "" is the null reverse-path.  Raises `SyntaxRefused`."""
    path = _parse(_MAIL.match(line), _MAIL_PARAMS, offered)
    params = path.params
    if not params.get("SIZE", "0").isdecimal():
        raise SyntaxRefused("501 5.5.4 SIZE is a number")
    if params.get("BODY", "7BIT").upper() not in ("7BIT", "8BITMIME"):
        raise SyntaxRefused("501 5.5.4 BODY is 7BIT or 8BITMIME")
    if params.get("SMTPUTF8"):
        raise SyntaxRefused("501 5.5.4 SMTPUTF8 has no value")
    if not path.address.isascii() and "SMTPUTF8" not in params:
        raise SyntaxRefused("553 5.6.7 address needs SMTPUTF8")
    return path


def parse_rcpt(line: bytes, offered: frozenset[str], *, utf8: bool) -> Path:
    """Return a recipient.  `utf8`: MAIL said SMTPUTF8.  Raises `SyntaxRefused`."""
    path = _parse(_RCPT.match(line) or _POSTMASTER.match(line), _RCPT_PARAMS, offered)
    if not path.address:
        raise SyntaxRefused("501 5.1.3 the null path is no recipient")
    if not path.address.isascii() and not utf8:
        raise SyntaxRefused("553 5.6.7 address needs SMTPUTF8")
    return path


def _parse(match: re.Match[bytes] | None, known: dict[str, str], offered: frozenset[str]) -> Path:
    if match is None:
        raise SyntaxRefused("501 5.5.4 syntax: MAIL FROM:<address> or RCPT TO:<address>")
    try:
        address = match[1].decode()
    except UnicodeDecodeError:
        raise SyntaxRefused("501 5.5.2 the address is not UTF-8") from None
    if not match[2]:
        return Path(address, {})
    params: dict[str, str] = {}
    for word in match[2].decode("ascii").split():
        keyword, _, value = word.partition("=")
        keyword = keyword.upper()
        if known.get(keyword) not in offered:
            raise SyntaxRefused(f"555 5.5.4 {keyword} is not offered")
        if keyword in params:
            raise SyntaxRefused(f"501 5.5.4 {keyword} stands twice")
        params[keyword] = value
    return Path(address, params)
