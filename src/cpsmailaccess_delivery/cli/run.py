"""``cpsmail run``: the processor as a service."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self

import click

from ..processor import STOP_TIMEOUT
from .app import EX_SOFTWARE, App, pass_app
from .output import upcoming

log = logging.getLogger(__name__)

#: Seconds between two looks whether the processor still runs.
_LOOK = 1.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stop_timeout_option(default: float) -> Any:
    """Give a command ``--stop-timeout``."""
    return click.option(
        "--stop-timeout",
        type=click.FloatRange(min=0),
        default=default,
        show_default=True,
        metavar="SECONDS",
        help="What is past the end of data may take so long after a signal.",
    )


@click.command()
@stop_timeout_option(STOP_TIMEOUT)
@click.option("-v", "--verbose", is_flag=True, help="Log more; show tracebacks.")
@pass_app
def run(app: App, stop_timeout: float, verbose: bool) -> int:
    """Deliver until SIGTERM or SIGINT.

    Logs to standard error.  The first signal is a clean stop: mails that the relay has in
    full are finished, the others stay in the queue.  The second one ends it at once.
    """
    app.verbose = app.verbose or verbose
    app.log(service=True)
    with app.outbox(make=True) as outbox, StopSignal() as stop:
        log.info("delivering %s, process %d", outbox.location, os.getpid())
        for note in outbox.spool.lane_notes().values():
            when = upcoming(note.until, time.time())
            log.info("%s waits already, next try %s: %s", note.route, when, note.reason)
        processor = outbox.processor()
        processor.start()
        while not stop.wait(_LOOK) and processor.is_alive():
            pass
        if not stop.is_set():
            log.critical("the processor ended by itself; the log above says why")
            return EX_SOFTWARE
        log.info("stopping, within %.0f s", stop_timeout)
        ended = processor.stop(stop_timeout)
        done = processor.summary
        log.info(
            "stopped: %d accepted, %d deferred, %d refused, %d unclear, %d held",
            *(done.accepted, done.deferred, done.refused, done.unclear, done.held),
        )
        if not ended:
            log.critical("the processor does not end; leaving it to the system")
            os._exit(EX_SOFTWARE)
    return 0


class StopSignal(threading.Event):
    """Set, inside ``with``, by the first SIGTERM or SIGINT; the second ends the process at once.

    Nothing is lost then: leases end with their process.
    """

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._received) for number in _SIGNALS]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in zip(_SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.is_set():
            os._exit(128 + number)
        self.set()
