"""``cpsmail trace``: what happened to a mail, from the journal."""

from __future__ import annotations

from typing import Any

import click

from ..errors import NoSuchEntry
from ..journal import Event
from ..search import search
from ..wording import moment
from .app import App, json_option, pass_app
from .output import emit, table


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
        found = search(outbox.queue, outbox.journal, name, limit=limit)
        path = outbox.journal.path
    events = found.events
    if not events and not found.records:
        raise NoSuchEntry(
            f"{name}: neither the queue nor the journal {path} knows such a Message-Id, address"
            " or id"
        )
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
