"""The tab *Queue*: what waits and why, and one mail's whole story."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from AccessControl import getSecurityManager
from AccessControl.class_init import InitializeClass
from AccessControl.SecurityInfo import ClassSecurityInfo

from ..errors import InvalidEnvelope, NoSuchEntry
from ..interfaces import Outcome, Record, State
from ..journal import Event
from ..queue import record_as_seen
from ..search import search
from ..wording import clean, moment, upcoming
from .choosing import selection_of
from .header import header_of
from .page import page, redirect, render, template, text
from .queue_view import AGE_COLUMNS, AGES, MOST_OPENED, STATES, Look
from .security import MANAGE_ACCOUNTS, MANAGE_QUEUE
from .steering import possible

_QUEUE: Final = template("queue")
_MAIL: Final = template("mail")

#: Events of one mail that are shown.
_MOST_EVENTS: Final = 500

#: Recipients of one mail that are shown.
_MOST_RECIPIENTS: Final = 500


class QueueTab:
    """Mixin of `mail_accounts.MailAccounts`."""

    security = ClassSecurityInfo()

    manage_options: ClassVar[tuple[dict[str, str], ...]] = (
        {"label": "Queue", "action": "manage_queue"},
    )

    @security.protected(MANAGE_QUEUE)
    @page
    def manage_queue(self: Any, REQUEST: Any) -> str:
        """Show what waits, a page at a time, and which accounts are paused."""
        outbox = self._outbox()
        look = Look(outbox, selection_of(REQUEST), text(REQUEST, "start"), outbox.clock())
        return render(
            _QUEUE,
            self,
            REQUEST,
            look=look,
            page=look.page,
            states=STATES,
            ages=AGES,
            age_columns=AGE_COLUMNS,
            most_opened=MOST_OPENED,
            sees_accounts=bool(getSecurityManager().checkPermission(MANAGE_ACCOUNTS, self)),
            message_type="warning" if text(REQUEST, "failed") else "success",
        )

    @security.protected(MANAGE_QUEUE)
    @page
    def manage_mail(self: Any, REQUEST: Any) -> str:
        """Show one mail, by its id, or by its Message-Id when it has left the queue.

        Its header is shown, its body never is: whoever sees to the queue need not read it.
        """
        outbox = self._outbox()
        now = outbox.clock()
        name, message_id = text(REQUEST, "id"), text(REQUEST, "message_id")
        try:
            records, events, problem = _look_up(outbox, name, message_id)
        except NoSuchEntry:
            done = text(REQUEST, "manage_tabs_message")
            if not done:
                raise
            # What was done has made an end of it: that must be said nevertheless.
            return redirect(REQUEST, f"{self.absolute_url()}/manage_queue", done)
        note = outbox.spool.lane_note(records[0].entry.lane) if records else None
        record = record_as_seen(records[0], note) if records else None
        return render(
            _MAIL,
            self,
            REQUEST,
            tab="Queue",
            id=record.entry.id if record else name,
            message_id=record.envelope.message_id if record else message_id,
            mail=_mail(record, now) if record else None,
            note=clean(note.reason) if note else "",
            recipients=_recipients(record) if record else [],
            others=[each.entry.id for each in records[1:]],
            may=possible(records[0]) if records else frozenset(("cancel",) if problem else ()),
            events=[_event(event) for event in events],
            header=header_of(outbox.queue.message(records[0])) if records else [],
            problem=problem,
            message_type="warning" if text(REQUEST, "failed") else "success",
        )


InitializeClass(QueueTab)


def _look_up(outbox: Any, name: str, message_id: str) -> tuple[list[Record], list[Event], str]:
    """Return a mail, its story, and why it cannot be read.  Raises `NoSuchEntry`."""
    for wanted in filter(None, (name, message_id)):
        try:
            found = search(outbox.queue, outbox.journal, wanted, limit=_MOST_EVENTS, most=0)
        except InvalidEnvelope as error:
            return [], [], str(error)
        if found.records or found.events:
            events = found.events
            if name and not found.records:
                events = [event for event in events if event.entry == name] or events
            return found.records, events, ""
    raise NoSuchEntry(
        f"{name or message_id or 'no id'}: neither the queue nor the journal {outbox.journal.path}"
        " knows such a mail: it has left the queue, and the journal goes back no further"
    )


def _mail(record: Record, now: float) -> dict[str, Any]:
    entry, envelope = record.entry, record.envelope
    waits = entry.due or entry.state in (State.QUEUED, State.DEFERRED)
    return {
        "state": str(entry.state),
        "reason": clean(record.reason),
        "mailbox": clean(envelope.route),
        "sender": clean(envelope.sender or "<> (a notice)"),
        "queued": moment(entry.staged_at),
        "attempts": entry.attempts,
        "due": upcoming(entry.due, now) if waits else "",
        "due_when": moment(entry.due),
        "size": f"{record.size:,} bytes",
    }


def _recipients(record: Record) -> list[dict[str, Any]]:
    rows = []
    for recipient in record.envelope.recipients[:_MOST_RECIPIENTS]:
        outcome = record.outcomes.get(recipient, Outcome(State.QUEUED))
        rows.append(
            {
                "address": recipient,
                "shown": clean(recipient),
                "state": str(outcome.state),
                "unclear": outcome.state is State.UNCLEAR,
                "held": outcome.held,
                "reply": clean(outcome.reply),
                "when": moment(outcome.at),
            }
        )
    return rows


def _event(event: Event) -> dict[str, Any]:
    return {
        "when": moment(event.at),
        "kind": clean(event.kind),
        "recipient": clean(event.recipient),
        "attempt": event.attempt or "",
        "relay": clean(event.relay),
        "reply": clean(event.reply),
    }
