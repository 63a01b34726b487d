"""One try to deliver an entry: what is sent, and what its results mean for the mail."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, Final

from .bounce import age_text
from .dsn import SUCCESS, Wish, wants
from .interfaces import Entry, Outcome, Settlement, State
from .outcome import Phase, Trouble, classify
from .report import EXPIRED, GIVEN_UP
from .retry import Schedule
from .smtp.events import Result

#: Outcomes after which a recipient is not tried again.
FINAL = frozenset({State.ACCEPTED, State.REFUSED})

_ALL_ACCEPTED: Final = frozenset({State.ACCEPTED})

#: Of several outcomes, what is said of the mail: the first that occurs.
_WORST_FIRST = (
    State.QUEUED,
    State.DEFERRED,
    State.HELD,
    State.UNCLEAR,
    State.REFUSED,
    State.CANCELLED,
    State.ACCEPTED,
)


#: Upper bounds, in seconds, by which attempts are counted.
TIME_BOUNDS: Final = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)


class Times:
    """How long attempts took: ``counts`` by `TIME_BOUNDS` and over, and the ``total``."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(TIME_BOUNDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(TIME_BOUNDS, seconds)] += 1
        self.total += seconds


class Attempt:
    """The lease of an entry on its way through a session: a `smtp.session.Mail`."""

    __slots__ = ("lease", "message", "notified", "recipients", "relayed", "sender", "wish")

    def __init__(self, lease: Any) -> None:
        self.lease = lease
        self.sender: str = lease.envelope.sender
        self.message: bytes = lease.message
        self.wish: Wish | None = lease.envelope.wish
        self.relayed: dict[str, Outcome] = {}  # see `relayed_of`
        self.notified = False  # whether the notices of its settlement are durable
        self.recipients = _open_recipients(lease.envelope.recipients, lease.outcomes)

    @property
    def since(self) -> float:
        """When it could first be sent, in seconds since the epoch; 0: not known."""
        not_before: float = self.lease.envelope.not_before
        return max(self.entry.staged_at, not_before)

    @property
    def entry(self) -> Entry:
        entry: Entry = self.lease.entry
        return entry


def account_trouble(results: Mapping[str, Result]) -> Result | None:
    """Return a result that shows that the account must be mended, not the mail.

    Only when it is so for every recipient: then the mail was not really tried, and nothing
    has to be recorded of it.
    """
    found = None
    for found in results.values():
        verdict = classify(found.phase, found.reply, found.error)
        if verdict.trouble not in (Trouble.ACCOUNT, Trouble.LOGIN):
            return None
    return found


def were_too_many(results: Mapping[str, Result]) -> bool:
    """Whether the relay took some recipients, and all others were only too many for one mail.

    RFC 5321 section 4.5.3.1.10: 452, or 552 of old relays; they go in a next transaction,
    without a wait.
    """
    taken = left = False
    for result in results.values():
        state = classify(result.phase, result.reply, result.error).state
        code = result.reply.code if result.reply else 0
        if state is State.ACCEPTED:
            taken = True
        elif result.phase is Phase.RCPT and code in (452, 552):
            left = True
        elif state is not State.REFUSED:
            return False
    return taken and left


def outcomes_of(attempt: Attempt, results: Mapping[str, Result], now: float) -> dict[str, Outcome]:
    """Return the outcomes of this attempt, by recipient."""
    outcomes = {}
    for recipient in attempt.recipients:
        result = results[recipient]
        verdict = classify(result.phase, result.reply, result.error)
        outcomes[recipient] = Outcome(verdict.state, result.text, now)
    return outcomes


def relayed_of(
    attempt: Attempt, results: Mapping[str, Result], outcomes: Mapping[str, Outcome]
) -> dict[str, Outcome]:
    """Return who was accepted, when the sender wants to know and the relay will not tell him.

    RFC 3461 section 5.2.2: then we do, and say ``relayed``.
    """
    if attempt.wish is None or not wants(attempt.wish.notify, SUCCESS):
        return {}
    return {
        recipient: outcome
        for recipient, outcome in outcomes.items()
        if outcome.state is State.ACCEPTED and not results[recipient].notifies
    }


