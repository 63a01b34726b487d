"""Moving what is in one outbox to another, while mails come in: see `ITransit`.

::

    FROM                      TO
    claim                                      who delivers leaves it alone
                              arrive           a copy, durable, that nobody sees
    set aside, with a mark                     if we die: nobody delivers it there
                              admit            visible, as it was
    removed

Whoever comes after a crash finds a mail without the mark: it is moved from the start; or with it:
then the copy is admitted if it is still there, and if it is not, it was admitted already.  So no
mail is ever where two processors could take it, and each is in one of the two places.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Final

from .envelope import digest
from .errors import InvalidEnvelope, InvalidSettings, NoSuchEntry, SpoolError
from .interfaces import KeyNote, Record, Settlement, State
from .queue import events_for
from .spool.keys import KEPT, digest_of

log = logging.getLogger(__name__)

#: What a mail is held with while it is moved; who it goes to follows.
MARK: Final = "being moved to "

#: Mails, and bytes of messages, that are under way together.
_MOST: Final = 100
_MOST_BYTES: Final = 16 * 1024 * 1024

#: Seconds between two passes while processors have mails that are to be moved.
_PAUSE: Final = 0.2


@dataclass(slots=True)
class Moved:
    """``mails``, ``accounts``, ``keys``: how many were moved or copied.

    ``left``: why what is left was not moved, by entry id.
    """

    mails: int = 0
    accounts: int = 0
    keys: int = 0
    left: dict[str, str] = field(default_factory=dict)


class Mover:
    """Moves the mails of one outbox to another, and copies accounts and idempotency keys.

    `source`, `target`: `IOutbox`, of which only the stores are used.  `patience`: seconds for
    which mails are waited for that somebody is delivering.
    """

    def __init__(self, source: Any, target: Any, *, patience: float = 60.0) -> None:
        self._source = source
        self._target = target
        self._transit = target.spool.transit
        self._origin = digest(source.location)
        self._patience = patience
        self._moved = Moved()
        self._mark = (
            f"{MARK}{target.location}: `cpsmail move` finishes that when it is said again; to"
            " release it here would send it twice"
        )

    def move(self) -> Moved:
        """Move all that is there, and return what was done; safe to repeat after any failure.

        Mails that come in meanwhile are moved, too.  Raises `SpoolError`, `VaultError` and their
        children: what was moved until then is.  `InvalidSettings`: both are the same outbox.
        """
        if self._source.spool.transit.place() == self._transit.place():
            raise InvalidSettings(
                f"outbox {self._source.location}: is both FROM and TO: {self._target.location} is"
                " another name of it"
            )
        try:
            return self._move()
        finally:
            self._transit.close()

    def _move(self) -> Moved:
        moved, waited = self._moved, time.monotonic()
        self._source.spool.sweep()  # what dead processes left is moved as it is held
        self._drop_strays()
        while True:
            before = moved.mails
            moved.left.clear()
            self._copy_accounts()
            moved.keys += self._copy_keys()
            busy = self._pass()
            if moved.mails > before:
                waited = time.monotonic()
            elif not busy or time.monotonic() - waited > self._patience:
                break
            else:
                time.sleep(_PAUSE)
        self._target.journal.flush()
        return moved

    def _drop_strays(self) -> None:
        """Forget copies of mails that were not marked any more before we died, and are gone.

        Only of mails from here: those from elsewhere may be marked there.
        """
        copies = set(self._transit.arrived(self._origin))
        if copies:
            copies.difference_update(entry.id for entry in self._source.spool.scan())
        for entry_id in copies:
            try:
                self._source.spool.look_up(entry_id)  # it may have changed its place meanwhile
            except NoSuchEntry:
                self._transit.dismiss([entry_id])

    def _pass(self) -> bool:
        """Move what a listing shows; return whether some of it may be moved soon."""
        refused: set[str] = set()
        batch = _Batch()
        for entry in self._source.spool.scan():
            if not entry.lane:
                why = "was not queued by us: let a processor deliver it there"
                self._moved.left[entry.id] = why
                continue
            lease = self._source.spool.claim(entry)
            if lease is None:
                refused.add(entry.id)
                continue
            try:
                self._add(batch, lease)
            except BaseException:  # an interrupt, too, must not keep the leases
                lease.release()
                batch.release()
                raise
            if len(batch.leases) >= _MOST or batch.size >= _MOST_BYTES:
                self._carry(batch)
                batch = _Batch()
        self._carry(batch)
        return bool(refused) and self._are_busy(refused)

    def _are_busy(self, refused: set[str]) -> bool:
        """Say what is with mails that gave no lease; return whether they may give one soon."""
        busy = False
        for entry in self._source.spool.scan():
            if entry.id not in refused:
                continue
            try:
                why = "is being delivered"
                if not self._source.spool.leased(entry):
                    self._source.spool.load(entry)
                    why = "what is known of it is damaged, or it changes all the time"
                busy = True
            except NoSuchEntry:
                continue  # delivered
            except InvalidEnvelope as error:
                why = f"cannot be read: {error}"
            self._moved.left[entry.id] = why
        return busy

    def _add(self, batch: _Batch, lease: Any) -> None:
        record: Record = self._source.spool.load(lease.entry)
        if record.reason.startswith(MARK):
            if record.entry.state is State.HELD:
                if record.reason == self._mark:
                    batch.marked.append(lease)
                else:
                    self._moved.left[record.entry.id] = record.reason
                    lease.release()
                return
            # On files a mark has two steps, and a crash came between.
            if record.reason == self._mark and record.entry.id in self._arrived():
                batch.half_marked.append(lease)  # the copy has the reason that was there
                return
            record = replace(record, reason="")
        batch.mails.append((lease, record, lease.read_message()))
        lease.forget_message()
        batch.size += record.size

    def _carry(self, batch: _Batch) -> None:
        marked = list(batch.marked)
        try:
            if batch.mails or batch.half_marked:
                marked += self._mark_all([*self._send_ahead(batch), *batch.half_marked])
            self._transit.admit([lease.entry.id for lease in marked])
        except BaseException:  # an interrupt, too, may have come after the mark
            batch.leave()
            raise
        for lease in marked:
            lease.settle(Settlement(State.ACCEPTED))
        self._source.spool.sync()
        self._moved.mails += len(marked)

    def _send_ahead(self, batch: _Batch) -> list[Any]:
        """Let copies arrive; return the leases of those that were taken."""
        mails = [(record, message) for _, record, message in batch.mails]
        taken = set(self._transit.arrive(mails, self._origin))
        leases = []
        for lease, record, _ in batch.mails:
            if record.entry.id in taken:
                self._tell(record)
                leases.append(lease)
            else:
                why = f"{self._target.location} has a mail of this id: see which one is to stay"
                self._moved.left[record.entry.id] = why
                lease.release()
        return leases

    def _arrived(self) -> Collection[str]:
        copies: Collection[str] = self._transit.arrived(self._origin)
        return copies

    def _mark_all(self, leases: list[Any]) -> list[Any]:
        marked = []
        for lease in leases:
            try:
                lease.set_aside(self._mark)
            except SpoolError as error:  # another one may have it: its copy is left alone
                log.warning("%s: not moved now: %s", lease.entry.id, error)
                self._moved.left[lease.entry.id] = str(error)
                lease.leave()
            else:
                marked.append(lease)
        # With its mail at the latest: whoever commits it again is told.
        now = self._target.clock()
        keyed = [lease for lease in marked if lease.envelope.key]
        self._transit.keep_keys([_key_of(lease, now) for lease in keyed])
        return marked

    def _tell(self, record: Record) -> None:
        """Take what happened to a mail along, and say where it went."""
        entry, envelope, journal = record.entry, record.envelope, self._target.journal
        if entry.attempts:
            known = set(journal.events(message_id=envelope.message_id))
            story = self._source.journal.events(message_id=envelope.message_id)
            for event in story:
                if event.entry == entry.id and event not in known:
                    journal.record(event)
        now, where = self._source.clock(), f"to {self._target.location}"
        for event in events_for(envelope.recipients, entry, envelope, "moved", now, where):
            self._source.journal.record(event)

    def _copy_accounts(self) -> None:
        """Copy the accounts that the target does not have: what is there stays as it is."""
        vault = self._target.vault
        there = {account.mailbox for account in vault.accounts()}
        for mailbox in [account.mailbox for account in self._source.vault.accounts()]:
            if mailbox not in there:
                token = vault.stage(mailbox, self._source.vault.get(mailbox))
                vault.prepare([token])
                vault.publish([token])
                self._moved.accounts += 1

    def _copy_keys(self) -> int:
        """Copy the idempotency keys that the target does not have; return how many."""
        there = {note.digest for note in self._transit.key_notes()}
        missing = [n for n in self._source.spool.transit.key_notes() if n.digest not in there]
        self._transit.keep_keys(missing)
        return len(missing)


@dataclass(slots=True)
class _Batch:
    mails: list[tuple[Any, Record, bytes]] = field(default_factory=list)
    marked: list[Any] = field(default_factory=list)
    half_marked: list[Any] = field(default_factory=list)
    size: int = 0

    @property
    def leases(self) -> list[Any]:
        return [*(lease for lease, _, _ in self.mails), *self.half_marked, *self.marked]

    def release(self) -> None:
        """Give all back as it was when it was claimed."""
        for lease in self.leases:
            lease.release()

    def leave(self) -> None:
        """Leave all as if we had died: what is marked stays so."""
        for lease in self.leases:
            lease.leave()


def _key_of(lease: Any, now: float) -> KeyNote:
    envelope = lease.envelope
    until = max(now, envelope.not_before) + KEPT
    return KeyNote(digest_of(envelope.key), lease.entry.id, envelope.message_id, until)
