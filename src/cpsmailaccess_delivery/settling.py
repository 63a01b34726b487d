"""A person decides about recipients of whom nobody knows whether the relay took the mail.

::

    lease -> who is unclear? -> notices durable -> recorded: gone when all are final

In this order, so that after a crash the person decides again: the notice, found by its
Message-Id, is not made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from .announcer import Announcer
from .attempt import FINAL, FOR_A_PERSON, UNTRIED, Attempt, may_be_tried, worst
from .envelope import digest
from .errors import EntryBusy, NotUnclear
from .interfaces import Entry, Outcome, Record, Settlement, State
from .journal import Event
from .notices import Notices

_LOOK_UPS: Final = 5  # a mail may move between look-up and claim; nobody moves one that often

#: How the reply of a recipient begins that a person has settled; what was known follows.
BY_HAND: Final = "settled by hand"


def take(spool: Any, entry: Entry) -> Any:
    """Return the lease of a mail, wherever it has moved.  Raises `NoSuchEntry`, `EntryBusy`."""
    for _ in range(_LOOK_UPS):
        lease = spool.claim(entry)
        if lease is not None:
            return lease
        if spool.leased(entry):
            break
        entry = spool.look_up(entry.id)
    raise EntryBusy(f"{entry.id}: is being delivered right now; try again in a moment")


def settle(
    record: Record,
    state: State,
    recipients: Collection[str],
    *,
    spool: Any,
    journal: Any,
    notices: Callable[[], Notices],
    announcer: Announcer,
    now: float,
) -> None:
    """Record what a person has found out about the unclear recipients of a mail.

    `state`: accepted or refused.  `recipients`: of these; none: of all that are unclear.
    `notices`: makes what tells the sender of refusals; `announcer`: tells all.
    Raises `NotUnclear`, `NoSuchEntry`, `EntryBusy`, `SpoolError`; nothing is changed then.
    """
    lease = take(spool, record.entry)
    try:
        earlier: Mapping[str, Outcome] = lease.outcomes
        decided = {
            recipient: Outcome(state, _reply(earlier[recipient]), now, earlier[recipient].doubts)
            for recipient in _chosen(lease, recipients)
        }
        attempt = Attempt(lease)
        if state is State.REFUSED:
            occasion = f"settled-{digest(' '.join(sorted(decided)))}"
            made = notices()
            made.writer.write(made.of_refusals(attempt, decided, occasion))
        known = {**earlier, **decided}
        lease.settle(_settlement(lease, known, record.reason, now))
    finally:
        lease.release()
    for recipient, outcome in decided.items():
        journal.record(
            Event(
                at=now,
                kind=state,
                entry=lease.entry.id,
                message_id=lease.envelope.message_id,
                mailbox=str(lease.envelope.route),
                sender=lease.envelope.sender,
                recipient=recipient,
                attempt=lease.entry.attempts,
                reply=outcome.reply,
            )
        )
    spool.sync()
    announcer.outcomes(now, lease.entry.id, lease.envelope, decided)


def _reply(outcome: Outcome) -> str:
    return f"{BY_HAND}; {outcome.reply}" if outcome.reply else BY_HAND


def _chosen(lease: Any, recipients: Collection[str]) -> list[str]:
    known = {r: lease.outcomes.get(r, UNTRIED) for r in lease.envelope.recipients}
    unclear = [r for r, outcome in known.items() if outcome.state is State.UNCLEAR]
    if not unclear:
        raise NotUnclear(f"{lease.entry.id}: no recipient is unclear: there is nothing to settle")
    for recipient in recipients:
        if recipient not in known:
            raise NotUnclear(f"{recipient!r}: is no recipient of {lease.entry.id}")
        if recipient not in unclear:
            raise NotUnclear(
                f"{recipient!r}: is {known[recipient].state}, not unclear; {lease.entry.id} is"
                f" unclear for {', '.join(unclear)}"
            )
    return [recipient for recipient in unclear if not recipients or recipient in recipients]


def _settlement(lease: Any, known: Mapping[str, Outcome], reason: str, now: float) -> Settlement:
    entry: Entry = lease.entry
    everybody = [known.get(r, UNTRIED) for r in lease.envelope.recipients]
    if all(outcome.state in FINAL for outcome in everybody):
        return Settlement(State.ACCEPTED)  # gone: the journal says what became of whom
    attempts = entry.attempts
    if entry.state is State.HELD:
        return Settlement(State.HELD, known, attempts=attempts, reason=reason)
    reason = FOR_A_PERSON if any(outcome.held for outcome in everybody) else ""
    if not any(map(may_be_tried, everybody)):
        return Settlement(State.UNCLEAR, known, attempts=attempts, reason=reason)
    state = worst({str(number): outcome for number, outcome in enumerate(everybody)})
    state = State.DEFERRED if state is State.QUEUED else state
    return Settlement(state, known, due=entry.due or now, attempts=attempts, reason=reason)
