"""The Maildir spool: mails are files, states are names, changes are renames.

::

    tmp/ --publish--> new/ --claim--> (locked) --settle--> gone, accepted
                       ^                          |
                       +------requeue------ cur/ <+ deferred, held, unclear, refused

What is safe when: what `ILease.settle` did survives the death of the process at once;
against a power loss, outcomes of a mail that stays are safe at once too, and removals
with the next `sync`.

This file is the contract; `staging` has tmp/, `listing` and `mails` have new/ and cur/, `names`
what the names say.  After a crash `sweep` sees to tmp/, and `doubts` has what is in between.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from zope.interface import implementer

from ..envelope import Envelope, digest
from ..errors import EntryBusy, InvalidEnvelope, NoSuchEntry
from ..interfaces import Doubt, Entry, ISpool, LaneNote, Record, SweepReport, Verdict
from ..watch import NotifyWatch, PollingWatch, watch_folders
from . import names
from .doubts import Doubts, key_in_doubt
from .keys import Keys
from .layout import Layout
from .lease import Lease, unlock
from .listing import Listing
from .mails import Mails
from .notes import LaneNotes
from .outcomes import SideFiles
from .presence import Presence
from .staging import Staging
from .sweep import Sweep, left_overs
from .transit import Transit

#: What an outbox has in the same directory.
_BESIDE: Final = ("presence", "accounts", "lanes", "journal.sqlite")

_LOOK_UPS: Final = 5  # a mail may move between look-up and open; nobody moves one that often


@implementer(ISpool)
class Maildir:
    """See `ISpool`.

    `path`: the directory, made on first use; one that holds other things is refused.
    `presence`: names this process; shared with what else stages files; not closed here.
    `clock`: seconds since the epoch, for ids.  `notify`: use inotify where there is any.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        presence: Presence,
        *,
        clock: Callable[[], float] = time.time,
        notify: bool = True,
    ) -> None:
        self.location = os.fspath(path)
        self.paces: dict[str, float] = {}  # a lane stays with its process
        self._notify = notify
        self._presence = presence
        self._layout = Layout(self.location, beside=_BESIDE)
        self._keys = Keys(self._layout, presence, self.sweep)
        self._staging = Staging(self._layout, presence, self._keys, clock)
        sides = SideFiles(self._layout, scrap=self._staging.scrap)
        self._mails = Mails(self._layout, sides, self._keys, self._tell)
        self._doubts = Doubts(self._layout, self._mails, sides)
        self._listing = Listing(self._layout, clock)
        self._notes = LaneNotes(Path(self.location) / "lanes")
        self.transit = Transit(self._layout, self._keys)
        self._polling: list[PollingWatch] = []

    def __repr__(self) -> str:
        return f"<Maildir {self.location}>"

    # The two phases of a transaction

    def stage(self, envelope: Envelope, message: bytes) -> Entry:
        """See `ISpool`."""
        return self._staging.stage(envelope, message)

    def prepare(
        self, entries: Sequence[Entry], *, witnessed: bool = False, alone: bool = False
    ) -> None:
        """See `ISpool`."""
        self._staging.prepare(entries, witnessed=witnessed, alone=alone)

    def publish(self, entries: Sequence[Entry]) -> None:
        """See `ISpool`."""
        self._staging.publish(entries)
        self._tell(entries)

    def discard(self, entries: Sequence[Entry]) -> None:
        """See `ISpool`."""
        self._staging.discard(entries)

    def key_holder(self, key: str) -> str | None:
        """See `ISpool`."""
        holder = self._keys.holder(key)
        if holder is None:
            return None
        if self._doubts.has(holder.entry):
            raise key_in_doubt(key)
        return holder.message_id

    # What processors do

    def scan(self) -> Iterator[Entry]:
        """See `ISpool`.  What comes or goes while it runs may be told or not."""
        return iter(self._listing)

    def watch(self) -> NotifyWatch | PollingWatch:
        """See `ISpool`."""
        watch = watch_folders(
            self.location,
            ("new", "cur"),
            self._listing.entry_of,
            notify=self._notify,
            on_close=self._polling.remove,
        )
        if isinstance(watch, PollingWatch):
            self._polling.append(watch)
        return watch

    def serves(self, lane: str) -> bool:
        """See `ISpool`."""
        return True

    def claim(self, entry: Entry) -> Lease | None:
        """See `ISpool`."""
        return self._mails.claim(entry)

    def leased(self, entry: Entry) -> bool:
        """See `ISpool`."""
        return self._mails.leased(entry)

    def sync(self) -> None:
        """See `ISpool`."""
        self._mails.sync()

    # What people do

    def find(self, message_id: str) -> list[Record]:
        """See `ISpool`."""
        wanted = digest(message_id)
        records = []
        for entry in self.scan():
            if entry.lane and names.digest_of(entry.id) != wanted:
                continue
            try:
                record = self._read(entry)[0]
            except (NoSuchEntry, InvalidEnvelope):
                continue  # gone meanwhile; or nobody knows its Message-Id
            if record.envelope.message_id == message_id:
                records.append(record)
        return records

    def holding(self, message_ids: Collection[str]) -> set[str]:
        """See `ISpool`: the digest of a name tells."""
        wanted = {digest(message_id): message_id for message_id in message_ids}
        ends = (names.digest_of(entry.id) for entry in self.scan())
        return {wanted[end] for end in ends if end in wanted}

    def look_up(self, entry_id: str) -> Entry:
        """See `ISpool`."""
        for _ in range(2):  # it may move from cur/ to new/ between the two listings
            for entry in self.scan():
                if entry.id == entry_id:
                    return entry
        raise NoSuchEntry(
            f"{self.location}: no mail has the id {entry_id!r}: delivered, cancelled or never"
            " committed"
        )

    def load(self, entry: Entry) -> Record:
        """See `ISpool`."""
        return self._read(entry)[0]

    def read_message(self, entry: Entry) -> bytes:
        """See `ISpool`."""
        return self._read(entry)[1]

    def requeue(self, entry: Entry, *, unclear: bool = False) -> Entry:
        """See `ISpool`."""
        entry, fd = self._take(entry)
        try:
            after = self._mails.requeue(entry, unclear=unclear)
        finally:
            unlock(fd)
        self._tell([after])
        return after

    def hold(self, entry: Entry, reason: str) -> Entry:
        """See `ISpool`."""
        entry, fd = self._take(entry)
        try:
            return self._mails.hold(entry, reason, sync=True)
        finally:
            unlock(fd)

    def cancel(self, entry: Entry) -> Record:
        """See `ISpool`."""
        entry, fd = self._take(entry)
        try:
            try:
                record = self._read(entry)[0]
            except InvalidEnvelope as error:  # to cancel it may be all that one can do
                record = Record(entry, Envelope("", ()), {}, 0, str(error))
            self._mails.cancel(entry, record.envelope, has_side=True)
        finally:
            unlock(fd)
        self._mails.sync()
        return record

    # Why lanes wait

    def note_lane(self, key: str, note: LaneNote | None) -> None:
        """See `ISpool`."""
        self._notes.write(key, note)

    def lane_note(self, key: str) -> LaneNote | None:
        """See `ISpool`."""
        return self._notes.read(key)

    def lane_notes(self) -> dict[str, LaneNote]:
        """See `ISpool`."""
        return self._notes.all()

    # Upkeep

    def refused_before(self, when: float) -> Iterator[Entry]:
        """See `ISpool`."""
        return self._mails.refused_before(when)

    def sweep(self) -> SweepReport:
        """See `ISpool`."""
        doubts, staging = self._doubts, self._staging
        report = Sweep(self._layout, self._presence, self._keys, staging, doubts.hold).run()
        self._mails.remove_orphans()
        self._keys.prune()
        return report

    def left_overs(self) -> Sequence[str]:
        """See `ISpool`."""
        return left_overs(self._layout, self._presence)

    def doubts(self) -> Sequence[Doubt]:
        """See `ISpool`."""
        return self._doubts.all()

    def resolve(self, doubt: Doubt, verdict: Verdict) -> Record | None:
        """See `ISpool`."""
        resolved = self._doubts.resolve(doubt, verdict)
        if resolved is None:
            return None
        record, after = resolved
        if after is not None:
            self._tell([after])
        return record

    def close(self) -> None:
        """See `ISpool`."""
        for watch in list(self._polling):
            watch.close()
        self.transit.close()
        self._staging.close()
        self._mails.close()
        self._layout.close()

    def _tell(self, entries: Iterable[Entry]) -> None:
        for watch in self._polling:
            watch.tell(entries)

    def _read(self, entry: Entry) -> tuple[Record, bytes]:
        """Read a mail, wherever it has moved since it was listed."""
        for _ in range(_LOOK_UPS):
            try:
                return self._mails.read(entry)
            except FileNotFoundError:
                entry = self.look_up(entry.id)
        raise NoSuchEntry(f"{self.location}: {entry.id} moves all the time; try again")

    def _take(self, entry: Entry) -> tuple[Entry, int]:
        """Lock a mail, wherever it has moved; return what it is now, and the locked file."""
        for _ in range(_LOOK_UPS):
            locked = self._mails.lock(entry)
            if locked is not None:
                return entry, locked[0]
            if self.leased(entry):
                break
            entry = self.look_up(entry.id)
        raise EntryBusy(f"{entry.id}: is being delivered right now; try again in a moment")
