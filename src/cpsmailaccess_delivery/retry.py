"""When to try again: a value.  The clock and the chance are passed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .errors import InvalidSettings

#: What may become of recipients that are unclear: see `Schedule`.
UNCLEAR_POLICIES: Final = ("retry", "hold")

_LEAST_ATTEMPTS: Final = 5
_MONTH: Final = 30 * 86400.0  # seconds


@dataclass(frozen=True, slots=True)
class Schedule:
    """Growing delays, in seconds, spread by chance so that lanes do not march in step.

    ``first``: after the first attempt.  ``factor``: growth.  ``longest``: between two
    attempts.  ``jitter``: at most this share is added to a delay.
    ``give_up``: age of a mail after which it is not tried again (RFC 5321 section
    4.5.4.1 asks for 4 to 5 days).  ``delay_notice``: age at which its sender is told that it
    waits; 0: never.  ``unclear``: of a recipient of which nobody knows whether the relay took
    the mail: ``retry`` once more, then hold it for a person; ``hold`` it at once.
    """

    first: float = 60.0
    factor: float = 2.0
    longest: float = 4 * 3600.0
    jitter: float = 0.25
    give_up: float = 5 * 86400.0
    delay_notice: float = 4 * 3600.0
    unclear: str = "retry"

    def __post_init__(self) -> None:
        rules = {
            "first": 0 < self.first <= _MONTH,
            "factor": 1 <= self.factor <= 100,
            "longest": 0 < self.longest <= _MONTH,
            "jitter": 0 <= self.jitter <= 1,
            "give_up": 0 < self.give_up <= 12 * _MONTH,
            "delay_notice": 0 <= self.delay_notice <= 12 * _MONTH,
        }
        for name, holds in rules.items():
            if not holds:
                raise InvalidSettings(
                    f"retry.{name}={getattr(self, name)!r}: first and longest are over 0 and at"
                    " most 30 days in seconds, factor 1 to 100, jitter 0 to 1, give_up over 0 and"
                    " at most 360 days, delay_notice 0 (never) to 360 days"
                )
        if self.unclear not in UNCLEAR_POLICIES:
            raise InvalidSettings(f"unclear={self.unclear!r}: is one of {UNCLEAR_POLICIES}")

    @property
    def doubts(self) -> int:
        """After so many attempts that ended unclear, a recipient waits for a person."""
        return 2 if self.unclear == "retry" else 1

    @property
    def longest_delay(self) -> float:
        """No delay is longer, in seconds."""
        return max(self.first, self.longest) * (1 + self.jitter)

    def delay(self, attempts: int, chance: float) -> float:
        """Return seconds to wait after this many attempts; `chance` is in [0, 1)."""
        exponent = min(max(attempts - 1, 0), 64)
        return min(self.first * self.factor**exponent, self.longest) * (1 + self.jitter * chance)

    def is_over(self, attempts: int, age: float) -> bool:
        """Tell whether to give up; `attempts`: of the mail, or of its lane; see `next_try`."""
        return age >= self.give_up and attempts >= _LEAST_ATTEMPTS

    def next_try(self, attempts: int, age: float, now: float, chance: float) -> float | None:
        """Return when to try again (seconds since the epoch); None: give up.

        `age`: seconds since the mail was queued.  One that has waited for a mended account,
        or since a clock was wrong, still has a few tries.
        """
        if self.is_over(attempts, age):
            return None
        return now + self.delay(attempts, chance)