def settlement_of(
    attempt: Attempt,
    outcomes: Mapping[str, Outcome],
    *,
    schedule: Schedule,
    now: float,
    chance: float,
    at_once: bool = False,
) -> Settlement:
    """Return what is to be recorded: the state of the mail, and when it is tried again.

    `at_once`: who is deferred is tried again without a wait, see `were_too_many`.

    A recipient whose attempt ended unclear is tried once more (at least once is the
    promise); unclear for the second time, the mail is held for a person.
    """
    earlier: Mapping[str, Outcome] = attempt.lease.outcomes
    if not earlier and {outcome.state for outcome in outcomes.values()} == _ALL_ACCEPTED:
        return ACCEPTED
    known = {**earlier, **outcomes}
    attempts = attempt.entry.attempts + 1
    if any(_unclear(outcomes, r) and _unclear(earlier, r) for r in outcomes):
        reason = "unclear twice: nobody knows whether the relay took it"
        return Settlement(State.UNCLEAR, known, attempts=attempts, reason=reason)
    state = worst(known)
    if state in FINAL:
        return Settlement(state, known, attempts=attempts)
    envelope = attempt.lease.envelope
    age = now - (attempt.since or now)
    due = schedule.next_try(attempts, age, now, chance)
    if at_once:
        due = math.floor(now)  # in no name later than now
    if due is not None and not (envelope.expires and due >= envelope.expires):
        return Settlement(state, known, due=due, attempts=attempts)
    reason = EXPIRED if due is not None else f"{GIVEN_UP}{attempts} attempts"
    known = {recipient: _expired(outcome, reason) for recipient, outcome in known.items()}
    return Settlement(worst(known), known, attempts=attempts, reason=reason)


def expiry_of(attempt: Attempt, now: float) -> Settlement | None:
    """Return how a mail is settled that may not be tried any more; None: it may.

    What is unclear stays so, for a person: expired or not, the relay may have it.
    """
    envelope = attempt.lease.envelope
    if not envelope.expires or now < envelope.expires:
        return None
    untried = dict.fromkeys(attempt.recipients, Outcome(State.REFUSED, EXPIRED, now))
    known = {**untried, **attempt.lease.outcomes}
    known = {recipient: _expired(outcome, EXPIRED) for recipient, outcome in known.items()}
    return Settlement(worst(known), known, attempts=attempt.entry.attempts, reason=EXPIRED)


def waiting_of(attempt: Attempt, reason: str, *, now: float, expired: bool) -> Settlement:
    """Return what is recorded of a mail that waits for its lane, and was not tried.

    `reason`: why the lane waits.  `expired`: it has waited too long, and is given up.
    """
    earlier: Mapping[str, Outcome] = attempt.lease.outcomes
    outcome = Outcome(State.DEFERRED, reason, now)
    if expired:
        age = age_text(now - attempt.since)
        outcome = Outcome(State.REFUSED, f"{GIVEN_UP}{age}; {reason}", now)
    waiting = {r: outcome for r in attempt.recipients if not _unclear(earlier, r)}
    known = {**earlier, **waiting}
    attempts = attempt.entry.attempts
    if expired:
        return Settlement(worst(known), known, attempts=attempts, reason=outcome.reply)
    return Settlement(worst(known), known, due=now, attempts=attempts)


def worst(outcomes: Mapping[str, Outcome]) -> State:
    """Return what is said of a mail whose recipients have these outcomes."""
    states = {outcome.state for outcome in outcomes.values()}
    return next(state for state in _WORST_FIRST if state in states)


#: Every recipient was accepted: nothing to remember but the journal's line.
ACCEPTED = Settlement(State.ACCEPTED)


def _open_recipients(
    recipients: tuple[str, ...], outcomes: Mapping[str, Outcome]
) -> tuple[str, ...]:
    """Return who is tried now: who is not settled.  Nobody: a person retries a refused mail."""
    if not outcomes:
        return recipients
    states = {r: outcomes[r].state if r in outcomes else State.QUEUED for r in recipients}
    unsettled = tuple(r for r in recipients if states[r] not in FINAL)
    return unsettled or tuple(r for r in recipients if states[r] is State.REFUSED)


def _unclear(outcomes: Mapping[str, Outcome], recipient: str) -> bool:
    return recipient in outcomes and outcomes[recipient].state is State.UNCLEAR


def _expired(outcome: Outcome, reason: str) -> Outcome:
    if outcome.state is not State.DEFERRED:
        return outcome
    return Outcome(State.REFUSED, f"{reason}; {outcome.reply}", outcome.at)
