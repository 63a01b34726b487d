"""How people read things: times as words, strangers' texts made harmless.

Addresses, subjects and relays' replies are written by strangers.  They must not move the
cursor, set a title, or turn the text round.
"""

from __future__ import annotations

import re
import time

# Control characters (C0, DEL, C1), bidirectional marks, line separators, lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_UNSAFE_BUT_LINES = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))


def clean(text: object) -> str:
    """Return a text in one line, with what a terminal might obey made visible."""
    return _UNSAFE.sub(_visible, str(text))


def clean_lines(text: str) -> str:
    """Return the same of a text of several lines: line feeds and tabs stay."""
    return _UNSAFE_BUT_LINES.sub(_visible, text.replace("\r\n", "\n"))


def age(seconds: float) -> str:
    """Return a span of time as people say it: 40s, 12m, 3h, 5d."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def counted(number: int, one: str, many: str) -> str:
    """Return a number, and what so many of something do: 1 mail waits, 2 mails wait."""
    return f"{number:,} {one if number == 1 else many}"


def moment(when: float) -> str:
    """Return a time (seconds since the epoch) in local time; "" for none."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if when else ""


def upcoming(when: float, now: float) -> str:
    """Return when something is due: ``now``, or in how long."""
    return f"in {age(when - now)}" if when > now else "now"


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
