"""The queue as people see and steer it: what the CLI and the ZMI share."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from .announcer import Announcer
from .attempt import FINAL, UNTRIED, may_be_tried
from .envelope import Envelope, lane_key
from .errors import InvalidEnvelope, NoSuchEntry, NotUnclear
from .interfaces import Entry, LaneNote, Outcome, Record, State
from .journal import Event
from .notices import Notices
from .settling import settle


@dataclass(frozen=True, slots=True)
class Counts:
    """How much is in the spool.

    ``states``: mails by state.  ``oldest``: seconds since the epoch at which the oldest
    mail that is due was queued; 0 when none is.  It shows a queue that has stalled.
    """

    states: dict[State, int]
    oldest: float


#: What a person did to let a mail go, as it stands in the journal.
_RETRIED: Final = "retried"
_RELEASED: Final = "released"

#: A refused mail has left the spool, as it stands in the journal.
REMOVED: Final = "removed"


def entry_as_seen(entry: Entry, note: LaneNote | None) -> Entry:
    """Return an entry as people see it; `note`: why its lane waits, or None.

    What is queued, or due, in a lane that is in trouble is deferred until its next probe.
    Not for the spool, which knows the entry by what it is.
    """
    if note is None or not (entry.state is State.QUEUED or _is_tried_again(entry)):
        return entry
    if entry.state is State.QUEUED and entry.due > note.until:
        return entry  # its sender wants it later
    state = State.DEFERRED if entry.state is State.QUEUED else entry.state
    return entry._replace(state=state, due=max(entry.due, note.until))


def record_as_seen(record: Record, note: LaneNote | None) -> Record:
    """Return the same of a mail that was opened, with the lane's reason; see `status`."""
    entry = entry_as_seen(record.entry, note)
    if note is None or entry.state is record.entry.state:
        return replace(record, entry=entry)
    waits = Outcome(State.DEFERRED, note.reason, note.since)
    untried = dict.fromkeys(record.envelope.recipients, waits)
    return replace(record, entry=entry, outcomes={**untried, **record.outcomes}, reason=note.reason)


def is_due(seen: Entry, now: float) -> bool:
    """Tell whether a processor would take a mail now; from `entry_as_seen`."""
    return (seen.state is State.QUEUED or _is_tried_again(seen)) and seen.due <= now


def why(record: Record) -> str:
    """Return in a few words why a mail is still here; "" when it is simply its turn."""
    if record.reason:
        return record.reason
    replies = [outcome.reply for outcome in record.outcomes.values() if outcome.reply]
    return replies[-1] if replies else ""


def _is_tried_again(entry: Entry) -> bool:
    return entry.state is State.DEFERRED or (entry.state is State.UNCLEAR and entry.due > 0)


