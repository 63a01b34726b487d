"""One try to deliver an entry, and how a mail is settled without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .bounce import age_text
from .dsn import Wish
from .interfaces import Entry, Outcome, Settlement, State
from .report import EXPIRED, GIVEN_UP

#: Outcomes after which a recipient is not tried again.
FINAL = frozenset({State.ACCEPTED, State.REFUSED})

#: Why a mail waits for a person, or a part of its recipients does.
FOR_A_PERSON: Final = "unclear: nobody knows whether the relay took it; settle or release it"

#: Bytes of a message from which on it is not kept beside its wire form.
LARGE: Final = 64 * 1024

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
        "size",
        "wish",
    )

    def __init__(self, lease: Any) -> None:
        envelope = lease.envelope
        self.lease = lease
        self.sender: str = envelope.sender
        self.message: bytes = lease.message
        self.size = len(self.message)
        self.wish: Wish | None = envelope.wish
        self.relayed: Mapping[str, Outcome] = {}  # see `results.relayed_of`
        self.news: Mapping[str, Outcome] = {}  # what it has brought, told when it is recorded
        self.notified = False  # whether the notices of its settlement are durable
        self.recipients: tuple[str, ...] = envelope.recipients
        if lease.outcomes:
            asked_for = lease.entry.state is State.QUEUED
            self.recipients = _open_recipients(
                envelope.recipients, lease.outcomes, asked_for=asked_for
            )

    def forget_message(self) -> None:
        """Keep no copy of the message: its wire form is made."""
        self.message = b""
        self.lease.forget_message()

    def read_message(self) -> bytes:
        """Return the message as it is stored.  Raises `SpoolError`."""
        message: bytes = self.message or self.lease.read_message()
        return message

    @property
    def since(self) -> float:
        """When it could first be sent, in seconds since the epoch; 0: not known."""
        not_before: float = self.lease.envelope.not_before
        return max(self.entry.staged_at, not_before)

    @property
    def entry(self) -> Entry:
        entry: Entry = self.lease.entry
        return entry


def expiry_of(attempt: Attempt, now: float) -> Settlement | None:
    """Return how a mail is settled that may not be tried any more; None: it may.

    What is unclear stays so, for a person: expired or not, the relay may have it.
    """
    envelope = attempt.lease.envelope
    if not envelope.expires or now < envelope.expires:
        return None
    untried = dict.fromkeys(attempt.recipients, Outcome(State.REFUSED, EXPIRED, now))
    known = {**untried, **attempt.lease.outcomes}
    known = {recipient: expired_of(outcome, EXPIRED) for recipient, outcome in known.items()}
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
ALL_ACCEPTED: Final = Settlement(State.ACCEPTED)


#: Of a recipient of which nothing is known.
UNTRIED: Final = Outcome(State.QUEUED)


def _open_recipients(
    recipients: tuple[str, ...], outcomes: Mapping[str, Outcome], *, asked_for: bool
) -> tuple[str, ...]:
    """Return who is tried now: who is not settled, and not a person's to decide.

    `asked_for`: a person may have asked for this try: when nobody else is left, those that
    are unclear are tried, and then those that were refused.
    """
    known = {r: outcomes.get(r, UNTRIED) for r in recipients}
    unsettled = tuple(r for r in recipients if may_be_tried(known[r]))
    if unsettled or not asked_for:
        return unsettled
    unclear = tuple(r for r in recipients if known[r].held)
    return unclear or tuple(r for r in recipients if known[r].state is State.REFUSED)


def expired_of(outcome: Outcome, reason: str) -> Outcome:
    """Return the outcome of a recipient that is not tried any more; `reason`: why not."""
    if outcome.state is State.UNCLEAR:
        return outcome._replace(held=True)
    if outcome.state is not State.DEFERRED:
        return outcome
    return Outcome(State.REFUSED, f"{reason}; {outcome.reply}", outcome.at, outcome.doubts)
