"""What reaches a terminal or a program: text made harmless, tables, JSON.

Addresses, subjects and relays' replies are written by strangers.  They must not move the
cursor, set a title, turn the text round, or be read as markup.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import click

# Control characters (C0, DEL, C1), bidirectional marks, line separators, lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_UNSAFE_BUT_LINES = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))

#: Columns of a table that goes to a pipe: nothing is folded there.
_PIPE_WIDTH = 10_000


def clean(text: object) -> str:
    """Return a text in one line, with what a terminal might obey made visible."""
    return _UNSAFE.sub(_visible, str(text))


def clean_lines(text: str) -> str:
    """Return the same of a text of several lines: line feeds and tabs stay."""
    return _UNSAFE_BUT_LINES.sub(_visible, text.replace("\r\n", "\n"))


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


def age(seconds: float) -> str:
    """Return a span of time as people say it: 40s, 12m, 3h, 5d."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def moment(when: float) -> str:
    """Return a time (seconds since the epoch) in local time; "" for none."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)) if when else ""


def upcoming(when: float, now: float) -> str:
    """Return when something is due: ``now``, or in how long."""
    return f"in {age(when - now)}" if when > now else "now"


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


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