class Queue:
    """Look at the mails in the spool, and decide on single ones.

    A mail is named by its entry id or its Message-Id, which may name several, or is given
    as an entry of `entries`, which saves looking for it.

    `notices`: makes what tells senders of refusals; called when it is needed.
    `announcer`: tells what a person has settled through zope.event.
    """

    def __init__(
        self,
        spool: Any,
        journal: Any,
        clock: Callable[[], float] = time.time,
        *,
        notices: Callable[[], Notices],
        announcer: Announcer,
    ) -> None:
        self._spool = spool
        self._journal = journal
        self._clock = clock
        self._notices = notices
        self._announcer = announcer

    def entries(self, state: State | None = None) -> Iterator[Entry]:
        """Yield what is in the spool, the oldest first, without opening anything.

        `state`: the spool's own; see `entry_as_seen`.
        """
        for entry in self._spool.scan():
            if state is None or entry.state is state:
                yield entry

    def records(self, state: State | None = None) -> Iterator[Record]:
        """Yield the same, opened.  What vanishes meanwhile, or cannot be read, is left out."""
        for entry in self.entries(state):
            try:
                yield self._spool.load(entry)
            except (NoSuchEntry, ValueError):
                continue

    def counts(self) -> Counts:
        """Count the mails as people see them."""
        now = self._clock()
        notes = self._spool.lane_notes()
        states: Counter[State] = Counter()
        oldest = 0.0
        for entry in self._spool.scan():
            seen = entry_as_seen(entry, notes.get(entry.lane))
            states[seen.state] += 1
            if is_due(seen, now):
                since = max(entry.staged_at, entry.due if entry.state is State.QUEUED else 0.0)
                oldest = min(oldest or now, since or now)
        return Counts(dict(states), oldest)

    def find(self, name: str | Entry) -> list[Record]:
        """Return the mails of this entry id or Message-Id.  Raises `NoSuchEntry`."""
        if isinstance(name, Entry):
            return [self._spool.load(name)]
        name = name.strip().removeprefix("<").removesuffix(">")
        records: list[Record] = self._spool.find(name)
        return records or [self._spool.load(self._spool.look_up(name))]

    def message(self, record: Record) -> bytes:
        """Return the message as it is stored.  Raises `NoSuchEntry`."""
        message: bytes = self._spool.read_message(record.entry)
        return message

    def retry(self, name: str | Entry) -> list[Record]:
        """Make mails due now, whatever held them.  Raises `NoSuchEntry`, `EntryBusy`.

        A lane in trouble that they wait for is tried again, too; recipients that are unclear
        and wait for a person are, when nobody else of the mail is open, and then those that
        were refused.
        """
        return self._let_go(self.find(name), _RETRIED)

    def release(self, name: str | Entry) -> list[Record]:
        """Do the same with what was set aside, recipients that are unclear always included."""
        return self._let_go(self.find(name), _RELEASED)

    def settle(
        self, name: str | Entry, state: State, recipients: Collection[str] = ()
    ) -> list[Record]:
        """Say what became of recipients that are unclear; return the mails as they were.

        `state`: accepted or refused; of refused ones the sender is told.  `recipients`: none:
        all that are unclear.  A mail whose recipients are all final then leaves the queue.
        Raises `NotUnclear`, `NoSuchEntry`, `EntryBusy`, `SpoolError`.
        """
        if state not in FINAL:
            raise ValueError(f"state={state!r}: a person settles as accepted or refused")
        records, failure = [], None
        for record in self.find(name):
            try:
                settle(
                    record,
                    State(state),
                    recipients,
                    spool=self._spool,
                    journal=self._journal,
                    notices=self._notices,
                    announcer=self._announcer,
                    now=self._clock(),
                )
            except NotUnclear as error:  # of several mails of one Message-Id, another one may be
                failure = error
            else:
                records.append(record)
        if failure is not None and not records:
            raise failure
        self._journal.flush()
        return records

    def hold(self, name: str | Entry, reason: str) -> list[Record]:
        """Set mails aside until they are retried.  Raises `NoSuchEntry`, `EntryBusy`."""
        records = self.find(name)
        for record in records:
            self._spool.hold(record.entry, reason)
            self._note(record, State.HELD, reason)
        return records

    def cancel(self, name: str | Entry) -> list[Record]:
        """Remove mails that are not delivered yet.  Raises `NoSuchEntry`, `EntryBusy`."""
        try:
            entries = [record.entry for record in self.find(name)]
        except InvalidEnvelope:  # to cancel it is all that one can do
            entries = [name if isinstance(name, Entry) else self._spool.look_up(name)]
        records = []
        for entry in entries:
            records.append(self._spool.cancel(entry))
            self._note(records[-1], State.CANCELLED)
        self._journal.flush()
        return records

    def _let_go(self, records: list[Record], kind: str) -> list[Record]:
        for record in records:
            # First: a processor that hears of the mail must find its lane free.
            self._spool.note_lane(lane_key(record.envelope.route), None)
            self._spool.requeue(record.entry, unclear=kind == _RELEASED)
            self._note(record, kind)
        return records

    def _note(self, record: Record, kind: str, reply: str = "") -> None:
        at, envelope, outcomes = self._clock(), record.envelope, record.outcomes
        for event in events_of(record.entry, envelope, outcomes, kind, at, reply):
            self._journal.record(event)


def events_of(
    entry: Entry,
    envelope: Envelope,
    outcomes: Mapping[str, Outcome],
    kind: str,
    at: float,
    reply: str = "",
) -> list[Event]:
    """Return what the journal gets when somebody decides on a mail: who is still open."""
    known = {r: outcomes.get(r, UNTRIED) for r in envelope.recipients}
    concerned = [r for r, outcome in known.items() if outcome.state not in FINAL]
    if kind == _RETRIED:
        concerned = [r for r in concerned if may_be_tried(known[r])] or concerned
    if not concerned and kind in (_RETRIED, _RELEASED, REMOVED):  # it is about them
        concerned = [r for r in outcomes if outcomes[r].state is State.REFUSED]
    return events_for(concerned, entry, envelope, kind, at, reply)


def events_for(
    recipients: Collection[str],
    entry: Entry,
    envelope: Envelope,
    kind: str,
    at: float,
    reply: str = "",
) -> list[Event]:
    """Return what the journal gets of these recipients of a mail."""
    return [
        Event(
            at=at,
            kind=kind,
            entry=entry.id,
            message_id=envelope.message_id,
            mailbox=str(envelope.route),
            sender=envelope.sender,
            recipient=recipient,
            attempt=entry.attempts,
            reply=reply,
        )
        for recipient in recipients
    ]
