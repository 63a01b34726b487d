"""``cpsmail queue --by``: the shape of a queue, in the manner of Postfix's qshape."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..errors import InvalidEnvelope, NoSuchEntry
from ..interfaces import Entry, State
from ..queue import is_due, record_as_seen
from .mails import why
from .output import age, emit, say, table

if TYPE_CHECKING:
    from ..outbox import Outbox

#: What rows may stand for.
BY: Final = ("lane", "age", "reason")

#: Upper bounds of the columns of ages, in minutes; the last column has what is older.
_MINUTES: Final = (5, 10, 20, 40, 80, 160, 320, 640, 1280)

_NO_REASON: Final = "waits for its turn"
_SCHEDULED: Final = "scheduled"
_UNREADABLE: Final = "its private block cannot be read"


@dataclass(slots=True)
class _Row:
    name: str
    lane: str = ""
    total: int = 0
    states: Counter[State] = field(default_factory=Counter)
    ages: list[int] = field(default_factory=lambda: [0] * (len(_MINUTES) + 1))
    oldest: float = 0.0  # seconds since the epoch, as the next
    oldest_due: float = 0.0

    def add(self, seen: Entry, now: float) -> None:
        queued = min(seen.staged_at or now, now)
        self.total += 1
        self.states[seen.state] += 1
        self.ages[bisect_left(_MINUTES, (now - queued) / 60)] += 1
        self.oldest = min(self.oldest or queued, queued)
        if is_due(seen, now):
            self.oldest_due = min(self.oldest_due or queued, queued)


def show_shape(
    outbox: Outbox, by: str, mails: Iterable[tuple[Entry, Entry]], *, limit: int, as_json: bool,
    now: float,
) -> None:  # fmt: skip
    """Print a queue by lane, age or reason.

    `mails`: entries, and how they are seen.  `limit`: of rows; 0: all.
    By lane and age one mail of each lane is opened, by reason all are.
    """
    name_of = _reasons(outbox, now) if by == "reason" else _lanes(outbox)
    rows: dict[str, _Row] = {}
    total = _Row("TOTAL")
    for entry, seen in mails:
        try:
            name = name_of(entry, seen)
        except NoSuchEntry:
            continue  # delivered while we looked
        row = rows.get(name)
        if row is None:
            row = rows[name] = _Row(name, entry.lane if by != "reason" else "")
        row.add(seen, now)
        total.add(seen, now)
    ordered = sorted(rows.values(), key=lambda row: (-row.total, row.name))
    shown = ordered[: limit or None]
    if as_json:
        emit(
            {
                "outbox": outbox.location,
                "by": by,
                "minutes": list(_MINUTES),
                "total": _json(total),
                "rows": [_json(row) for row in shown],
                "more": len(ordered) - len(shown),
            }
        )
        return
    if total.total:
        (_print_ages if by == "age" else _print_rows)([total, *shown], by, now)
    else:
        say("no mails")
    if len(ordered) > len(shown):
        say(f"... and {len(ordered) - len(shown)} more: --limit 0 shows all")


def _print_ages(rows: list[_Row], by: str, now: float) -> None:
    columns = [f"{minutes}m" for minutes in _MINUTES]
    table(
        ("MAILBOX", "TOTAL", *columns, f"{columns[-1]}+"),
        ((row.name, row.total, *row.ages) for row in rows),
    )


def _print_rows(rows: list[_Row], by: str, now: float) -> None:
    states = [state for state in State if rows[0].states[state]]
    table(
        (
            "REASON" if by == "reason" else "MAILBOX",
            *("TOTAL", *(state.upper() for state in states), "OLDEST", "OLDEST DUE"),
        ),
        (
            (
                row.name,
                row.total,
                *(row.states[state] or "" for state in states),
                age(now - row.oldest),
                age(now - row.oldest_due) if row.oldest_due else "",
            )
            for row in rows
        ),
    )


def _lanes(outbox: Outbox) -> Callable[[Entry, Entry], str]:
    """Return what names the lane of a mail; opens the first of each."""
    names: dict[str, str] = {}

    def name_of(entry: Entry, seen: Entry) -> str:
        name = names.get(entry.lane) if entry.lane else None
        if name is None:
            try:
                (record,) = outbox.queue.find(entry)
            except InvalidEnvelope:
                return _UNREADABLE
            name = str(record.envelope.route)
            names[entry.lane] = name
        return name

    return name_of


def _reasons(outbox: Outbox, now: float) -> Callable[[Entry, Entry], str]:
    """Return what says why a mail waits; opens each."""
    notes = outbox.spool.lane_notes()

    def name_of(entry: Entry, seen: Entry) -> str:
        try:
            (record,) = outbox.queue.find(entry)
        except InvalidEnvelope:
            return _UNREADABLE
        reason = why(record_as_seen(record, notes.get(entry.lane)))
        return reason or (_SCHEDULED if seen.due > now else _NO_REASON)

    return name_of


def _json(row: _Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "lane": row.lane,
        "total": row.total,
        "states": {str(state): number for state, number in sorted(row.states.items())},
        "ages": row.ages,
        "oldest": row.oldest or None,
        "oldest_due": row.oldest_due or None,
    }
