"""``cpsmail drain``: deliver what is due, once."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ..queue import is_due
from .app import EX_INTERRUPTED, EX_NO, App, json_option, pass_app
from .output import emit, say
from .run import StopSignal, stop_timeout_option

if TYPE_CHECKING:
    from ..outbox import Outbox
    from ..processor import QueueProcessorThread
    from ..summary import Summary

#: Seconds between two looks at how far it is.
_LOOK = 0.1

#: Seconds that mails past the end of data have after a signal: somebody sits and waits.
_STOP_TIMEOUT = 5.0

#: Seconds that dropping the connections takes at most.
_ABORTED = 5.0


@click.command()
@stop_timeout_option(_STOP_TIMEOUT)
@json_option
@pass_app
def drain(app: App, stop_timeout: float, as_json: bool) -> int:
    """Deliver once what is due, and say what became of it.

    A signal stops it as it does `run`.  Exit code 0: everything that was due was accepted;
    1: something was deferred, refused, unclear or held, or waits for a relay or an account
    in trouble.
    """
    with app.outbox() as outbox, StopSignal() as stop:
        begun = time.monotonic()
        with _progress(outbox, shown=not as_json and sys.stdout.isatty()) as show:
            summary = _deliver(outbox.processor(), stop, stop_timeout, show)
        seconds = time.monotonic() - begun
    left = summary.deferred + summary.refused + summary.unclear + summary.held
    clean = not left and not summary.reasons
    if as_json:
        emit({**asdict(summary), "seconds": round(seconds, 3), "interrupted": stop.is_set()})
    else:
        _print(summary, seconds)
    if stop.is_set():
        return EX_INTERRUPTED
    return 0 if clean else EX_NO


def _deliver(
    processor: QueueProcessorThread,
    stop: StopSignal,
    stop_timeout: float,
    show: Callable[[Summary], None],
) -> Summary:
    """Drain in a thread of its own, so that signals and the bar have this one."""
    failure: list[BaseException] = []

    def work() -> None:
        try:
            processor.run(forever=False)
        except BaseException as error:  # raised again below, in the main thread
            failure.append(error)

    thread = threading.Thread(target=work, name="cpsmail-drain", daemon=True)
    thread.start()
    deadline = None
    while thread.is_alive():
        thread.join(_LOOK)
        show(processor.summary)
        if not stop.is_set():
            continue
        processor.stop()  # each time: it may not have heard the first
        deadline = deadline or time.monotonic() + stop_timeout
        if time.monotonic() >= deadline:
            processor.abort()
            thread.join(_ABORTED)
            break
    if failure:
        raise failure[0]
    return processor.summary


@contextmanager
def _progress(outbox: Outbox, *, shown: bool) -> Iterator[Callable[[Summary], None]]:
    if not shown:
        yield lambda summary: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    now = outbox.clock()
    total = sum(is_due(entry, now) for entry in outbox.queue.entries())
    columns = (TextColumn("delivering"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=total)

        def show(summary: Summary) -> None:
            done = _done(summary)
            progress.update(task, completed=done, total=max(total, done))

        yield show


def _done(summary: Summary) -> int:
    return summary.accepted + summary.deferred + summary.refused + summary.unclear + summary.held


def _print(summary: Summary, seconds: float) -> None:
    names = ("accepted", "deferred", "refused", "unclear", "held", "waiting")
    counts = [f"{getattr(summary, name)} {name}" for name in names if getattr(summary, name)]
    say(f"{', '.join(counts) or 'nothing was due'} in {seconds:.1f} s")
    for route, reason in summary.reasons.items():
        say(f"{route} waits: {reason}")
