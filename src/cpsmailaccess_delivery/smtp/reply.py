"""An SMTP reply (RFC 5321 section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply, all its lines.

    ``code``: three digits.  ``text``: its lines joined by a space, hostile text, control
    characters replaced.  ``enhanced``: ``"4.7.1"`` (RFC 3463), or "".
    """

    code: int
    text: str = ""
    enhanced: str = ""

    def __str__(self) -> str:
        return f"{self.code} {self.text}".rstrip()
