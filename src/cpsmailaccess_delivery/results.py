"""What the results of an attempt mean for the mail: each is classified once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from .attempt import ALL_ACCEPTED, FOR_A_PERSON, Attempt, expired_of, may_be_tried, worst
from .dsn import SUCCESS, wants
from .interfaces import Outcome, Settlement, State
from .outcome import TAKEN, Meaning, Phase, Trouble, classify
from .report import EXPIRED, GIVEN_UP
from .retry import Schedule
from .smtp.events import Result

_ONLY_ACCEPTED: Final = frozenset({State.ACCEPTED})
_ACCEPTED: Final = State.ACCEPTED
_UNCLEAR: Final = State.UNCLEAR


def weigh(
    attempt: Attempt, results: Mapping[str, Result], now: float, *, doubts: int = 2
) -> tuple[dict[str, Outcome], dict[str, Meaning]]:
    """Return the outcomes of this attempt, by recipient, and the meanings on those not accepted.

    `doubts`: after so many attempts that ended unclear, a recipient waits for a person.
    """
    earlier: Mapping[str, Outcome] = attempt.lease.outcomes
    outcomes = {}
    failed = {}
    last = outcome = None
    for recipient in attempt.recipients:
        result = results[recipient]
        if result is last and outcome is not None:  # all whom the end of data was for
            outcomes[recipient] = outcome
            continue
        meaning = classify(result.phase, result.reply, result.error)
        before = earlier[recipient].doubts if recipient in earlier else 0
        if meaning is TAKEN:
            outcomes[recipient] = this = Outcome(_ACCEPTED, result.text, now, before)
            if not earlier:
                last, outcome = result, this
            continue
        failed[recipient] = meaning
        if meaning.state is _UNCLEAR:
            before += 1
        held = meaning.state is _UNCLEAR and before >= doubts
        outcomes[recipient] = Outcome(meaning.state, result.text, now, before, held)
    return outcomes, failed


def account_trouble(results: Mapping[str, Result], failed: Mapping[str, Meaning]) -> Result | None:
    """Return a result that shows that the account must be mended, not the mail.

    Only when it is so for every recipient: then the mail was not really tried, and nothing
    has to be recorded of it.
    """
    if len(failed) < len(results):
        return None
    found = None
    for recipient, meaning in failed.items():
        if meaning.trouble not in (Trouble.ACCOUNT, Trouble.LOGIN):
            return None
        found = results[recipient]
    return found


def were_too_many(results: Mapping[str, Result], failed: Mapping[str, Meaning]) -> bool:
    """Whether the relay took some recipients, and all others were only too many for one mail.

    RFC 5321 section 4.5.3.1.10: 452, or 552 of old relays; they go in a next transaction,
    without a wait.
    """
    if len(failed) == len(results):
        return False
    left = False
    for recipient, meaning in failed.items():
        result = results[recipient]
        code = result.reply.code if result.reply else 0
        if result.phase is Phase.RCPT and code in (452, 552):
            left = True
        elif meaning.state is not State.REFUSED:
            return False
    return left


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
    if not earlier and {outcome.state for outcome in outcomes.values()} == _ONLY_ACCEPTED:
        return ALL_ACCEPTED
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
    known = {recipient: expired_of(outcome, reason) for recipient, outcome in known.items()}
    return Settlement(worst(known), known, attempts=attempts, reason=reason)
