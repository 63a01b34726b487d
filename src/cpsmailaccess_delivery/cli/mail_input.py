"""A mail as sendmail's users write it on standard input: read, understood, completed.

Not here: Bcc, Message-Id and Date, see `message.complete`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.errors import InvalidHeaderDefect, NonASCIILocalPartDefect
from email.policy import SMTPUTF8
from email.utils import formataddr
from typing import Any, BinaryIO, Final

from ..errors import InvalidAddress, MessageTooLarge

_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:([^\r\n]*(?:\r?\n[ \t][^\r\n]*)*)(?:\r?\n|\Z)")
_MBOX_LINE = re.compile(rb"From [^\r\n]*\r?\n")

_LOCAL_NAME = re.compile(r"(?<![^,])\s*([A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]+)\s*(?![^,])")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

_RECIPIENTS: Final = ("to", "cc", "bcc")


@dataclass
class Mail:
    """A message and its header fields, in order: lower-case name and value."""

    data: bytes
    fields: list[tuple[str, str]]
    eol: bytes

    @classmethod
    def parse(cls, data: bytes) -> Mail:
        """Find the header; put the empty line after it that a script may have left out.

        Input without a header is a body, as it is for sendmail; mbox's first line goes.
        """
        if match := _MBOX_LINE.match(data):
            data = data[match.end() :]
        fields, position = [], 0
        while match := _FIELD.match(data, position):
            value = re.sub(r"\r?\n(?=[ \t])", "", match[2].decode("utf-8", "replace")).strip()
            fields.append((match[1].decode("ascii").lower(), value))
            position = match.end()
        line = re.search(rb"\r?\n", data)
        eol = line[0] if line else b"\n"
        if data[position : position + 1] not in (b"\r", b"\n"):
            end = b"" if data[:position].endswith(b"\n") or not position else eol
            data = data[:position] + end + eol + data[position:]
        return cls(data, fields, eol)

    def author(self, host: str) -> str:
        """Return the address of the From field; "" when there is none, or several.

        Raises `InvalidAddress`.
        """
        found = [
            address
            for name, value in self.fields
            if name == "from"
            for address in _addresses(name, value, host)
        ]
        return found[0] if len(found) == 1 else ""

    def recipients(self, host: str) -> list[str]:
        """Return who stands in To, Cc and Bcc; in a resent mail, in the Resent- ones.

        Raises `InvalidAddress`.
        """
        names = {name for name, _ in self.fields}
        resent = tuple("resent-" + name for name in _RECIPIENTS)
        wanted = resent if names.intersection(resent) else _RECIPIENTS
        return [
            address
            for name, value in self.fields
            if name in wanted and value
            for address in _addresses(name, value, host)
        ]

    def add_author(self, address: str, name: str) -> None:
        """Add the From field, if it is missing."""
        if not any(field == "from" for field, _ in self.fields):
            # RFC 5322 section 3.6.2; a name beyond ASCII becomes an encoded word
            name = name.encode("utf-8", "replace").decode()  # the shell may give any bytes
            value = formataddr((name, address)) if address.isascii() else address
            self.data = b"From: " + value.encode("utf-8", "surrogateescape") + self.eol + self.data


def read_mail(stream: BinaryIO, *, dot_ends: bool, size_limit: int) -> bytes:
    """Read to the end of the input or, if `dot_ends`, to a line with a single dot.

    Raises `MessageTooLarge` as soon as that is sure.
    """
    lines = _until_dot(stream, size_limit) if dot_ends else [stream.read(size_limit + 1)]
    data = b"".join(lines)
    if len(data) > size_limit:
        raise MessageTooLarge(
            f"the message has more than {size_limit:,} bytes: send less, or raise size_limit"
        )
    return data


def qualified(address: str, host: str) -> str:
    """Return the address, a local name with the name of this host."""
    address = address.strip()
    return address if "@" in address or not address else f"{address}@{host}"


def split_addresses(text: str, host: str) -> list[str]:
    """Return the addresses of one argument: ``a@example.org, Bob <b@example.org>, root``.

    Local names get `host`.  Raises `InvalidAddress`.
    """
    return _addresses("to", text, host)


def _until_dot(stream: BinaryIO, size_limit: int) -> Iterator[bytes]:
    left = size_limit + 1
    while left > 0 and (line := stream.readline(left)):
        if line in (b".\n", b".\r\n", b"."):
            return
        yield line
        left -= len(line)


def _addresses(name: str, value: str, host: str) -> list[str]:
    """Read an address list (RFC 5322 section 3.4): groups, comments and quotes included.

    What the email package reads by guessing is refused: a recipient must not get lost.
    """
    header = _parsed(name, value)
    if header is None or _guessed(header):
        header = _parsed(name, _LOCAL_NAME.sub(lambda match: f"{match[1]}@{host}", value))
    if header is None or _guessed(header):
        raise InvalidAddress(
            f"{name}: {value[:80]!r}: is no list of addresses (RFC 5322 section 3.4)"
        )
    return [address.addr_spec for address in header.addresses]


def _parsed(name: str, value: str) -> Any:
    if _CONTROL.search(value):
        return None
    try:  # the email package knows no Resent-Bcc
        return SMTPUTF8.header_factory("to" if name.endswith("bcc") else name, value)
    except (IndexError, ValueError, TypeError, AttributeError):  # its parser's own faults
        return None


def _guessed(header: Any) -> bool:
    return any(
        isinstance(defect, InvalidHeaderDefect) and not isinstance(defect, NonASCIILocalPartDefect)
        for defect in header.defects
    )
