"""Results as a table, a chart, and a file for programs."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from .rows import ALL, ROWS, Row

#: Turns by row and contender.
Results = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]

FAULTS = ("missing", "duplicate", "misrouted", "leaked", "damaged", "failed")
_COLOURS = {"ours": "#1b7837", "zope.sendmail": "#9970ab", "Postfix": "#4393c3"}


def middle(turns: Sequence[Mapping[str, Any]], value: str) -> float:
    """Return the median of a value; NaN: nobody measured it."""
    values = [turn[value] for turn in turns if turn.get(value) is not None]
    values = [number for number in values if not math.isnan(number)]
    return median(values) if values else math.nan


def verdicts(row: Row, turns: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return each target with what was measured."""
    found = []
    for target in row.targets:
        figure = target.measure(lambda who, value: middle(turns.get(who, ()), value))
        found.append(
            {
                "target": f"{'>=' if target.at_least else '<='} {target.limit:g} {target.text}",
                "measured": figure,
                "met": None if math.isnan(figure) else target.met(figure),
            }
        )
    return found


def faults(turns: Sequence[Mapping[str, Any]]) -> str:
    """Return what was wrong with mails, over all turns; "": nothing."""
    sums = {fault: sum(turn.get(fault, 0) for turn in turns) for fault in FAULTS}
    return ", ".join(f"{count} {fault}" for fault, count in sums.items() if count)


def table(results: Results) -> Table:
    shown = Table(title=f"Medians; {facts_line()}")
    shown.add_column("row", max_width=36)
    shown.add_column("unit")
    for who in ALL:
        shown.add_column(who, justify="right")
    shown.add_column("measured / target")
    shown.add_column("faults", max_width=30)
    for row in ROWS:
        turns = results.get(row.key)
        if not turns:
            continue
        lines = []
        for verdict in verdicts(row, turns):
            colour = {True: "green", False: "red", None: "dim"}[verdict["met"]]
            figure = "-" if verdict["met"] is None else f"{verdict['measured']:.3g}"
            lines.append(f"[{colour}]{figure}[/] ({verdict['target']})")
        wrong = [f"{who}: {text}" for who, of in turns.items() if (text := faults(of))]
        shown.add_row(
            row.title,
            row.unit,
            *(_cell(turns.get(who, ()), row) for who in ALL),
            "\n".join(lines),
            "\n".join(wrong) or "none",
        )
    return shown


def _cell(turns: Sequence[Mapping[str, Any]], row: Row) -> str:
    value = middle(turns, row.value)
    if math.isnan(value):
        return ""
    text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    if any(turn.get("capped") for turn in turns):
        text = "~" + text
    lines = [text]
    for name, form in (("p99", "({:.3g})"), ("cpu_us", "{:.0f} us CPU")):
        extra = middle(turns, name)
        if not math.isnan(extra):
            lines.append(form.format(extra))
    return "\n".join(lines)


def facts() -> dict[str, Any]:
    """Return what is to be known of this machine and of what was measured."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M %z"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {
            "cpsmailaccess_delivery": version("cpsmailaccess_delivery"),
            "zope.sendmail": version("zope.sendmail"),
            "postfix": _postfix_version(),
        },
        "load": os.getloadavg(),
    }


def facts_line() -> str:
    known = facts()
    return (
        f"{known['date']}, {known['cpu']}, {known['cores']} cores, Linux {known['kernel']},"
        f" Python {known['python']}, zope.sendmail {known['versions']['zope.sendmail']},"
        f" Postfix {known['versions']['postfix'] or '-'}"
    )


def _postfix_version() -> str:
    try:
        return subprocess.run(
            ["/usr/sbin/postconf", "-d", "-h", "mail_version"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write(results: Results, directory: Path, settings: Mapping[str, Any]) -> None:
    """Write ``results.json``, ``table.txt`` and ``chart.png``."""
    summary = {row.key: verdicts(row, results[row.key]) for row in ROWS if results.get(row.key)}
    raw = {"machine": facts(), "settings": settings, "targets": summary, "turns": results}
    (directory / "results.json").write_text(json.dumps(raw, indent=1, default=str) + "\n")
    with (directory / "table.txt").open("w") as file:
        Console(file=file, width=150).print(table(results))
    try:
        chart(results, directory / "chart.png")
    except ImportError:
        pass  # matplotlib is of the extra `bench`


def chart(results: Results, path: Path) -> None:
    """Draw a panel per row that has more than one contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in ROWS if len(results.get(row.key, ())) > 1]
    if not rows:
        return
    columns = min(3, len(rows))
    height = math.ceil(len(rows) / columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(4.6 * columns, 2.5 * height), squeeze=False
    )
    for axis in axes.flat[len(rows) :]:
        axis.axis("off")
    for row, axis in zip(rows, axes.flat, strict=False):
        turns = results[row.key]
        names = list(turns)
        values = [middle(turns[who], row.value) for who in names]
        bars = axis.barh(names, values, color=[_COLOURS.get(who, "#7fbf7b") for who in names])
        capped = [any(turn.get("capped") for turn in turns[who]) for who in names]
        labels = [
            ("~" if over else "") + (f"{value:,.0f}" if value >= 100 else f"{value:.2g}")
            for value, over in zip(values, capped, strict=True)
        ]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.set_xlim(right=max(values) * 1.25)
        axis.invert_yaxis()
        axis.set_title(row.title, fontsize=8)
        better = "more" if row.more_is_better else "less"
        axis.set_xlabel(f"{row.unit}, {better} is better", fontsize=7)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
