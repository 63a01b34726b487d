"""What became of a mail, for its sender: put together from spool and journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .attempt import worst
from .interfaces import LaneNote, Outcome, Record, State

#: Why a mail waits that its sender wanted later.
SCHEDULED = "scheduled"


@dataclass(frozen=True, slots=True)
class Status:
    """The fate of the mails with one Message-Id, as far as it is known now.

    ``state``: of the mail; ``deferred`` also while its relay or account is in trouble.
    ``recipients``: outcome by address.  ``attempts``: how many were made.
    ``next_try``: seconds since the epoch; 0: at once, or never.
    ``reason``: why it waits or is held, in words; "" when there is nothing to say.
    """

    message_id: str
    state: State
    recipients: Mapping[str, Outcome]
    attempts: int = 0
    next_try: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        lines = [f"{self.message_id}: {self.state}"]
        if self.reason:
            lines[0] += f" ({self.reason})"
        lines += [f"  {recipient}: {outcome}" for recipient, outcome in self.recipients.items()]
        return "\n".join(lines)


def status_of(
    message_id: str,
    records: Sequence[Record],
    notes: Mapping[str, LaneNote],
    journal: Mapping[str, Outcome],
    tried: int = 0,
) -> Status | None:
    """Return the status, or None when neither spool nor journal knows the mail.

    `records`: from `ISpool.find`.  `notes`: why lanes wait, by lane key.  `journal`: the
    last outcome of each recipient; `tried`: attempts, as far as the journal goes back.
    """
    recipients = dict(journal)
    for record in records:
        for recipient in record.envelope.recipients:
            recipients[recipient] = record.outcomes.get(recipient, Outcome(State.QUEUED))
    if not recipients:
        return None
    state, reason, next_try, attempts = worst(recipients), "", 0.0, tried
    for record in records:
        entry = record.entry
        note = notes.get(entry.lane)
        attempts = max(attempts, entry.attempts)
        if entry.state is State.HELD:
            state, reason = State.HELD, record.reason
        elif state is State.HELD:
            continue  # one of several mails is held: that is what must be said
        elif entry.state is State.QUEUED and entry.due > (note.until if note else 0.0):
            state, reason, next_try = State.QUEUED, reason or SCHEDULED, next_try or entry.due
        elif note is not None and entry.state is State.QUEUED:
            state, reason, next_try = State.DEFERRED, note.reason, note.until
            for recipient in record.envelope.recipients:
                if recipients[recipient].state is State.QUEUED:
                    recipients[recipient] = Outcome(State.DEFERRED, note.reason, note.since)
        else:
            state = State.QUEUED if entry.state is State.QUEUED else state
            reason = reason or record.reason
            next_try = next_try or entry.due
    return Status(message_id, state, recipients, attempts, next_try, reason)
