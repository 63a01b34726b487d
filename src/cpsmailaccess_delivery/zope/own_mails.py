"""The mails of somebody's own mailboxes: what he may see of them, and do.  Knows no Zope.

"His" are the mails that leave through an account which he owns.  Everything goes by the id of the
entry, never by Message-Id: that is part of the message, and whoever writes one chooses it.
"""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import nlargest
from typing import Any, Final

from ..attempt import worst
from ..envelope import Route, lane_key
from ..errors import InvalidOption, NoSuchEntry, OutboxError
from ..interfaces import Entry, Outcome, Record, State
from ..journal import MAX_LAG, Event
from ..status import status_of
from .header import header_of
from .queue_view import MOST_OPENED

#: Kinds of mails, in the order in which a page offers them.
KINDS: Final = ("scheduled", "waiting", "sent", "refused", "unclear", "taken back")

_EVENTS: Final = 5_000  # of one mailbox that are looked at, the newest
_READ: Final = 1024 * 1024  # bytes of a message that is read for its subject


@dataclass(frozen=True)
class Mail:
    """One mail.

    ``kind``: of `KINDS`.  ``queued_at``, ``next_try``: seconds since the epoch; ``next_try`` 0:
    at once, or never.  ``reason``: why it waits, or the words of the relay; hostile text.
    ``entry``: while it is in the spool.
    """

    id: str
    message_id: str
    mailbox: str
    kind: str
    recipients: Mapping[str, Outcome]
    queued_at: float
    next_try: float = 0.0
    reason: str = ""
    entry: Entry | None = None
    size: int = 0

    @property
    def is_held(self) -> bool:
        """Whether a person has set it aside, or must decide."""
        return self.entry is not None and self.entry.state is State.HELD

    @property
    def may_cancel(self) -> bool:
        """Whether somebody has not got it yet, and might; not of what was set aside."""
        return self.may_retry and self.kind in ("scheduled", "waiting", "unclear")

    @property
    def may_retry(self) -> bool:
        """Whether its sender may ask for another attempt: not of what was set aside."""
        return self.entry is not None and not self.is_held

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens by itself."""
        return self.is_held or self.kind in ("sent", "refused", "taken back")


class OwnMails:
    """See the module.

    `since`: the mailboxes, and from when on (seconds since the epoch) their mails are his.
    """

    def __init__(self, outbox: Any, since: Mapping[str, float]) -> None:
        self._outbox = outbox
        self._since = since

    def list(self) -> tuple[list[Mail], int]:
        """Return them, the newest first, and how many older ones in the spool were not opened.

        Those that have left the spool as far as the journal goes.
        """
        entries = self._entries()
        newest = nlargest(MOST_OPENED, entries, key=lambda entry: (entry.staged_at, entry.id))
        found = {mail.id: mail for mail in self._gone()}
        found |= {mail.id: mail for mail in self._opened(newest)}
        mails = sorted(found.values(), key=lambda mail: (mail.queued_at, mail.id), reverse=True)
        return mails, len(entries) - len(newest)

    def get(self, id: str) -> Mail:
        """Return one.  Raises `NoSuchEntry`, whether it is another's or nobody's."""
        for patience in (MAX_LAG, 0.0):
            entries = [entry for entry in self._entries() if entry.id == id]
            for mail in (*self._opened(entries), *self._gone()):
                if mail.id == id:
                    return mail
            time.sleep(patience)  # another process has settled it, and its journal is behind
        raise NoSuchEntry(f"{id!r}: you have no mail of this name, or it is too long ago")

    def sent_as(self, mailbox: str, message_id: str) -> Mail:
        """Return the mail that `send` has just named.  Raises `NoSuchEntry`."""
        for patience in (MAX_LAG, 0.0):
            entries = [record.entry for record in self._outbox.spool.find(message_id)]
            for mail in (*self._opened(entries), *self._gone()):
                if (mail.mailbox, mail.message_id) == (mailbox, message_id):
                    return mail
            time.sleep(patience)
        raise NoSuchEntry(f"{message_id!r}: you have no mail of this name, or it is too long ago")

    def cancel(self, id: str) -> None:
        """Take one back.  Raises `NoSuchEntry`, `EntryBusy`, `InvalidOption`."""
        mail = self.get(id)
        if not mail.may_cancel:
            raise InvalidOption("This mail cannot be taken back any more.")
        self._outbox.queue.cancel(mail.entry)

    def retry(self, id: str) -> None:
        """Let one be tried now.  Raises `NoSuchEntry`, `EntryBusy`, `InvalidOption`."""
        mail = self.get(id)
        if not mail.may_retry:
            raise InvalidOption("This mail cannot be tried again.")
        self._outbox.queue.retry(mail.entry)

    def subject(self, mail: Mail) -> str:
        """Return its subject, as far as it is in the spool and not huge."""
        if mail.entry is None or mail.size > _READ:
            return ""
        try:
            message = self._outbox.spool.read_message(mail.entry)
        except OutboxError:  # it has just gone
            return ""
        fields = header_of(message)  # which is quick, whatever it is
        return next((value for name, value in fields if name.lower() == "subject"), "")

    def _is_own(self, mailbox: str, entry_id: str) -> bool:
        return mailbox in self._since and _staged_at(entry_id) >= self._since[mailbox]

    def _entries(self) -> builtins.list[Entry]:
        """Return the entries in the spool that may be his: the lane is an index only."""
        lanes = {lane_key(Route(mailbox)) for mailbox in self._since}
        return [entry for entry in self._outbox.spool.scan() if entry.lane in lanes]

    def _opened(self, entries: Iterable[Entry]) -> Iterator[Mail]:
        """Yield the mails of these entries that are his, as their envelopes say."""
        spool, now = self._outbox.spool, self._outbox.clock()
        notes = spool.lane_notes()
        for entry in entries:
            try:
                record = spool.load(entry)
            except (NoSuchEntry, ValueError):
                continue
            envelope = record.envelope
            if envelope.sender and self._is_own(envelope.route.mailbox, entry.id):
                yield _of_record(record, notes, now)

    def _gone(self) -> Iterator[Mail]:
        """Yield what has an end, from the journal.  What the spool has, it knows better."""
        events: dict[str, list[Event]] = {}
        for mailbox in self._since:
            for event in self._outbox.journal.events(address=mailbox, limit=_EVENTS):
                if event.entry and event.sender and event.mailbox == mailbox:
                    events.setdefault(event.entry, []).append(event)
        for id, happened in events.items():
            entry = Entry(id, "")
            outcomes = {
                event.recipient: Outcome(State(event.kind), event.reply, event.at)
                for event in happened
                if event.recipient and event.kind in _STATES
            }
            if outcomes and self._is_own(happened[0].mailbox, id):
                state = worst(outcomes)
                yield Mail(
                    id=id,
                    message_id=happened[0].message_id,
                    mailbox=happened[0].mailbox,
                    kind=_KIND_OF.get(state, "waiting"),
                    recipients=outcomes,
                    queued_at=entry.staged_at,
                    reason=_words(outcomes, state),
                )


_STATES: Final = frozenset(State)
_KIND_OF: Final = {
    State.ACCEPTED: "sent",
    State.REFUSED: "refused",
    State.UNCLEAR: "unclear",
    State.CANCELLED: "taken back",
}


def _staged_at(entry_id: str) -> float:
    """Return when a mail was staged, in seconds since the epoch, with the microseconds of its id.

    0: it was not named by us.
    """
    seconds, _, rest = entry_id.partition(".")
    micros = rest[1:7]
    if not (seconds.isdecimal() and rest.startswith("M") and micros.isdecimal()):
        return 0.0
    return int(seconds) + int(micros) / 1e6


def _of_record(record: Record, notes: Mapping[str, Any], now: float) -> Mail:
    status = status_of(record.envelope.message_id, [record], notes, {})
    assert status is not None  # noqa: S101 - it has recipients
    is_scheduled = status.state is State.QUEUED and status.next_try > now
    return Mail(
        id=record.entry.id,
        message_id=record.envelope.message_id,
        mailbox=record.envelope.route.mailbox,
        kind="scheduled" if is_scheduled else _KIND_OF.get(status.state, "waiting"),
        recipients=status.recipients,
        queued_at=record.entry.staged_at,
        next_try=status.next_try,
        reason=status.reason or _words(status.recipients, status.state),
        entry=record.entry,
        size=record.size,
    )


def _words(recipients: Mapping[str, Outcome], state: State) -> str:
    """Return what was last said of a recipient in this state."""
    return next((each.reply for each in recipients.values() if each.state is state), "")
