"""``cpsmail stats``: what was done in the last hours, and what waits now."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import click

from ..interfaces import State
from ..wording import age, moment
from .app import App, json_option, pass_app
from .output import emit, say, table

#: What the journal counts, in the order of the table.
_KINDS: Final = (
    "accepted",
    "deferred",
    "refused",
    "unclear",
    "cancelled",
    "paused",
    "resumed",
)

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"(\d{1,9})([smhdw])\Z", re.ASCII)


class _SpanType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    name = "span"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = _SPAN.match(value)
        if match is None or not int(match[1]):
            self.fail(f"{value!r}: is a number and s, m, h, d or w: 30m, 24h, 7d", param, ctx)
        return float(int(match[1]) * _UNITS[match[2]])


@click.command()
@click.option(
    "--last",
    type=_SpanType(),
    default="24h",
    show_default=True,
    metavar="SPAN",
    help="Count what happened in so long until now: 30m, 24h, 7d.",
)
@click.option(
    "--by",
    type=click.Choice(["mailbox", "relay"]),
    default="mailbox",
    show_default=True,
    help="A row for each.",
)
@json_option
@pass_app
def stats(app: App, last: float, by: str, as_json: bool) -> None:
    """Count what the journal knows of the last hours, and say what waits now.

    Each attempt counts once for each recipient.
    """
    with app.outbox() as outbox:
        now = outbox.clock()
        totals = outbox.journal.totals(now - last, by=by)
        counts = outbox.queue.counts()
        notes = outbox.spool.lane_notes()
    rows = _rows(totals)
    total = sum(rows.values(), Counter[str]())
    if as_json:
        emit(
            {
                "since": now - last,
                "by": by,
                "total": _json(total),
                "rows": [{by: name, **_json(row)} for name, row in rows.items()],
                "waiting": {str(state): n for state, n in sorted(counts.states.items())},
                "oldest_due": counts.oldest or None,
                "lanes_in_trouble": len(notes),
            }
        )
        return
    kinds = [kind for kind in _KINDS if total[kind]]
    say(f"since {moment(now - last)}:{'' if kinds else ' nothing'}")
    if kinds:
        lines = [*rows.items(), ("TOTAL", total)]
        table(
            (by.upper(), *(kind.upper() for kind in kinds)),
            ((name or "-", *(row[kind] or "" for kind in kinds)) for name, row in lines),
        )
    waiting = ", ".join(f"{counts.states[s]} {s}" for s in State if counts.states.get(s))
    oldest = f"; oldest due: {age(now - counts.oldest)}" if counts.oldest else ""
    trouble = f"; lanes in trouble: {len(notes)}" if notes else ""
    say(f"now: {waiting or 'no mails'}{oldest}{trouble}")


def _rows(totals: Iterable[tuple[str, str, int]]) -> dict[str, Counter[str]]:
    """Return counts by kind for each name, the busiest first."""
    rows: dict[str, Counter[str]] = {}
    for name, kind, number in totals:
        if kind in _KINDS:
            rows.setdefault(name, Counter())[kind] += number
    return dict(sorted(rows.items(), key=lambda item: (-item[1].total(), item[0])))


def _json(row: Counter[str]) -> dict[str, int]:
    return {kind: row[kind] for kind in _KINDS}
