"""What reaches a terminal or a program: text made harmless (`wording`), tables, JSON.

Nothing is read as markup.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from ..wording import clean, clean_lines

#: Columns of a table that goes to a pipe: nothing is folded there.
_PIPE_WIDTH = 10_000


def say(text: object = "") -> None:
    """Print one line on standard output."""
    click.echo(clean(text))


def complain(text: object) -> None:
    """Print one line on standard error."""
    click.echo(f"cpsmail: {clean(text)}", err=True)


def emit(data: Any) -> None:
    """Print JSON.  ASCII only: no stranger's text reaches a terminal by this way either."""
    click.echo(json.dumps(data, indent=2))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; in a pipe each row is one line, on a terminal all but the first
    column fold: that one is to be copied."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    is_terminal = sys.stdout.isatty()
    console = Console(
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=not is_terminal,
        width=None if is_terminal else _PIPE_WIDTH,
    )
    grid = Table(box=None, pad_edge=False, header_style="bold" if is_terminal else "")
    for column in columns:
        grid.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        grid.add_row(*(Text(clean(cell)) for cell in row))
    console.print(grid)


def log_to_stderr(level: int, *, with_time: bool) -> None:
    """Send the log to standard error, made harmless."""
    handler = logging.StreamHandler()
    style = "%(asctime)s %(levelname)s %(message)s" if with_time else "cpsmail: %(message)s"
    handler.setFormatter(_CleanFormatter(style))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


class _CleanFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = clean(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return clean_lines(super().formatException(ei))
