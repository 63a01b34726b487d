"""A spool in memory, for tests of applications: same contract, no disk, no second process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from zope.interface import implementer

from ..envelope import Envelope, format_block
from ..errors import EntryBusy, KeyTaken, NoSuchEntry, SpoolError
from ..interfaces import (
    Doubt,
    Entry,
    ILease,
    ISpool,
    IWatch,
    LaneNote,
    Outcome,
    Record,
    Settlement,
    State,
    SweepReport,
    Verdict,
)
from ..spool.names import first_entry, new_id, normal


@dataclass(slots=True)
class _Mail:
    entry: Entry
    envelope: Envelope
    message: bytes
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    reason: str = ""
    settled_at: float = 0.0  # seconds since the epoch
    prepared: bool = False
    leased: bool = False


@implementer(ISpool)
class MemorySpool:
    """See `ISpool`.  `clock`: seconds since the epoch, for ids."""

    location = "memory:"

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self.paces: dict[str, float] = {}
        self._clock = clock
        self._lock = threading.RLock()
        self._staged: dict[str, _Mail] = {}
        self._visible: dict[str, _Mail] = {}
        self._watches: list[MemoryWatch] = []
        self._notes: dict[str, LaneNote] = {}
        self._keys: dict[str, _Mail] = {}

    def stage(self, envelope: Envelope, message: bytes) -> Entry:
        """See `ISpool`."""
        format_block(envelope)  # refuses what no spool could keep
        entry_id = new_id(self._clock(), os.urandom(3).hex(), envelope.message_id)
        entry = first_entry(entry_id, envelope)
        self._staged[entry.id] = _Mail(entry, envelope, bytes(message))
        return entry

    def prepare(
        self, entries: Sequence[Entry], *, witnessed: bool = False, alone: bool = False
    ) -> None:
        """See `ISpool`."""
        with self._lock:
            for entry in entries:
                if entry.id not in self._staged:
                    raise SpoolError(f"{self.location} {entry.id} was not staged by this process")
                mail = self._staged[entry.id]
                key = mail.envelope.key
                if key and self._keys.setdefault(key, mail) is not mail:
                    raise KeyTaken(f"idempotency_key={key!r}: another transaction has it")
                mail.prepared = True

    def publish(self, entries: Sequence[Entry]) -> None:
        """See `ISpool`."""
        with self._lock:
            for entry in entries:
                if entry.id in self._staged:
                    self._visible[entry.id] = self._staged.pop(entry.id)
        self._tell(entries)

    def discard(self, entries: Sequence[Entry]) -> None:
        """See `ISpool`."""
        with self._lock:
            for entry in entries:
                mail = self._staged.pop(entry.id, None)
                if mail is not None:
                    self._free_key(mail)

    def key_holder(self, key: str) -> str | None:
        """See `ISpool`."""
        with self._lock:
            mail = self._keys.get(key)
            if mail is None or mail.entry.id in self._staged:
                return None
            return mail.envelope.message_id

    def scan(self) -> Iterator[Entry]:
        """See `ISpool`."""
        with self._lock:
            entries = sorted((mail.entry for mail in self._visible.values()), key=lambda e: e.id)
        return iter(entries)

    def watch(self) -> MemoryWatch:
        """See `ISpool`."""
        watch = MemoryWatch(self._watches.remove)
        self._watches.append(watch)
        return watch

    def serves(self, lane: str) -> bool:
        """See `ISpool`."""
        return True

    def claim(self, entry: Entry) -> MemoryLease | None:
        """See `ISpool`."""
        with self._lock:
            mail = self._visible.get(entry.id)
            if mail is None or mail.entry != entry or mail.leased:
                return None
            mail.leased = True
            return MemoryLease(self, mail)

    def leased(self, entry: Entry) -> bool:
        """See `ISpool`."""
        mail = self._visible.get(entry.id)
        return mail is not None and mail.leased

    def find(self, message_id: str) -> list[Record]:
        """See `ISpool`."""
        with self._lock:
            mails = list(self._visible.values())
        return [_record(mail) for mail in mails if mail.envelope.message_id == message_id]

    def holding(self, message_ids: Collection[str]) -> set[str]:
        """See `ISpool`."""
        with self._lock:
            there = {mail.envelope.message_id for mail in self._visible.values()}
        return there.intersection(message_ids)

    def look_up(self, entry_id: str) -> Entry:
        """See `ISpool`."""
        return self._get(entry_id).entry

    def load(self, entry: Entry) -> Record:
        """See `ISpool`."""
        return _record(self._get(entry.id))

    def read_message(self, entry: Entry) -> bytes:
        """See `ISpool`."""
        return self._get(entry.id).message

    def requeue(self, entry: Entry, *, unclear: bool = False) -> Entry:
        """See `ISpool`."""
        with self._lock:
            mail = self._idle(entry)
            if unclear:
                mail.outcomes = {r: o._replace(held=False) for r, o in mail.outcomes.items()}
            return self.change(mail, mail.entry._replace(state=State.QUEUED, due=0.0))

    def hold(self, entry: Entry, reason: str) -> Entry:
        """See `ISpool`."""
        with self._lock:
            mail = self._idle(entry)
            mail.reason = reason
            return self.change(mail, mail.entry._replace(state=State.HELD, due=0.0))

    def cancel(self, entry: Entry) -> Record:
        """See `ISpool`."""
        with self._lock:
            mail = self._idle(entry)
            del self._visible[entry.id]
            if not mail.entry.attempts:
                self._free_key(mail)
            return _record(mail)

    def note_lane(self, key: str, note: LaneNote | None) -> None:
        """See `ISpool`."""
        self._notes.pop(key, None)
        if note is not None:
            self._notes[key] = note

    def lane_note(self, key: str) -> LaneNote | None:
        """See `ISpool`."""
        return self._notes.get(key)

    def lane_notes(self) -> dict[str, LaneNote]:
        """See `ISpool`."""
        return dict(self._notes)

    def refused_before(self, when: float) -> Iterator[Entry]:
        """See `ISpool`."""
        with self._lock:
            refused = [m for m in self._visible.values() if m.entry.state is State.REFUSED]
        return iter([m.entry for m in refused if m.entry.staged_at < when > m.settled_at])

    def sweep(self) -> SweepReport:
        """See `ISpool`: nothing outlives a process here, so nothing is left over."""
        return SweepReport()

    def left_overs(self) -> Sequence[str]:
        """See `ISpool`."""
        return ()

    def doubts(self) -> Sequence[Doubt]:
        """See `ISpool`.  Its mails die with its process."""
        return ()

    def resolve(self, doubt: Doubt, verdict: Verdict) -> Record | None:
        """See `ISpool`."""
        return None

    def sync(self) -> None:
        """See `ISpool`: there is no disk."""

    def close(self) -> None:
        """See `ISpool`."""
        for watch in list(self._watches):
            watch.close()

    def change(self, mail: _Mail, after: Entry | None, *, free_key: bool = False) -> Entry:
        """Give a mail its new entry; None: it is gone."""
        with self._lock:
            if after is None:
                del self._visible[mail.entry.id]
                if free_key:
                    self._free_key(mail)
                return mail.entry
            mail.entry = normal(after)
        self._tell([mail.entry])
        return mail.entry

    def _tell(self, entries: Iterable[Entry]) -> None:
        for watch in list(self._watches):
            watch.tell(entries)

    def _free_key(self, mail: _Mail) -> None:
        if self._keys.get(mail.envelope.key) is mail:
            del self._keys[mail.envelope.key]

    def _get(self, entry_id: str) -> _Mail:
        mail = self._visible.get(entry_id)
        if mail is None:
            raise NoSuchEntry(f"{self.location} no mail has the id {entry_id!r}")
        return mail

    def _idle(self, entry: Entry) -> _Mail:
        mail = self._get(entry.id)
        if mail.leased:
            raise EntryBusy(f"{entry.id}: is being delivered right now; try again in a moment")
        return mail


def _record(mail: _Mail) -> Record:
    reason = "" if mail.entry.state is State.QUEUED else mail.reason
    return Record(mail.entry, mail.envelope, dict(mail.outcomes), len(mail.message), reason)


@implementer(ILease)
class MemoryLease:
    """See `ILease`."""

    def __init__(self, spool: MemorySpool, mail: _Mail) -> None:
        self._spool = spool
        self._mail: _Mail | None = mail
        self._before: tuple[Entry, str] | None = None
        self.entry = mail.entry
        self.envelope = mail.envelope
        self.message = mail.message
        self.outcomes = dict(mail.outcomes)

    def settle(self, settlement: Settlement) -> Entry | None:
        """See `ILease`."""
        mail, state = self._mail, settlement.state
        if mail is None:
            raise SpoolError(f"{self.entry.id}: the lease has ended")
        if state is State.QUEUED:
            raise SpoolError(f"{self.entry.id}: a mail is not settled as {state}")
        after = None
        if settlement.keep and state not in (State.ACCEPTED, State.CANCELLED):
            mail.outcomes = {**self.outcomes, **settlement.outcomes}
            mail.reason = settlement.reason
            mail.settled_at = time.time()
            due, attempts = settlement.due, settlement.attempts
            after = self.entry._replace(state=state, due=due, attempts=attempts)
        self.leave()
        cancelled = state is State.CANCELLED and not self.entry.attempts
        now = self._spool.change(mail, after, free_key=cancelled)
        return None if after is None else now

    def forget_message(self) -> None:
        """See `ILease`."""
        self.message = b""

    def read_message(self) -> bytes:
        """See `ILease`."""
        if self._mail is None:
            raise SpoolError(f"{self.entry.id}: the lease has ended")
        return self._mail.message

    def set_aside(self, reason: str, token: str = "") -> None:
        """See `ILease`."""
        mail = self._mail
        if mail is None:
            raise SpoolError(f"{self.entry.id}: the lease has ended")
        self._before = mail.entry, mail.reason
        mail.reason = reason
        self.entry = self._spool.change(mail, mail.entry._replace(state=State.HELD, due=0.0))

    def release(self) -> None:
        """See `ILease`."""
        if self._mail is not None and self._before is not None:
            before, self._mail.reason = self._before
            self._spool.change(self._mail, before)
        self.leave()

    def leave(self) -> None:
        """See `ILease`."""
        if self._mail is not None:
            self._mail.leased = False
            self._mail = None


@implementer(IWatch)
class MemoryWatch:
    """See `IWatch`."""

    def __init__(self, on_close: Callable[[MemoryWatch], None]) -> None:
        self._on_close = on_close
        self._told: list[Entry] = []
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._open = True

    def tell(self, entries: Iterable[Entry]) -> None:
        """Pass on what changed."""
        self._told.extend(entries)
        try:
            os.write(self._writer, b"!")
        except BlockingIOError:
            pass  # full: it is readable

    def fileno(self) -> int:
        """See `IWatch`."""
        return self._reader

    def read(self) -> list[Entry]:
        """See `IWatch`."""
        try:
            while os.read(self._reader, 4096):
                pass
        except BlockingIOError:
            pass
        told = []
        while self._told:
            told.append(self._told.pop(0))
        return told

    def close(self) -> None:
        """See `IWatch`."""
        if self._open:
            self._open = False
            self._on_close(self)
            os.close(self._reader)
            os.close(self._writer)
