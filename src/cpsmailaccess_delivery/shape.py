"""The shape of a queue: how much waits where, since when, and why; as Postfix's qshape."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from .errors import InvalidEnvelope, NoSuchEntry
from .interfaces import Entry, LaneNote, State
from .queue import Queue, is_due, record_as_seen, why
from .status import SCHEDULED

#: What rows may stand for.
BY: Final = ("lane", "age", "reason")

#: Upper bounds of the columns of ages, in minutes; the last column has what is older.
MINUTES: Final = (5, 10, 20, 40, 80, 160, 320, 640, 1280)

#: Of a mail whose private block does not follow the rules.
UNREADABLE: Final = "its private block cannot be read"

_NO_REASON: Final = "waits for its turn"


@dataclass(slots=True)
class Row:
    """The mails of one lane, or with one reason.

    ``lane``: its key; "" where rows are reasons.  ``ages``: how many by age, see `MINUTES`.
    ``oldest``, ``oldest_due``: seconds since the epoch; 0: none.
    """

    name: str
    lane: str = ""
    total: int = 0
    states: Counter[State] = field(default_factory=Counter)
    ages: list[int] = field(default_factory=lambda: [0] * (len(MINUTES) + 1))
    oldest: float = 0.0
    oldest_due: float = 0.0

    def add(self, seen: Entry, now: float) -> None:
        """Count a mail, given as it is seen."""
        queued = min(seen.staged_at or now, now)
        self.total += 1
        self.states[seen.state] += 1
        self.ages[bisect_left(MINUTES, (now - queued) / 60)] += 1
        self.oldest = min(self.oldest or queued, queued)
        if is_due(seen, now):
            self.oldest_due = min(self.oldest_due or queued, queued)


def shape_of(
    queue: Queue,
    by: str,
    mails: Iterable[tuple[Entry, Entry]],
    *,
    notes: Mapping[str, LaneNote],
    now: float,
) -> tuple[Row, list[Row]]:
    """Return the total, and a row for each lane (`by` lane or age) or reason, fullest first.

    `mails`: entries, and how they are seen.  `notes`: why lanes wait.
    By lane and age one mail of each lane is opened, by reason all are.
    """
    name_of = _reasons(queue, notes, now) if by == "reason" else lane_names(queue)
    rows: dict[str, Row] = {}
    total = Row("TOTAL")
    for entry, seen in mails:
        try:
            name = name_of(entry, seen)
        except NoSuchEntry:
            continue  # delivered while we looked
        row = rows.get(name)
        if row is None:
            row = rows[name] = Row(name, entry.lane if by != "reason" else "")
        row.add(seen, now)
        total.add(seen, now)
    return total, sorted(rows.values(), key=lambda row: (-row.total, row.name))


def lane_names(queue: Queue) -> Callable[[Entry, Entry], str]:
    """Return what names the lane of a mail; opens the first of each."""
    names: dict[str, str] = {}

    def name_of(entry: Entry, seen: Entry) -> str:
        name = names.get(entry.lane) if entry.lane else None
        if name is None:
            try:
                (record,) = queue.find(entry)
            except InvalidEnvelope:
                return UNREADABLE
            name = str(record.envelope.route)
            names[entry.lane] = name
        return name

    return name_of


def _reasons(
    queue: Queue, notes: Mapping[str, LaneNote], now: float
) -> Callable[[Entry, Entry], str]:
    """Return what says why a mail waits; opens each."""

    def name_of(entry: Entry, seen: Entry) -> str:
        try:
            (record,) = queue.find(entry)
        except InvalidEnvelope:
            return UNREADABLE
        reason = why(record_as_seen(record, notes.get(entry.lane)))
        return reason or (SCHEDULED if seen.due > now else _NO_REASON)

    return name_of
