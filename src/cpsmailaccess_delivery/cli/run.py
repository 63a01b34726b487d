"""``cpsmail run``: the processor as a service, in one process or several."""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import FrameType
from typing import Any, Self

import click

from ..address import relay_name
from ..metrics import require_client, serve
from ..outbox import Outbox
from ..processor import STOP_TIMEOUT, QueueProcessorThread
from ..share import ALONE, Share
from ..supervisor import Heart, Supervisor, own_command, stop_with_parent
from ..wording import upcoming
from .app import EX_SOFTWARE, App, pass_app

log = logging.getLogger(__name__)

#: Seconds between two looks whether the processor still runs.
_LOOK = 1.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

#: More open files than this are of no use: a session needs ten at most.
_MOST_FILES = 65_536

#: More workers than this are a slip of the finger.
_MOST_WORKERS = 64


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


class _ShareType(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    name = "I/N"

    def convert(self, value: Any, param: Any, ctx: Any) -> Share:
        if isinstance(value, Share):
            return value
        index, _, of = value.partition("/")
        try:
            return Share(int(index), int(of))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.option(
    "--workers",
    type=click.IntRange(1, _MOST_WORKERS),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that share the work, mailbox by mailbox.",
)
@stop_timeout_option(STOP_TIMEOUT)
@click.option(
    "--metrics-port",
    type=click.IntRange(1, 65_535),
    metavar="PORT",
    help="Serve Prometheus metrics; each worker has a port, from this one on.",
)
@click.option("--metrics-address", metavar="ADDRESS", help="On this IP address; 127.0.0.1.")
@click.option("-v", "--verbose", is_flag=True, help="Log more; show tracebacks.")
@click.option("--worker", "share", type=_ShareType(), hidden=True)
@pass_app
def run(
    app: App,
    workers: int,
    stop_timeout: float,
    metrics_port: int | None,
    metrics_address: str | None,
    verbose: bool,
    share: Share | None,
) -> int:
    """Deliver until SIGTERM or SIGINT.

    Logs to standard error.  The first signal is a clean stop: mails that the relay has in
    full are finished, the others stay in the queue.  The second one ends it at once.
    """
    app.verbose = app.verbose or verbose
    app.log(service=True)
    for key, value in (("metrics_port", metrics_port), ("metrics_address", metrics_address)):
        if value is not None:
            app.options[key] = str(value)
    raise_open_files()
    if workers > 1 and share is None:
        return _supervise(app, workers, stop_timeout)
    with app.outbox(make=True) as outbox, ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        if share is not None:
            stop_with_parent(stop.set)
        processor = outbox.processor(share or ALONE)
        settings = app.settings()
        if settings.metrics_port is not None:
            port = settings.metrics_port + (share.index if share is not None else 0)
            stack.callback(serve(processor, address=settings.metrics_address, port=port))
            log.info("metrics at http://%s/metrics", relay_name(settings.metrics_address, port))
        return _deliver(outbox, processor, stop, stop_timeout, share or ALONE)


def _deliver(
    outbox: Outbox,
    processor: QueueProcessorThread,
    stop: StopSignal,
    stop_timeout: float,
    share: Share,
) -> int:
    which = f", worker {share}" if share.of > 1 else ""
    log.info("delivering %s, process %d%s", outbox.location, os.getpid(), which)
    for key, note in outbox.spool.lane_notes().items():
        if share.owns(key):
            when = upcoming(note.until, outbox.clock())
            log.info("%s waits already, next try %s: %s", note.route, when, note.reason)
    heart = Heart(lambda: scheduler.heartbeat if (scheduler := processor.scheduler) else None)
    processor.start()
    while not stop.wait(_LOOK) and processor.is_alive():
        heart.beat()
    heart.close()
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


def arguments_of(config: str | None, options: Mapping[str, str]) -> list[str]:
    """Return the options before the command that stand for these."""
    found = ["--config", config] if config else []
    for key, value in options.items():
        found += ["--set", f"{key}={value}"]
    return found


def _supervise(app: App, workers: int, stop_timeout: float) -> int:
    with app.outbox(make=True) as outbox:  # what is wrong is said once, before all
        if app.settings().metrics_port is not None:
            require_client()  # else each worker would say so, again and again
        log.info("supervising %d workers for %s", workers, outbox.location)
    before = [*arguments_of(app.config, app.options), "run", "--stop-timeout", f"{stop_timeout}"]
    before += ["--verbose"] if app.verbose else []
    supervisor = Supervisor(
        [own_command([*before, "--worker", f"{i}/{workers}"]) for i in range(workers)]
    )
    with StopSignal(supervisor.kill) as stop:
        clean = supervisor.run(stop, stop_timeout)
    log.info("stopped" if clean else "stopped, not every worker cleanly")
    return 0 if clean else EX_SOFTWARE


def raise_open_files() -> None:
    """Raise the limit of open files as far as we may, for a connection each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MOST_FILES if hard == unlimited else min(hard, _MOST_FILES)
    if soft == unlimited or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        log.warning("open files: the limit stays %d: %s", soft, error)
    else:
        log.debug("open files: limit raised from %d to %d", soft, wanted)


class StopSignal(threading.Event):
    """Set, inside ``with``, by the first SIGTERM or SIGINT; the second ends the process at once.

    Nothing is lost then: leases end with their process.  `at_once`: called before that.
    """

    def __init__(self, at_once: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self._at_once = at_once
        self._signalled = False

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._received) for number in _SIGNALS]
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in zip(_SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            self._at_once()
            os._exit(128 + number)
        self._signalled = True
        self.set()
