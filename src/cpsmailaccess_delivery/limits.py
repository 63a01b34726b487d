"""How fast an account may send: what providers publish, and what has passed lately."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Final

from .outcome import Phase
from .smtp.reply import Reply

#: Mails per minute that providers publish for one mailbox, by the end of the host name.
_PUBLISHED: Final = {
    "smtp.office365.com": 30,
    "smtp-mail.outlook.com": 30,
    "mail.protection.outlook.com": 30,
}

#: Seconds: what is left of a wait by then is the rounding of numbers.
_ROUNDING: Final = 1e-6


def mails_per_minute(host: str, own: int | None) -> int | None:
    """Return the limit of an account: its own, else the one its provider publishes."""
    if own is not None:
        return own
    for suffix, limit in _PUBLISHED.items():
        if host == suffix or host.endswith("." + suffix):
            return limit
    return None


@dataclass(frozen=True, slots=True)
class Pace:
    """Lets ``per_minute`` pass a minute, at most a sixth of them (ten seconds' worth) at once.

    Of what has passed one number is kept, by the caller: ``spent``, when as many as ever may pass
    at once; seconds on his clock, 0 at first.  So it can go from one process to another.
    """

    per_minute: int

    @property
    def _step(self) -> float:
        return 60 / self.per_minute

    @property
    def _most(self) -> float:
        return max(self._step, 10.0)  # seconds: what may pass at once is worth so many

    def believed(self, spent: float, now: float) -> float:
        """Return ``spent``, or the most it can be: the clock was put back, or nobody knows it."""
        return min(spent, now + self._most)

    def wait(self, spent: float, now: float) -> float:
        """Return the seconds until one may pass: 0.0 now."""
        wait = spent - now + self._step - self._most
        return wait if wait > _ROUNDING else 0.0

    def spend(self, spent: float, now: float) -> float:
        """Return ``spent`` after one has passed."""
        return max(now, spent) + self._step

    def give_back(self, spent: float) -> float:
        """Return ``spent`` after one did not pass after all."""
        return spent - self._step


#: Said when we ask too much: RFC 5321 section 4.2.2, RFC 4954 section 6.
_BUSY_CODES: Final = (421, 450, 451, 452, 454)

#: Of these, in a session that has delivered already: it is not the session that is used up.
_TOO_MUCH: Final = re.compile(r"concurren|simultaneous|connections|\brate\b|slow|throttl", re.I)

_EARLY: Final = (Phase.CONNECT, Phase.GREETING, Phase.HELLO, Phase.AUTH, Phase.MAIL)


def asks_for_less(phase: Phase, reply: Reply | None, *, delivered: bool = False) -> bool:
    """Whether a relay says that it has too many of us.

    `delivered`: the session had delivered mails before; it is then only its own end that
    most relays announce (so many mails per session), unless their words say otherwise.
    """
    if reply is None or phase not in _EARLY:
        return False
    text = str(reply)
    if not 400 <= reply.code < 500 or (delivered and not _TOO_MUCH.search(text)):
        return False
    return reply.code in _BUSY_CODES or "too many" in text.lower()


@dataclass(slots=True)
class SessionLimit:
    """How many sessions an account may have: its own limit, and what its relay taught us.

    Halved when the relay asks for less, one more after a minute in which it did not
    (additive increase, multiplicative decrease).  Times are seconds on the caller's clock.

    ``most``: the account's limit.
    """

    most: int
    current: int = 0
    at: float = 0.0  # of the last change
    _halved: float = -math.inf

    #: Seconds until one more is tried.
    RECOVER: ClassVar[float] = 60.0

    #: Seconds in which refusals have one cause, and no session more is opened.
    PAUSE: ClassVar[float] = 5.0

    def __post_init__(self) -> None:
        self.current = self.current or self.most

    @property
    def learned(self) -> bool:
        """Whether it is less than the account's own."""
        return self.current < self.most

    def refused(self, now: float, working: int) -> None:
        """The relay asks for less, while `working` sessions go on."""
        if not 0 <= now - self._halved < self.PAUSE:
            self.current //= 2
            self._halved = now
        self.current = max(1, min(self.current, working))
        self.at = now

    def allowed(self, now: float) -> int:
        """Return how many sessions there may be now: asked when there is work for more."""
        if self.learned and not 0 <= now - self.at < self.RECOVER:
            self.current += 1
            self.at = now
        return self.current

    def paused(self, now: float) -> bool:
        """Whether no session more is opened beside those that work."""
        return 0 <= now - self._halved < self.PAUSE

    def next_step(self, now: float) -> float:
        """Return when to ask again."""
        return now + (self.PAUSE if self.paused(now) else self.RECOVER)
