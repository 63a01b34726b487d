"""What the test server writes down."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

_MESSAGE_ID = re.compile(rb"^message-id[ \t]*:\s*<([^>\r\n]*)>", re.IGNORECASE | re.MULTILINE)
_PRIVATE = re.compile(
    rb"^((?:x-zope-[!-9;-~]*|(?:resent-)?bcc))[ \t]*:", re.IGNORECASE | re.MULTILINE
)


@dataclass(slots=True)
class ReceivedMail:
    """One mail that the server took.

    ``data``: every byte as it came, less dot stuffing (RFC 5321 section 4.5.2) and chunk
    framing; empty when the server does not keep bodies.  ``params``: of MAIL, by
    upper-case keyword; ``recipient_params``: of RCPT, by recipient.  ``private``: names of header
    fields that should never leave an outbox (``X-Zope-...``, ``Bcc``).  ``at``: seconds
    since the epoch.
    """

    sender: str
    recipients: tuple[str, ...]
    data: bytes
    size: int
    message_id: str
    private: tuple[str, ...]
    username: str | None
    tls: bool
    session: int
    at: float
    params: dict[str, str] = field(default_factory=dict)
    recipient_params: dict[str, dict[str, str]] = field(default_factory=dict)


class Command(NamedTuple):
    """One line that a client sent; the end of data stands as ``.``.

    ``group`` numbers what arrived in one read, so that tests see the pipelining.
    What follows the mechanism in AUTH is not kept.
    """

    session: int
    group: int
    line: str


class Login(NamedTuple):
    """One try to log in."""

    session: int
    mechanism: str
    username: str
    accepted: bool


def look_at_header(data: bytes) -> tuple[str, tuple[str, ...]]:
    """Return the Message-Id without angle brackets, or "", and the private fields."""
    end = data.find(b"\r\n\r\n")
    header = data if end < 0 else data[: end + 2]
    found = _MESSAGE_ID.search(header)
    private = tuple(match[1].decode() for match in _PRIVATE.finditer(header))
    return found[1].decode("utf-8", "replace") if found else "", private
