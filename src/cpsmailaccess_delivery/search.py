"""Look mails up, in the spool and in the journal: what happened to one, which an address has."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import NoSuchEntry
from .interfaces import Entry, Record, State
from .journal import Event, Journal
from .queue import Queue


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of a Message-Id, an entry id or an address.

    ``records``: mails in the spool.  ``events``: of the journal, the oldest first; that a mail
    was queued is told by its id.  ``not_opened``: mails of the spool that were not looked at.
    """

    records: list[Record]
    events: list[Event]
    not_opened: int = 0


def search(
    queue: Queue, journal: Journal, name: str, *, limit: int = 1000, most: int | None = None
) -> Found:
    """Return what is known of a Message-Id, an entry id or an address; maybe nothing.

    `limit`: the newest so many events.  `most`: mails of the spool that are opened for an
    address, the newest ones; None: all.
    """
    bare = name.strip().removeprefix("<").removesuffix(">")
    try:
        records = queue.find(bare)
    except NoSuchEntry:
        records = []
    not_opened = 0
    message_id = records[0].envelope.message_id if records else bare
    events = journal.events(message_id=message_id, limit=limit)
    if records and records[0].entry.id == bare:
        events = [event for event in events if event.entry == bare]
    if not records and not events:
        records, not_opened = _of_address(queue, bare, most)
        events = journal.events(address=bare, limit=limit)
    story = sorted([*_queued(records, events), *events], key=lambda event: event.at)
    return Found(records, story[-limit:], not_opened)


def _of_address(queue: Queue, address: str, most: int | None) -> tuple[list[Record], int]:
    """Return the mails in the spool from or to an address: opens them."""
    address = address.lower()
    not_opened = 0
    if most is None:
        records = queue.records()
    else:
        newest: deque[Entry] = deque(maxlen=most)
        for number, entry in enumerate(queue.entries(), 1):
            newest.append(entry)
            not_opened = max(0, number - most)
        records = itertools.chain.from_iterable(_opened(queue, newest))
    return [
        record
        for record in records
        if address in (a.lower() for a in (record.envelope.sender, *record.envelope.recipients))
    ], not_opened


def _opened(queue: Queue, entries: Iterable[Entry]) -> Iterable[list[Record]]:
    for entry in entries:
        try:
            yield queue.find(entry)
        except (NoSuchEntry, ValueError):
            continue  # gone meanwhile, or cannot be read


def _queued(records: Iterable[Record], events: Iterable[Event]) -> list[Event]:
    """Return that mails were queued, of those in the spool and of those that left it."""
    queued: dict[tuple[str, str], Event] = {}
    for record in records:
        envelope = record.envelope
        for recipient in envelope.recipients:
            queued[record.entry.id, recipient] = Event(
                at=record.entry.staged_at,
                kind=State.QUEUED,
                entry=record.entry.id,
                message_id=envelope.message_id,
                mailbox=str(envelope.route),
                sender=envelope.sender,
                recipient=recipient,
            )
    for event in events:
        queued.setdefault(
            (event.entry, event.recipient),
            event._replace(
                at=Entry(event.entry, "").staged_at,
                kind=State.QUEUED,
                attempt=0,
                reply="",
                relay="",
            ),
        )
    return [event for event in queued.values() if event.at]
