"""``cpsmail trace``: what happened to a mail, from the journal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from ..errors import NoSuchEntry
from ..interfaces import Entry, Record, State
from ..journal import Event
from .app import App, json_option, pass_app
from .output import emit, moment, table

if TYPE_CHECKING:
    from ..outbox import Outbox


@click.command()
@click.argument("name", metavar="MESSAGE-ID|ADDRESS|ID")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="The newest so many events.",
)
@json_option
@pass_app
def trace(app: App, name: str, limit: int, as_json: bool) -> None:
    """Print what happened to a mail, or to all mails of an address, the oldest first.

    That a mail was queued is told by its id; everything else by the journal.
    """
    with app.outbox() as outbox:
        bare = name.strip().removeprefix("<").removesuffix(">")
        journal = outbox.journal
        try:
            records = outbox.queue.find(bare)
        except NoSuchEntry:
            records = []
        message_id = records[0].envelope.message_id if records else bare
        events = journal.events(message_id=message_id, limit=limit)
        if records and records[0].entry.id == bare:
            events = [event for event in events if event.entry == bare]
        if not records and not events:
            records = _of_address(outbox, bare)
            events = journal.events(address=bare, limit=limit)
    if not events and not records:
        raise NoSuchEntry(
            f"{bare}: neither the queue nor the journal {journal.path} knows such a Message-Id,"
            " address or id"
        )
    events = sorted([*_queued(records, events), *events], key=lambda event: event.at)[-limit:]
    if as_json:
        emit({"events": [_json(event) for event in events]})
        return
    table(
        ("TIME", "EVENT", "MAILBOX", "RECIPIENT", "TRY", "RELAY", "REPLY"),
        (
            (moment(e.at), e.kind, e.mailbox, e.recipient, e.attempt or "", e.relay, e.reply)
            for e in events
        ),
    )


def _of_address(outbox: Outbox, address: str) -> list[Record]:
    """Return the mails in the spool from or to an address: opens them all."""
    address = address.lower()
    return [
        record
        for record in outbox.queue.records()
        if address in (a.lower() for a in (record.envelope.sender, *record.envelope.recipients))
    ]


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


def _json(event: Event) -> dict[str, Any]:
    return {
        "at": event.at,
        "event": str(event.kind),
        "id": event.entry,
        "message_id": event.message_id,
        "mailbox": event.mailbox,
        "sender": event.sender,
        "recipient": event.recipient,
        "attempt": event.attempt,
        "relay": event.relay,
        "reply": event.reply,
    }
