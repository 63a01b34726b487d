"""What the tab *Queue* shows: one look at the names in the spool, and few mails opened."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import InvalidEnvelope, NoSuchEntry
from ..interfaces import Entry, LaneNote, Record, State
from ..journal import Event
from ..queue import Queue, entry_as_seen, is_due, record_as_seen, why
from ..search import Found, search
from ..selection import lane_of, selector
from ..shape import BY, MINUTES, UNREADABLE, Row, shape_of
from ..wording import age, clean, moment, upcoming
from .paging import Page

#: What a mail in the spool can be, in the order in which it is shown.
STATES: Final = (State.QUEUED, State.DEFERRED, State.HELD, State.UNCLEAR, State.REFUSED)

#: Ages to choose from, in minutes.
AGES: Final = {
    "": "any age",
    "5": "older than 5 minutes",
    "60": "older than an hour",
    "1440": "older than a day",
    "7200": "older than 5 days",
}

#: Columns of the ages of a lane.
AGE_COLUMNS: Final = (*(f"{minutes}m" for minutes in MINUTES), f"{MINUTES[-1]}m+")

#: Mails that are opened to see why they wait, and to look for an address.
MOST_OPENED: Final = 2000

#: Events of the journal that a search looks at, and lanes that are shown at once.
_MOST_EVENTS: Final = 1000
_MOST_LANES: Final = 50

#: Recipients that are named in a row of a list.
_NAMED: Final = 3

_TROUBLES: Final = {
    "account": "the account must be mended",
    "login": "the relay refuses the login",
    "relay": "the relay cannot be reached, or not now",
}


@dataclass(frozen=True)
class Selection:
    """What was chosen of the queue, as it was typed.  ``older``: minutes, one of `AGES`."""

    state: str = ""
    lane: str = ""
    older: str = ""
    search: str = ""
    by: str = ""

    @classmethod
    def typed(cls, texts: Mapping[str, str]) -> Selection:
        """Return what a browser has sent, less what cannot be."""
        return cls(
            state=texts["state"] if texts["state"] in STATES else "",
            lane=texts["lane"],
            older=texts["older"] if texts["older"] in AGES else "",
            search=texts["search"],
            by=texts["by"] if texts["by"] in BY else "",
        )

    @property
    def query(self) -> dict[str, str]:
        """What a link keeps of it."""
        return {name: value for name, value in vars(self).items() if value}

    def but(self, **changes: object) -> dict[str, str]:
        """Return the query of the same selection with other texts for some of its fields."""
        return {name: str(value) for name, value in {**vars(self), **changes}.items() if value}

    def wanted(
        self, queue: Queue, now: float, usual: Collection[str] = ()
    ) -> Callable[[Entry, Entry], bool]:
        """Return what tells whether a mail was chosen, given its entry and how it is seen.

        `usual`: the states that are meant when none was chosen; none: all.
        """
        states = (self.state,) if self.state else usual
        fits = selector(queue, states, lane_of(self.lane) if self.lane else None)
        before = now - 60 * int(self.older or 0)

        def wanted(entry: Entry, seen: Entry) -> bool:
            return (entry.staged_at or now) <= before and fits(entry, seen)

        return wanted


def select(
    outbox: Any, selection: Selection, usual: Collection[str], now: float
) -> Iterator[Entry]:
    """Yield the entries of all mails that were chosen; see `Selection.wanted`."""
    notes = outbox.spool.lane_notes()
    wanted = selection.wanted(outbox.queue, now, usual)
    for entry in outbox.queue.entries():
        if wanted(entry, entry_as_seen(entry, notes.get(entry.lane))):
            yield entry


class Look:
    """One look at the queue.  `now`: seconds since the epoch.

    ``page``: rows of mails, or None; ``rows`` and ``total``: of a grouping, or None; ``found``:
    of a search, or None; ``counts``: mails by state, over all; ``oldest_due``: for how
    long the oldest mail that is due has been, in words.
    """

    def __init__(self, outbox: Any, selection: Selection, start: str, now: float) -> None:
        self._outbox = outbox
        self._now = now
        self._notes: dict[str, LaneNote] = outbox.spool.lane_notes()
        self.selection = selection
        self.counts: Counter[State] = Counter()
        self._waiting: Counter[str] = Counter()  # by lanes in trouble
        self._oldest = 0.0
        self.page: Page | None = None
        self.rows: list[dict[str, Any]] | None = None
        self.total: dict[str, Any] | None = None
        self.more = 0
        self.found: Found | None = None
        selected = self._selected()
        if selection.search:
            self._search(start)
            for _ in selected:
                pass  # the counts
        elif selection.by:
            self._group(selected)
        else:
            page = Page.of(selected, start)
            mails = [self._mail(*pair) for pair in page.items]
            self.page = Page([mail for mail in mails if mail], page.start, page.total)
        self.oldest_due = age(now - self._oldest) if self._oldest else ""

    @property
    def all(self) -> int:
        """Mails in the queue."""
        return self.counts.total()

    @property
    def lanes(self) -> list[dict[str, Any]]:
        """The lanes that are in trouble, those first for which most mails wait."""
        order = sorted(self._notes, key=lambda key: (-self._waiting[key], self._notes[key].since))
        return [self._lane(key, self._notes[key]) for key in order[:_MOST_LANES]]

    @property
    def more_lanes(self) -> int:
        """How many lanes in trouble are not shown."""
        return max(0, len(self._notes) - _MOST_LANES)

    def _lane(self, key: str, note: LaneNote) -> dict[str, Any]:
        return {
            "key": key,
            "route": clean(note.route),
            "mailbox": "@" in note.route or note.route == "*",
            "paused": note.paused,
            "trouble": _TROUBLES.get(note.trouble, clean(note.trouble)),
            "reason": clean(note.reason),
            "since": age(self._now - note.since),
            "since_when": moment(note.since),
            "next": upcoming(note.until, self._now),
            "next_when": moment(note.until),
            "waiting": self._waiting[key],
        }

    def _selected(self) -> Iterator[tuple[Entry, Entry]]:
        """Yield what was chosen; count everything on the way."""
        wanted = self.selection.wanted(self._outbox.queue, self._now)
        for entry in self._outbox.queue.entries():
            seen = entry_as_seen(entry, self._notes.get(entry.lane))
            self.counts[seen.state] += 1
            if entry.lane in self._notes:
                self._waiting[entry.lane] += 1
            if is_due(seen, self._now):
                since = entry.staged_at or self._now
                self._oldest = min(self._oldest or since, since)
            if wanted(entry, seen):
                yield entry, seen

    def _group(self, selected: Iterator[tuple[Entry, Entry]]) -> None:
        by = self.selection.by
        looked_at = itertools.islice(selected, MOST_OPENED) if by == "reason" else selected
        total, rows = shape_of(self._outbox.queue, by, looked_at, notes=self._notes, now=self._now)
        self.more = sum(1 for _ in selected)
        self.total = self._row(total)
        self.rows = [self._row(row) for row in rows]

    def _row(self, row: Row) -> dict[str, Any]:
        return {
            "name": clean(row.name),
            "lane": row.name if row.lane else "",
            "total": row.total,
            "states": [row.states[state] or "" for state in STATES],
            "ages": [number or "" for number in row.ages],
            "oldest": age(self._now - row.oldest) if row.oldest else "",
            "oldest_due": age(self._now - row.oldest_due) if row.oldest_due else "",
        }

    def _mail(self, entry: Entry, seen: Entry) -> dict[str, Any] | None:
        """Return the row of a mail; None: it has left meanwhile."""
        try:
            (record,) = self._outbox.queue.find(entry)
        except NoSuchEntry:
            return None
        except InvalidEnvelope:
            return {**self._entry(seen), "message_id": "", "why": UNREADABLE, "readable": False}
        return self._record(record)

    def _record(self, record: Record) -> dict[str, Any]:
        record = record_as_seen(record, self._notes.get(record.entry.lane))
        envelope = record.envelope
        return {
            **self._entry(record.entry),
            "message_id": envelope.message_id,
            "mailbox": clean(envelope.route),
            "sender": clean(envelope.sender or "<>"),
            "recipients": _some(envelope.recipients),
            "why": clean(why(record)),
            "readable": True,
        }

    def _entry(self, seen: Entry) -> dict[str, Any]:
        waits = seen.due or seen.state in (State.QUEUED, State.DEFERRED)
        return {
            "id": seen.id,
            "state": str(seen.state),
            "mailbox": "",
            "sender": "",
            "recipients": "",
            "age": age(self._now - seen.staged_at) if seen.staged_at else "",
            "queued": moment(seen.staged_at),
            "attempts": seen.attempts,
            "due": upcoming(seen.due, self._now) if waits else "",
            "due_when": moment(seen.due) if waits else "",
        }

    def _search(self, start: str) -> None:
        outbox, words = self._outbox, self.selection.search
        self.found = search(
            outbox.queue, outbox.journal, words, limit=_MOST_EVENTS, most=MOST_OPENED
        )
        here = {record.entry.id: self._record(record) for record in self.found.records}
        gone: dict[str, list[Event]] = {}
        for event in self.found.events:
            # What was sent at once was never an entry.
            name = event.entry or f"{event.at:.0f} {event.message_id}".strip()
            if event.entry not in here and (event.entry or event.message_id):
                gone.setdefault(name, []).append(event)
        rows = {**here, **{name: self._gone(events) for name, events in gone.items()}}
        self.page = Page.of([rows[name] for name in sorted(rows, reverse=True)], start)

    def _gone(self, events: list[Event]) -> dict[str, Any]:
        """Return the row of a mail that is in the journal only."""
        last = {event.recipient: event for event in events}
        states = sorted({str(event.kind) for event in last.values()})
        begin = Entry(events[0].entry, "").staged_at or events[0].at
        return {
            **self._entry(Entry(events[0].entry, "", due=0.0)),
            "age": age(self._now - begin),
            "queued": moment(begin),
            "message_id": events[-1].message_id,
            "state": ", ".join(states),
            "mailbox": clean(events[-1].mailbox),
            "sender": clean(events[-1].sender or "<>"),
            "recipients": _some(list(last)),
            "why": clean(events[-1].reply),
            "attempts": max(event.attempt for event in events) or "",
            "due": "",
            "due_when": "",
            "readable": False,
            "gone": True,
        }


def _some(addresses: Any) -> str:
    more = f" and {len(addresses) - _NAMED} more" if len(addresses) > _NAMED else ""
    return clean(", ".join(addresses[:_NAMED])) + more
