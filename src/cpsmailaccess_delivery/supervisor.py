"""Several worker processes: started, started again when they die, stopped together.

A worker's standard input is a pipe from its supervisor.  Its end is the order to stop,
so that workers outlive their supervisor by no more than a clean stop, however it died::

    supervisor --pipe--> worker      pipe closed: stop cleanly
               <-wait---             exited: start another, later if it died young

What a worker does is its command's affair; nothing is forked that has threads.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger(__name__)

#: Seconds of life after which a death is no sign that the next worker will die too.
_YOUNG = 10.0

#: Seconds before a worker that died young is started again: at first, and at most.
_FIRST_DELAY = 1.0
_LONGEST_DELAY = 60.0

#: Seconds between two looks at the workers.
_LOOK = 0.2

#: Seconds over its own deadline that a worker has to end, before it is killed.
_GRACE = 12.0


def delay_after(early_deaths: int) -> float:
    """Return the seconds to wait after so many deaths in a row of workers that died young."""
    if not early_deaths:
        return 0.0
    return float(min(_FIRST_DELAY * 2 ** min(early_deaths - 1, 30), _LONGEST_DELAY))


class _Worker:
    """One place among the workers, and the process that fills it."""

    def __init__(self, index: int, command: Sequence[str]) -> None:
        self.index = index
        self.process: subprocess.Popen[bytes] | None = None
        self._command = command
        self._early_deaths = 0
        self._started = 0.0
        self._due = 0.0

    def look(self, now: float) -> None:
        """Start the process when it is missing and due; notice that it has died."""
        if self.process is None:
            if now >= self._due:
                self._start(now)
            return
        code = self.process.poll()
        if code is None:
            return
        self.close_pipe()
        young = now - self._started < _YOUNG
        self._early_deaths = self._early_deaths + 1 if young else 0
        delay = delay_after(self._early_deaths)
        log.error(
            "worker %d, process %d, %s; starting another in %.0f s",
            *(self.index, self.process.pid, how_it_ended(code), delay),
        )
        self.process = None
        self._due = now + delay

    def close_pipe(self) -> None:
        """Tell it to stop."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    def _start(self, now: float) -> None:
        try:
            self.process = subprocess.Popen(self._command, stdin=subprocess.PIPE)  # noqa: S603
        except OSError as error:  # no memory, no more processes
            self._early_deaths += 1
            delay = delay_after(self._early_deaths)
            log.error("worker %d: %s; trying again in %.0f s", self.index, error, delay)
            self._due = now + delay
            return
        self._started = now
        log.info("worker %d is process %d", self.index, self.process.pid)


class Supervisor:
    """Keeps ``len(commands)`` processes running, one for each command.

    `clock`: seconds on any clock that does not go back.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._workers = [_Worker(index, command) for index, command in enumerate(commands)]
        self._clock = clock

    def __repr__(self) -> str:
        return f"<Supervisor {[w.process.pid if w.process else None for w in self._workers]}>"

    def run(self, stop: threading.Event, timeout: float) -> bool:
        """Supervise until `stop` is set; then stop all.  Return whether all ended cleanly.

        `timeout`: seconds that the workers give themselves for a clean stop.
        """
        try:
            while not stop.wait(_LOOK):
                for worker in self._workers:
                    worker.look(self._clock())
        finally:
            clean = self._stop(timeout)
        return clean

    def kill(self) -> None:
        """End the workers at once: leases end with them."""
        for worker in self._workers:
            if worker.process is not None:
                worker.process.kill()

    def _stop(self, timeout: float) -> bool:
        for worker in self._workers:
            worker.close_pipe()
        deadline = self._clock() + timeout + _GRACE
        clean = True
        for worker in self._workers:
            process = worker.process
            if process is None:
                continue
            try:
                code = process.wait(max(deadline - self._clock(), 0.0))
            except subprocess.TimeoutExpired:
                log.critical("worker %d, process %d: does not end", worker.index, process.pid)
                process.kill()
                code = process.wait()
            if code:
                log.error(
                    "worker %d, process %d, %s", worker.index, process.pid, how_it_ended(code)
                )
                clean = False
        return clean


def own_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that runs ``cpsmail`` of this very installation."""
    return [sys.executable, "-P", "-m", __package__ or "", *arguments]


def how_it_ended(code: int) -> str:
    """Return an exit code of `subprocess` in words."""
    return f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"


def stop_with_parent(stop: Callable[[], object]) -> None:
    """Call `stop` (in a thread) when the pipe on standard input ends."""

    def watch() -> None:
        try:
            while os.read(0, 512):
                pass
        except OSError:
            pass
        stop()

    threading.Thread(target=watch, name="cpsmail-parent", daemon=True).start()


def arguments_of(config: str | None, options: Mapping[str, str]) -> list[str]:
    """Return the options before the command that stand for these."""
    found = ["--config", config] if config else []
    for key, value in options.items():
        found += ["--set", f"{key}={value}"]
    return found
