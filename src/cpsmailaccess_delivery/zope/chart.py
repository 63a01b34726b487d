"""A chart of what was delivered, as numbers for an SVG.  Pure.

Told apart by pattern, not only by colour; and the same is said in words and in a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

#: What is stacked, from below; each has a pattern of its name in the template.
KINDS: Final = ("accepted", "deferred", "failed")

#: Which of them an event of the journal belongs to.
_KIND_OF: Final = {
    "accepted": "accepted",
    "deferred": "deferred",
    "refused": "failed",
    "unclear": "failed",
}

_WORDS: Final = {"failed": "refused or unclear"}

WIDTH: Final = 720  # of the drawing, in its own units, as the next
HEIGHT: Final = 160
_LEFT: Final = 44
_BOTTOM: Final = 24
_TOP: Final = 8
_LABELS: Final = 6


@dataclass(frozen=True)
class Bar:
    """A rectangle of the drawing, and what it stands for."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    label: str


@dataclass(frozen=True)
class Chart:
    """``bars``: to draw.  ``marks``: position and text below; ``top``: of the scale.

    ``words``: the same as a sentence.  ``rows``: label and numbers of the steps with any.
    """

    bars: tuple[Bar, ...]
    marks: tuple[tuple[float, str], ...]
    top: int
    words: str
    rows: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def base(self) -> int:
        """Where the bars stand."""
        return HEIGHT - _BOTTOM


def chart(
    series: Iterable[tuple[int, str, int]], steps: int, label: Callable[[int], str], unit: str
) -> Chart:
    """Return the chart of so many steps.

    `series`: see `IJournal.series`.  `label`: names a step.  `unit`: what a step is, in words.
    """
    columns = [Counter[str]() for _ in range(steps)]
    for index, kind, number in series:
        if kind in _KIND_OF and index >= 0:
            columns[min(index, steps - 1)][_KIND_OF[kind]] += number
    top = _round_up(max((column.total() for column in columns), default=0))
    step = (WIDTH - _LEFT) / steps
    bars: list[Bar] = []
    for index, column in enumerate(columns):
        y = float(HEIGHT - _BOTTOM)
        for kind in KINDS:
            if not column[kind]:
                continue
            height = column[kind] / top * (HEIGHT - _BOTTOM - _TOP)
            y -= height
            bars.append(
                Bar(
                    kind,
                    x=round(_LEFT + index * step + step * 0.1, 2),
                    y=round(y, 2),
                    width=round(step * 0.8, 2),
                    height=round(height, 2),
                    label=f"{label(index)}: {column[kind]} {_WORDS.get(kind, kind)}",
                )
            )
    every = max(1, steps // _LABELS)
    return Chart(
        bars=tuple(bars),
        marks=tuple(
            (round(_LEFT + index * step, 2), label(index)) for index in range(0, steps, every)
        ),
        top=top,
        words=_words(columns, label, unit),
        rows=tuple(
            (label(index), tuple(column[kind] for kind in KINDS))
            for index, column in enumerate(columns)
            if column.total()
        ),
    )


def _words(columns: list[Counter[str]], label: Callable[[int], str], unit: str) -> str:
    total = sum(columns, Counter[str]())
    if not total:
        return f"Nothing was sent since {label(0)}."
    busiest = max(range(len(columns)), key=lambda index: columns[index].total())
    numbers = ", ".join(f"{total[kind]} {_WORDS.get(kind, kind)}" for kind in KINDS)
    return (
        f"Since {label(0)}: {numbers}. Most in one {unit}: {columns[busiest].total()}, at"
        f" {label(busiest)}."
    )


def _round_up(number: int) -> int:
    """Return a number that looks well at the top of a scale: 1, 2, 3, 4, 5, 6, 8, 10, 20 ..."""
    scale = 1
    while True:
        for factor in (1, 2, 3, 4, 5, 6, 8):
            if number <= factor * scale:
                return factor * scale
        scale *= 10
