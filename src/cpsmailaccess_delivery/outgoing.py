"""What a transaction does to the spool: mails that it sends, and mails that it takes back.

::

    send     stage -> (dropped by a cancel in the same transaction) -> prepare -> publish
    cancel   find  -> prepare: lease, hold -> publish: remove
                                           -> discard: release

The lease between vote and finish is why no processor sends what is being cancelled.  A crash
in between ends it, and leaves the mail held, in doubt: the witness is asked, or a person decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from .envelope import Envelope
from .errors import SpoolError
from .interfaces import Entry, Settlement, State
from .queue import events_of
from .settling import take
from .spool.doubts import CANCEL_ASKED, CANCEL_IN_DOUBT

log = logging.getLogger(__name__)

_CANCELLED: Final = Settlement(State.CANCELLED)


@dataclass(eq=False, slots=True)
class Outgoing:
    """One mail that is sent in a transaction which has not ended."""

    entry: Entry
    envelope: Envelope
    dropped: bool = False  # cancelled in the same transaction


@dataclass(eq=False, slots=True)
class Removal:
    """One mail that is cancelled in a transaction: of an earlier one, or of the same."""

    entry: Entry
    own: Outgoing | None = None
    lease: Any = None
    token: str = ""  # of the transaction

    def begin(self, token: str) -> Removal:
        """Return it; a mail of the same transaction is dropped from now on."""
        self.token = token
        if self.own is not None:
            self.own.dropped = True
        return self


@dataclass(slots=True)
class Doings:
    """What the current transaction has done so far, for what it does next; by `id`."""

    sent: dict[int, Outgoing] = field(default_factory=dict)
    removals: dict[int, Removal] = field(default_factory=dict)

    def find_sent(self, message_id: str) -> list[Outgoing]:
        """Return the mails that it sends with this Message-Id."""
        sent = self.sent.values()
        return [
            mail for mail in sent if mail.envelope.message_id == message_id and not mail.dropped
        ]

    def find_key(self, key: str) -> str | None:
        """Return the Message-Id of the mail that it sends with this key, or None."""
        found = (
            mail for mail in self.sent.values() if mail.envelope.key == key and not mail.dropped
        )
        return next((mail.envelope.message_id for mail in found), None)

    def has_cancelled(self, entry: Entry) -> bool:
        """Tell whether it cancels this mail."""
        return any(removal.entry.id == entry.id for removal in self.removals.values())


class OutgoingMails:
    """A `datamanager.TwoPhaseStore` of `Outgoing`."""

    def __init__(self, spool: Any, announcer: Any, clock: Callable[[], float]) -> None:
        self._spool = spool
        self._announcer = announcer
        self._clock = clock

    def prepare(self, mails: Sequence[Outgoing], *, witnessed: bool = False) -> None:
        """Make durable what has not been dropped."""
        self._spool.discard([mail.entry for mail in mails if mail.dropped])
        kept = [mail.entry for mail in mails if not mail.dropped]
        self._spool.prepare(kept, witnessed=witnessed)

    def publish(self, mails: Sequence[Outgoing]) -> None:
        """Make it visible, and tell of it."""
        mails = [mail for mail in mails if not mail.dropped]
        self._spool.publish([mail.entry for mail in mails])
        now = self._clock()
        for mail in mails:
            self._announcer.queued(now, mail.entry.id, mail.envelope)

    def discard(self, mails: Sequence[Outgoing]) -> None:
        """Remove it."""
        self._spool.discard([mail.entry for mail in mails])


class Removals:
    """A `datamanager.TwoPhaseStore` of `Removal`."""

    def __init__(self, spool: Any, journal: Any, clock: Callable[[], float]) -> None:
        self._spool = spool
        self._journal = journal
        self._clock = clock

    def prepare(self, removals: Sequence[Removal], *, witnessed: bool = False) -> None:
        """Take the leases, and hold the mails.  Raises `NoSuchEntry`, `EntryBusy`."""
        for removal in removals:
            if removal.own is None:
                removal.lease = take(self._spool, removal.entry)
                if witnessed:
                    removal.lease.set_aside(CANCEL_ASKED, removal.token)
                else:
                    removal.lease.set_aside(CANCEL_IN_DOUBT)

    def publish(self, removals: Sequence[Removal]) -> None:
        """Remove the mails.  Never raises: it logs."""
        removed = False
        for removal in removals:
            lease, removal.lease = removal.lease, None
            if lease is None:
                continue
            try:
                lease.settle(_CANCELLED)
            except SpoolError as error:
                log.critical("%s: cancelled, but only held on disk: %s", removal.entry.id, error)
                lease.leave()
                continue
            removed = True
            self._note(lease)
        if removed:
            try:
                self._spool.sync()
            except SpoolError as error:
                log.error("%s; a power loss may bring cancelled mails back", error)

    def discard(self, removals: Sequence[Removal]) -> None:
        """Leave the mails as they were."""
        for removal in removals:
            if removal.own is not None:
                removal.own.dropped = False
            if removal.lease is not None:
                removal.lease.release()
                removal.lease = None

    def _note(self, lease: Any) -> None:
        if self._journal is None:
            return
        for event in events_of(
            lease.entry, lease.envelope, lease.outcomes, State.CANCELLED, self._clock()
        ):
            self._journal.record(event)
