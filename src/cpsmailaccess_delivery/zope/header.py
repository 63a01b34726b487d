"""The header of a message as people read it.  Pure; takes anything, raises nothing."""

from __future__ import annotations

import re
from email.errors import MessageError
from email.header import decode_header
from typing import Final

from ..wording import clean

_END = re.compile(rb"\r?\n\r?\n|\r\r|\A\r?\n")
_FOLD = re.compile(r"\r?\n[ \t]+|\r[ \t]+")
_LINES = re.compile(r"\r\n|\n|\r")

#: Fields and characters of a field that are shown.
_MOST_FIELDS: Final = 200
_LONGEST: Final = 2000


def header_of(message: bytes) -> list[tuple[str, str]]:
    """Return the names and values of a message's fields: unfolded, decoded, made harmless."""
    end = _END.search(message)
    text = message[: end.start() if end else None].decode("utf-8", "backslashreplace")
    fields = []
    for line in _LINES.split(_FOLD.sub(" ", text))[:_MOST_FIELDS]:
        name, colon, value = line.partition(":")
        if colon:
            fields.append((clean(name.strip()), _shortened(clean(_decoded(value.strip())))))
        elif line:
            fields.append(("", _shortened(clean(line))))  # is no field: shown as it stands
    return fields


def _decoded(value: str) -> str:
    """Return a value with its encoded words (RFC 2047) decoded, or as it stands."""
    value = value[: 2 * _LONGEST]
    if "=?" not in value:
        return value
    try:
        parts = [
            part.decode(charset or "latin-1", "replace") if isinstance(part, bytes) else part
            for part, charset in decode_header(value)
        ]
    except (MessageError, ValueError, LookupError):
        return value
    return "".join(parts)


def _shortened(value: str) -> str:
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]} ..."
