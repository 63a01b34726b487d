"""``make bench``, or ``python -m benchmarks``: see docs/performance.rst."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from . import postfix
from .report import faults, table, write
from .rows import ALL, ROWS, Bench, Row

_KEYS = [row.key for row in ROWS]


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--scale",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the mails of each row.",
)
@click.option("--only", multiple=True, metavar="NAME", help="A contender; may be repeated.")
@click.option(
    "--limit",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds after which a turn is broken off, and extrapolated.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default="/var/tmp",
    show_default=True,
    help="On the file system to be measured.",
)
@click.option("--output", type=click.Path(path_type=Path), default="var/bench", show_default=True)
@click.argument("rows", nargs=-1, metavar=f"[{'|'.join(_KEYS)}]...")
def main(
    rounds: int,
    scale: float,
    only: tuple[str, ...],
    limit: float,
    directory: Path,
    output: Path,
    rows: tuple[str, ...],
) -> None:
    """Measure this project, zope.sendmail and Postfix in turns."""
    for name in rows:
        if name not in _KEYS:
            raise click.BadParameter(f"{name}: is none of {', '.join(_KEYS)}")
    for name in only:
        if name not in ALL:
            raise click.BadParameter(f"{name}: is none of {', '.join(ALL)}")
    console = Console()
    left_out = set(ALL).difference(only) if only else set()
    if "Postfix" not in left_out and (reason := postfix.available()):
        console.print(f"[yellow]without Postfix: {reason}")
        left_out.add("Postfix")
    output.mkdir(parents=True, exist_ok=True)
    Path(directory).mkdir(parents=True, exist_ok=True)
    base = Path(tempfile.mkdtemp(prefix="cpsmail-bench-", dir=directory))
    base.chmod(0o755)
    # A hint to ext4: directories in here are spread over the disk.
    subprocess.run(["chattr", "+T", base], capture_output=True, check=False)
    bench = Bench(base, scale=scale, limit=limit)
    results: dict[str, dict[str, list[Any]]] = {}
    wanted = [row for row in ROWS if not rows or row.key in rows]
    settings = {"rounds": rounds, "scale": scale, "limit": limit}
    try:
        for row in wanted:
            results[row.key] = _measure(bench, row, rounds, left_out, console)
            write(results, output, settings)
        Console(width=max(console.width, 140)).print(table(results))
        console.print(f"{output}/results.json, table.txt, chart.png")
    finally:
        shutil.rmtree(base, ignore_errors=True)  # at the end: see docs/performance.rst
    if any(faults(turns) for turns in _own(results)):
        sys.exit(1)


def _measure(
    bench: Bench, row: Row, rounds: int, left_out: set[str], console: Console
) -> dict[str, list[Any]]:
    contenders = [who for who in row.contenders if who not in left_out]
    turns: dict[str, list[Any]] = {who: [] for who in contenders}
    for number in range(1 if row.once else rounds):
        shift = number % max(len(contenders), 1)
        for who in contenders[shift:] + contenders[:shift]:
            begun = time.monotonic()
            try:
                result = row.turn(bench, who)
            except (RuntimeError, subprocess.CalledProcessError) as error:
                console.print(f"[red]{row.key}: {who}: {error}")
                result = {"value": math.nan, "failed": 1}
            turns[who].append(result)
            console.print(
                f"{row.key:10} {number + 1} {who:15} {result['value']:12,.3f} {row.unit:10}"
                f" {faults([result])} [dim]({time.monotonic() - begun:.0f} s)",
                highlight=False,
            )
    return turns


def _own(results: dict[str, dict[str, list[Any]]]) -> list[Any]:
    return [turns for row in results.values() for who, turns in row.items() if "ours" in who]


if __name__ == "__main__":
    main()
