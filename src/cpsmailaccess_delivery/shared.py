"""What the parts of one processor share: where mails and accounts are, and how it works."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .retry import Schedule
from .share import Share


@dataclass(frozen=True, slots=True)
class Shared:
    """Given once, never changed.

    ``helo_name``: how we introduce ourselves to relays.  ``draining``: what is due is tried
    once, then the processor ends.  ``share``: the lanes that are ours.  ``now``, ``chance``:
    seconds since the epoch, and a number in [0, 1).
    """

    spool: Any
    accounts: Any
    journal: Any
    announcer: Any
    loop: asyncio.AbstractEventLoop
    helo_name: str
    schedule: Schedule
    draining: bool
    share: Share
    now: Callable[[], float]
    chance: Callable[[], float]
