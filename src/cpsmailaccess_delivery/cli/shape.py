"""``cpsmail queue --by``: the shape of a queue, in the manner of Postfix's qshape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..interfaces import Entry, State
from ..shape import MINUTES, Row, shape_of
from ..wording import age
from .output import emit, say, table

if TYPE_CHECKING:
    from ..outbox import Outbox


def show_shape(
    outbox: Outbox, by: str, mails: Iterable[tuple[Entry, Entry]], *, limit: int, as_json: bool,
    now: float,
) -> None:  # fmt: skip
    """Print a queue by lane, age or reason: see `shape.shape_of`.

    `mails`: entries, and how they are seen.  `limit`: of rows; 0: all.
    """
    notes = outbox.spool.lane_notes()
    total, ordered = shape_of(outbox.queue, by, mails, notes=notes, now=now)
    shown = ordered[: limit or None]
    if as_json:
        emit(
            {
                "outbox": outbox.location,
                "by": by,
                "minutes": list(MINUTES),
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


def _print_ages(rows: list[Row], by: str, now: float) -> None:
    columns = [f"{minutes}m" for minutes in MINUTES]
    table(
        ("MAILBOX", "TOTAL", *columns, f"{columns[-1]}+"),
        ((row.name, row.total, *row.ages) for row in rows),
    )


def _print_rows(rows: list[Row], by: str, now: float) -> None:
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


def _json(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "lane": row.lane,
        "total": row.total,
        "states": {str(state): number for state, number in sorted(row.states.items())},
        "ages": row.ages,
        "oldest": row.oldest or None,
        "oldest_due": row.oldest_due or None,
    }
