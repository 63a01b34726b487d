"""One mail, and the state of a queue, for people and for programs."""

from __future__ import annotations

from typing import Any

from ..address import relay_name
from ..interfaces import Entry, LaneNote, Outcome, Record
from ..status import Status


def mail_json(record: Record) -> dict[str, Any]:
    """Return one mail in the spool; the keys are those of docs/cli.rst."""
    envelope = record.envelope
    route = envelope.route
    return {
        **entry_json(record.entry),
        "message_id": envelope.message_id,
        "mailbox": route.mailbox,
        "relay": relay_name(route.host, route.port) if route.host else "",
        "sender": envelope.sender,
        "recipients": [
            outcome_json(recipient, record.outcomes.get(recipient))
            for recipient in envelope.recipients
        ],
        "size": record.size,
        "reason": record.reason,
    }


def entry_json(entry: Entry) -> dict[str, Any]:
    """Return what can be said of a mail that cannot be opened."""
    return {
        "id": entry.id,
        "lane": entry.lane,
        "state": str(entry.state),
        "queued_at": entry.staged_at or None,
        "due": entry.due or None,
        "attempts": entry.attempts,
    }


def outcome_json(recipient: str, outcome: Outcome | None) -> dict[str, Any]:
    """Return one recipient; one that was not tried yet is queued."""
    return {
        "address": recipient,
        "state": str(outcome.state) if outcome else "queued",
        "reply": outcome.reply if outcome else "",
        "at": (outcome.at or None) if outcome else None,
        "held": outcome is not None and outcome.held,
    }


def status_json(status: Status) -> dict[str, Any]:
    """Return the fate of a mail that is in the spool no more."""
    return {
        "message_id": status.message_id,
        "state": str(status.state),
        "recipients": [
            outcome_json(recipient, outcome) for recipient, outcome in status.recipients.items()
        ],
    }


def note_json(key: str, note: LaneNote) -> dict[str, Any]:
    """Return why a lane waits."""
    return {
        "lane": key,
        "route": note.route,
        "trouble": note.trouble,
        "reason": note.reason,
        "since": note.since,
        "until": note.until,
        "failures": note.failures,
    }
