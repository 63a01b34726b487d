"""The mails that are sent: each says in its Message-ID what it is and where it belongs."""

from __future__ import annotations

import re
from functools import cache

#: One mail in so many has a Bcc field, and lines that begin with a dot.
SPECIAL = 16

MESSAGE_ID = re.compile(rb"\r\nmessage-id: <(\d+)\.(\d+)@bench>\r\n", re.IGNORECASE)
PRIVATE = re.compile(rb"\r\n(?:x-zope-[!-9;-~]*|(?:resent-)?bcc)[ \t]*:", re.IGNORECASE)

_LINE = b"Lorem ipsum dolor sit amet, consectetur adipisici elit, sed eiusmod tempor.\r\n"
_DOTS = b".\r\n..\r\n.Lorem\r\n"


def sender_of(lane: int) -> str:
    return f"user{lane}@lane{lane}.example"


def recipient_of(number: int) -> str:
    return f"r{number}@example.net"


def password_of(lane: int) -> str:
    return f"secret-{lane}"


@cache
def text_of(special: bool, size: int) -> bytes:
    """Return the body on the wire, not dot-stuffed, of a mail of about so many bytes."""
    start = _DOTS if special else b""
    rest = max(size - 300 - len(start), len(_LINE))
    return start + _LINE * (rest // len(_LINE))


@cache
def _stored_text(special: bool, size: int) -> bytes:
    return text_of(special, size).replace(b"\r\n", b"\n")


def message(number: int, lane: int, size: int) -> bytes:
    """Return a message with line ends as applications write them."""
    special = number % SPECIAL == 0
    bcc = "Bcc: secret@example.net\n" if special else ""
    header = (
        f"From: User {lane} <{sender_of(lane)}>\n"
        f"To: <{recipient_of(number)}>\n{bcc}"
        f"Subject: Mail {number} of the benchmark\n"
        "Date: Mon, 23 Nov 2026 12:00:00 +0000\n"
        f"Message-ID: <{number}.{lane}@bench>\n"
        "MIME-Version: 1.0\nContent-Type: text/plain; charset=us-ascii\n\n"
    )
    return header.encode() + _stored_text(special, size)
