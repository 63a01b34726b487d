"""``cpsmail queue`` and ``cpsmail show``: look at what is in the spool."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidEnvelope, NoSuchEntry
from ..interfaces import Entry, LaneNote, Record, State
from ..queue import entry_as_seen, is_due, record_as_seen, why
from ..selection import lane_of, selector
from ..shape import BY, UNREADABLE
from ..wording import age, clean_lines, moment, upcoming
from .app import App, json_option, pass_app
from .mails import entry_json, mail_json, note_json, status_json
from .output import emit, say, table
from .shape import show_shape

if TYPE_CHECKING:
    from ..outbox import Outbox

#: What a mail in the spool can be.
STATES = ("queued", "deferred", "held", "unclear", "refused")

#: Mails that a person is shown without asking for more.
_LIMIT = 100

_COLUMNS = (
    "ID", "STATE", "MAILBOX", "SENDER", "RECIPIENTS", "AGE", "TRIES", "DUE", "WHY",
)  # fmt: skip


def selection(function: Any) -> Any:
    """Give a command ``--state`` and ``--mailbox``."""
    function = click.option(
        "--mailbox",
        "--lane",
        "mailbox",
        metavar="MAILBOX",
        help="Only of this mailbox, relay (host:port) or lane.",
    )(function)
    return click.option(
        "--state",
        "states",
        type=click.Choice(STATES),
        multiple=True,
        help="Only in this state.  Repeatable.",
    )(function)


def select(outbox: Outbox, states: tuple[str, ...], mailbox: str | None) -> list[Entry]:
    """Return the entries that `selection` asks for, the oldest first."""
    wanted = _selector(outbox, states, mailbox)
    notes = outbox.spool.lane_notes()
    return [
        entry
        for entry in outbox.queue.entries()
        if wanted(entry, entry_as_seen(entry, notes.get(entry.lane)))
    ]


@click.command()
@selection
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=_LIMIT,
    show_default=True,
    metavar="N",
    help="Show so many mails, or rows, at most, 0 for all.",
)
@click.option(
    "--by",
    type=click.Choice(BY),
    help="Count instead: by mailbox, by mailbox and age, or by what they wait for.",
)
@json_option
@pass_app
def queue(
    app: App,
    states: tuple[str, ...],
    mailbox: str | None,
    limit: int,
    by: str | None,
    as_json: bool,
) -> None:
    """List the mails in the queue, how many there are, and why lanes wait.

    A mail whose lane is in trouble is deferred, until the lane's next try.
    """
    if by is None:
        _list(app, states, mailbox, limit, as_json)
        return
    with app.outbox() as outbox:
        notes = outbox.spool.lane_notes()
        wanted = _selector(outbox, states, mailbox)
        pairs = ((e, entry_as_seen(e, notes.get(e.lane))) for e in outbox.queue.entries())
        selected = (pair for pair in pairs if wanted(*pair))
        show_shape(outbox, by, selected, limit=limit, as_json=as_json, now=outbox.clock())


def _list(
    app: App, states: tuple[str, ...], mailbox: str | None, limit: int, as_json: bool
) -> None:
    counts: Counter[str] = Counter()
    mails: list[tuple[Entry, Record | None]] = []
    oldest = 0.0
    with app.outbox() as outbox:
        now, notes = outbox.clock(), outbox.spool.lane_notes()
        lane = lane_of(mailbox) if mailbox is not None else None
        lanes = {key: note for key, note in sorted(notes.items()) if lane in (None, key)}
        wanted = selector(outbox.queue, states, lane)
        for entry in outbox.queue.entries():
            seen = entry_as_seen(entry, notes.get(entry.lane))
            if is_due(seen, now):
                oldest = min(oldest or now, entry.staged_at or now)
            if not wanted(entry, seen):
                continue
            if not limit or len(mails) < limit:
                try:
                    mails.append((seen, _opened(outbox, entry, notes)))
                except NoSuchEntry:
                    continue  # delivered while we looked
            counts[seen.state] += 1
        location = outbox.location
    more = counts.total() - len(mails)
    if as_json:
        emit(
            {
                "outbox": location,
                "counts": {str(state): count for state, count in sorted(counts.items())},
                "oldest_due": oldest or None,
                "lanes": [note_json(key, note) for key, note in lanes.items()],
                "mails": [mail_json(r) if r else _unreadable_json(e) for e, r in mails],
                "more": more,
            }
        )
        return
    if mails:
        table(_COLUMNS, (_row(entry, record, now) for entry, record in mails))
    if more > 0:
        say(f"... and {more} more: --limit 0 shows all")
    listed = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    say(f"{listed or 'no mails'}{f'; oldest due: {age(now - oldest)}' if oldest else ''}")
    for note in lanes.values():
        say(
            f"{note.route} waits since {age(now - note.since)}, {note.trouble} in trouble, next try"
            f" {upcoming(note.until, now)}: {note.reason}"
        )


@click.command()
@click.argument("name", metavar="ID|MESSAGE-ID")
@click.option("--headers", is_flag=True, help="Also print the header of the message.")
@click.option(
    "--raw",
    is_flag=True,
    help="Print the message alone, byte for byte; on a terminal, control characters escaped.",
)
@json_option
@pass_app
def show(app: App, name: str, headers: bool, raw: bool, as_json: bool) -> None:
    """Show one mail: its envelope, and what became of each recipient.

    A mail that has left the queue is looked up in the journal by its Message-Id.
    """
    with app.outbox() as outbox:
        try:
            records = outbox.queue.find(name)
        except NoSuchEntry:
            if raw or headers:
                raise
            try:
                status = outbox.status(name)
            except NoSuchEntry:
                raise NoSuchEntry(
                    f"{name}: is no mail in the queue, and no Message-Id in the journal: never"
                    " committed, or gone for over 30 days; what has left the queue is found by"
                    " its Message-Id, or by an address: `cpsmail trace ADDRESS`"
                ) from None
            if as_json:
                emit({"mails": [], "journal": status_json(status)})
            else:
                for line in str(status).splitlines():
                    say(line)
            return
        if raw:
            if len(records) > 1:
                ids = ", ".join(record.entry.id for record in records)
                raise click.UsageError(f"{name} names {len(records)} mails; name one: {ids}")
            _print_raw(outbox.queue.message(records[0]))
            return
        texts = [_header(outbox.queue.message(r)) if headers else None for r in records]
        records = [record_as_seen(r, outbox.spool.lane_note(r.entry.lane)) for r in records]
        if as_json:
            emit({"mails": [_with_header(r, text) for r, text in zip(records, texts, strict=True)]})
            return
        for record, text in zip(records, texts, strict=True):
            _print_record(outbox, record)
            if text is not None:
                say()
                click.echo(clean_lines(text).rstrip("\n"))


def _selector(
    outbox: Outbox, states: tuple[str, ...], mailbox: str | None
) -> Callable[[Entry, Entry], bool]:
    lane = lane_of(mailbox) if mailbox is not None else None
    return selector(outbox.queue, states, lane)


def _opened(outbox: Outbox, entry: Entry, notes: Mapping[str, LaneNote]) -> Record | None:
    """Return a mail as it is seen; None: it cannot be read.  Raises `NoSuchEntry`."""
    try:
        (record,) = outbox.queue.find(entry)
    except InvalidEnvelope:
        return None
    return record_as_seen(record, notes.get(entry.lane))


def _row(entry: Entry, record: Record | None, now: float) -> tuple[object, ...]:
    queued = age(now - entry.staged_at) if entry.staged_at else ""
    waits = entry.due or entry.state in (State.QUEUED, State.DEFERRED)
    due = upcoming(entry.due, now) if waits else ""
    if record is None:
        return (entry.id, entry.state, "", "", "", queued, entry.attempts, due, UNREADABLE)
    envelope = record.envelope
    return (
        entry.id,
        entry.state,
        envelope.route,
        envelope.sender or "<>",
        ", ".join(envelope.recipients),
        queued,
        entry.attempts,
        due,
        why(record),
    )


def _print_record(outbox: Outbox, record: Record) -> None:
    entry, envelope = record.entry, record.envelope
    note = outbox.spool.lane_note(entry.lane)
    lane = f"waits, next try {upcoming(note.until, outbox.clock())}" if note else ""
    if note and note.reason != record.reason:
        lane += f": {note.reason}"
    lines = {
        "id": entry.id,
        "message-id": envelope.message_id,
        "state": f"{entry.state}: {record.reason}" if record.reason else entry.state,
        "mailbox": envelope.route,
        "sender": envelope.sender or "<>",
        "queued": moment(entry.staged_at),
        "due": moment(entry.due),
        "attempts": entry.attempts,
        "size": f"{record.size} bytes",
        "lane": lane,
    }
    for label, value in lines.items():
        if value != "":
            say(f"{label + ':':<12}{value}")
    for recipient in envelope.recipients:
        outcome = record.outcomes.get(recipient)
        at = f" ({moment(outcome.at)})" if outcome and outcome.at else ""
        say(f"  {recipient}: {outcome or State.QUEUED}{at}")


def _with_header(record: Record, text: str | None) -> dict[str, Any]:
    return mail_json(record) | ({"headers": text} if text is not None else {})


def _unreadable_json(entry: Entry) -> dict[str, Any]:
    return {**entry_json(entry), "reason": UNREADABLE}


def _header(message: bytes) -> str:
    end = re.search(rb"\r?\n\r?\n|\r\r", message)
    return message[: end.start() if end else None].decode("utf-8", "backslashreplace")


def _print_raw(message: bytes) -> None:
    if sys.stdout.isatty():
        click.echo(clean_lines(message.decode("utf-8", "backslashreplace")), nl=False)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(message)
