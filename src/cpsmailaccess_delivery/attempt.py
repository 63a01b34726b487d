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

#: Why a mail waits for a person, or a part of its recipients does.
FOR_A_PERSON: Final = "unclear: nobody knows whether the relay took it; settle or release it"

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

    __slots__ = (
        "lease",
        "message",
        "news",
        "notified",
        "recipients",
        "relayed",
        "sender",
        "wish",
    )

    def __init__(self, lease: Any) -> None:
        self.lease = lease
        self.sender: str = lease.envelope.sender
        self.message: bytes = lease.message
        self.wish: Wish | None = lease.envelope.wish
        self.relayed: dict[str, Outcome] = {}  # see `relayed_of`
        self.news: Mapping[str, Outcome] = {}  # what it has brought, told when it is recorded
        self.notified = False  # whether the notices of its settlement are durable
        self.recipients = _open_recipients(
            lease.envelope.recipients, lease.outcomes, asked_for=self.entry.state is State.QUEUED
        )

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


def outcomes_of(
    attempt: Attempt, results: Mapping[str, Result], now: float, *, doubts: int = 2
) -> dict[str, Outcome]:
    """Return the outcomes of this attempt, by recipient.

    `doubts`: after so many attempts that ended unclear, a recipient waits for a person.
    """
    earlier: Mapping[str, Outcome] = attempt.lease.outcomes
    outcomes = {}
    for recipient in attempt.recipients:
        result = results[recipient]
        state = classify(result.phase, result.reply, result.error).state
        before = earlier[recipient].doubts if recipient in earlier else 0
        if state is State.UNCLEAR:
            before += 1
            held = before >= doubts
            outcomes[recipient] = Outcome(state, result.text, now, doubts=before, held=held)
        else:
            outcomes[recipient] = Outcome(state, result.text, now, doubts=before)
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
    promise).  One that is held waits for a person, and for it alone nothing is tried again;
    the deferred ones of the same mail are.
    """
    earlier: Mapping[str, Outcome] = attempt.lease.outcomes
    if not earlier and {outcome.state for outcome in outcomes.values()} == _ALL_ACCEPTED:
        return ACCEPTED
    known = {**earlier, **outcomes}
    attempts = attempt.entry.attempts + 1
    state = worst(known)
    asked = FOR_A_PERSON if any(o.held for o in known.values()) else ""
    if not any(map(may_be_tried, known.values())):
        return Settlement(state, known, attempts=attempts, reason=asked)
    envelope = attempt.lease.envelope
    age = now - (attempt.since or now)
    due = schedule.next_try(attempts, age, now, chance)
    if at_once:
        due = math.floor(now)  # in no name later than now
    if due is not None and not (envelope.expires and due >= envelope.expires):
        return Settlement(state, known, due=due, attempts=attempts, reason=asked)
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
    state, reply = State.DEFERRED, reason
    if expired:
        state, reply = State.REFUSED, f"{GIVEN_UP}{age_text(now - attempt.since)}; {reason}"
    waiting = {}
    for recipient in attempt.recipients:
        before = earlier.get(recipient, UNTRIED)
        if before.state is State.UNCLEAR:  # held again, or let go by the person who asked for it
            waiting[recipient] = before._replace(held=expired)
        else:
            waiting[recipient] = Outcome(state, reply, now, doubts=before.doubts)
    known = {**earlier, **waiting}
    attempts = attempt.entry.attempts
    if expired:
        return Settlement(worst(known), known, attempts=attempts, reason=reply)
    asked = FOR_A_PERSON if any(o.held for o in known.values()) else ""
    return Settlement(worst(known), known, due=now, attempts=attempts, reason=asked)


def nobody_left(attempt: Attempt) -> Settlement:
    """Return how a mail is settled of which nobody may be tried: what is known stays so."""
    known: Mapping[str, Outcome] = attempt.lease.outcomes
    asked = FOR_A_PERSON if any(o.held for o in known.values()) else ""
    return Settlement(worst(known), known, attempts=attempt.entry.attempts, reason=asked)


def may_be_tried(outcome: Outcome) -> bool:
    """Tell whether a recipient with this outcome is tried again without a person's word."""
    return outcome.state not in FINAL and not outcome.held


def worst(outcomes: Mapping[str, Outcome]) -> State:
    """Return what is said of a mail whose recipients have these outcomes."""
    states = {outcome.state for outcome in outcomes.values()}
    return next(state for state in _WORST_FIRST if state in states)


#: Every recipient was accepted: nothing to remember but the journal's line.
ACCEPTED = Settlement(State.ACCEPTED)


#: Of a recipient of which nothing is known.
UNTRIED: Final = Outcome(State.QUEUED)


def _open_recipients(
    recipients: tuple[str, ...], outcomes: Mapping[str, Outcome], *, asked_for: bool
) -> tuple[str, ...]:
    """Return who is tried now: who is not settled, and not a person's to decide.

    `asked_for`: a person may have asked for this try: when nobody else is left, those that
    are unclear are tried, and then those that were refused.
    """
    if not outcomes:
        return recipients
    known = {r: outcomes.get(r, UNTRIED) for r in recipients}
    unsettled = tuple(r for r in recipients if may_be_tried(known[r]))
    if unsettled or not asked_for:
        return unsettled
    unclear = tuple(r for r in recipients if known[r].held)
    return unclear or tuple(r for r in recipients if known[r].state is State.REFUSED)


def _expired(outcome: Outcome, reason: str) -> Outcome:
    if outcome.state is State.UNCLEAR:
        return outcome._replace(held=True)
    if outcome.state is not State.DEFERRED:
        return outcome
    return Outcome(State.REFUSED, f"{reason}; {outcome.reply}", outcome.at, outcome.doubts)
