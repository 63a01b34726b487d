"""``cpsmail trace``: what happened to a mail, from the journal."""

from __future__ import annotations

from typing import Any

import click

from ..errors import NoSuchEntry
from ..journal import Event
from .app import App, json_option, pass_app
from .output import emit, moment, table


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
    """Print what happened to a mail, or to all mails of an address, the oldest first."""
    with app.outbox() as outbox:
        bare = name.strip().removeprefix("<").removesuffix(">")
        journal = outbox.journal
        events = journal.events(message_id=bare, limit=limit)
        events = events or journal.events(address=bare, limit=limit)
        if not events:
            try:
                message_id = outbox.queue.find(bare)[0].envelope.message_id
            except NoSuchEntry:
                raise NoSuchEntry(
                    f"{bare}: the journal {journal.path} knows no such Message-Id, address or id"
                ) from None
            events = journal.events(message_id=message_id, limit=limit)
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
