"""The wire form of a stored message: its line ends and its dots (RFC 5321 section 2.3.8, 4.5.2).

Every line end of any kind becomes CRLF, so that no two programs can disagree on where
the message ends (SMTP smuggling).  Most messages need no stuffing: look, then copy.
"""

from __future__ import annotations


def crlf(message: bytes) -> bytes:
    """Return the message with every line end (CRLF, LF, CR) as CRLF, and one at its end."""
    if b"\r" not in message:
        message = message.replace(b"\n", b"\r\n")
    else:
        pairs = message.count(b"\r\n")
        if message.count(b"\n") != pairs or message.count(b"\r") != pairs:
            message = message.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            message = message.replace(b"\n", b"\r\n")
    return message if message.endswith(b"\r\n") else message + b"\r\n"


def stuff(lines: bytes) -> bytes:
    """Return CRLF lines with every leading dot doubled (RFC 5321 section 4.5.2)."""
    if b"\n." in lines:
        lines = lines.replace(b"\n.", b"\n..")
    return b"." + lines if lines.startswith(b".") else lines


def is_8bit(message: bytes) -> bool:
    """Tell whether an octet has its high bit set, in the header or in the body."""
    return not message.isascii()


def split_header(lines: bytes) -> tuple[bytes, bytes]:
    """Return header and body of CRLF lines; the empty line between them belongs to the body."""
    if lines.startswith(b"\r\n"):
        return b"", lines
    end = lines.find(b"\r\n\r\n")
    return (lines, b"") if end < 0 else (lines[: end + 2], lines[end + 2 :])
