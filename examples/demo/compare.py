"""Whether a received mail is the one that was sent.

Written without the package's own code, so that the two can contradict each other.
"""

from __future__ import annotations

import re

_BCC = re.compile(rb"^(?:resent-)?bcc[ \t]*:.*\n(?:[ \t].*\n)*", re.IGNORECASE | re.MULTILINE)
_ADDED = {
    b"message-id": re.compile(rb"Message-Id: <[^<>\n]+>\n"),
    b"date": re.compile(rb"Date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d [+-]\d{4}\n"),
}


def difference(sent: bytes, received: bytes) -> str:
    """Return in words where the received mail differs from the sent one; "": nowhere.

    Line ends aside, less Bcc, plus Message-Id and Date in front where they were missing.
    """
    expected, got = _lines(sent), _lines(received)
    header, gap, body = expected.partition(b"\n\n")
    header = _BCC.sub(b"", header + b"\n" if gap else header)
    for name, pattern in _ADDED.items():
        if not re.search(rb"^" + name + rb"[ \t]*:", header, re.IGNORECASE | re.MULTILINE):
            found = pattern.match(got)
            if not found:
                return f"{name.decode()} was missing and has not been added"
            got = got[found.end() :]
    expected = header + (b"\n" + body if gap else b"")
    if got == expected:
        return ""
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b),
        min(len(expected), len(got)),
    )
    return (
        f"differs at byte {at} of {len(expected)}: sent {expected[at : at + 24]!r},"
        f" received {got[at : at + 24]!r}"
    )


def _lines(data: bytes) -> bytes:
    """Return the text with LF line ends, the last line ended too, as SMTP must do."""
    text = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return text if text.endswith(b"\n") else text + b"\n"
