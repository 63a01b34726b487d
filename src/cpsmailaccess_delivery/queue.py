"""The queue as people see and steer it: what the CLI and the ZMI share."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .attempt import FINAL
from .errors import NoSuchEntry
from .interfaces import Entry, Record, State
from .journal import Event


@dataclass(frozen=True, slots=True)
class Counts:
    """How much is in the spool.

    ``states``: mails by state.  ``oldest``: seconds since the epoch at which the oldest
    mail that is due was queued; 0 when none is.  It shows a queue that has stalled.
    """

    states: dict[State, int]
    oldest: float


class Queue:
    """Look at the mails in the spool, and decide on single ones.

    A mail is named by its entry id or its Message-Id; a Message-Id may name several.
    """

    def __init__(self, spool: Any, journal: Any, clock: Callable[[], float] = time.time) -> None:
        self._spool = spool
        self._journal = journal
        self._clock = clock

    def entries(self, state: State | None = None) -> Iterator[Entry]:
        """Yield what is in the spool, the oldest first, without opening anything."""
        for entry in self._spool.scan():
            if state is None or entry.state is state:
                yield entry

    def records(self, state: State | None = None) -> Iterator[Record]:
        """Yield the same, opened.  What vanishes meanwhile, or cannot be read, is left out."""
        for entry in self.entries(state):
            try:
                yield self._spool.load(entry.id)
            except (NoSuchEntry, ValueError):
                continue

    def counts(self) -> Counts:
        now = self._clock()
        states: Counter[State] = Counter()
        oldest = 0.0
        for entry in self._spool.scan():
            states[entry.state] += 1
            if entry.state in (State.QUEUED, State.DEFERRED) and entry.due <= now:
                oldest = min(oldest or now, entry.staged_at or now)
        return Counts(dict(states), oldest)

    def find(self, name: str) -> list[Record]:
        """Return the mails of this entry id or Message-Id.  Raises `NoSuchEntry`."""
        name = name.strip().removeprefix("<").removesuffix(">")
        records: list[Record] = self._spool.find(name)
        return records or [self._spool.load(name)]

    def message(self, record: Record) -> bytes:
        """Return the message as it is stored.  Raises `NoSuchEntry`."""
        message: bytes = self._spool.read_message(record.entry.id)
        return message

    def retry(self, name: str) -> list[Record]:
        """Make mails due now, whatever held them.  Raises `NoSuchEntry`, `EntryBusy`."""
        records = self.find(name)
        for record in records:
            self._spool.requeue(record.entry.id)
            self._note(record, "retried")
        return records

    def hold(self, name: str, reason: str) -> list[Record]:
        """Set mails aside until they are retried.  Raises `NoSuchEntry`, `EntryBusy`."""
        records = self.find(name)
        for record in records:
            self._spool.hold(record.entry.id, reason)
            self._note(record, State.HELD, reason)
        return records

    def cancel(self, name: str) -> list[Record]:
        """Remove mails that are not delivered yet.  Raises `NoSuchEntry`, `EntryBusy`."""
        records = self.find(name)
        for record in records:
            self._spool.cancel(record.entry.id)
            self._note(record, State.CANCELLED)
        self._journal.flush()
        return records

    def _note(self, record: Record, kind: str, reply: str = "") -> None:
        envelope = record.envelope
        for recipient in envelope.recipients:
            outcome = record.outcomes.get(recipient)
            if outcome is not None and outcome.state in FINAL:
                continue
            self._journal.record(
                Event(
                    at=self._clock(),
                    kind=kind,
                    entry=record.entry.id,
                    message_id=envelope.message_id,
                    mailbox=str(envelope.route),
                    sender=envelope.sender,
                    recipient=recipient,
                    attempt=record.entry.attempts,
                    reply=reply,
                )
            )
