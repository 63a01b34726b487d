"""What the doctor has to say."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Finding:
    """``text``: what was seen.  ``advice``: what to do; "" when nothing is."""

    check: str
    level: Level
    text: str
    advice: str = ""
