"""Several worker processes: started, started again when they die, stopped together.

A worker's standard input is a socket to its supervisor.  Its end is the order to stop,
so that workers outlive their supervisor by no more than a clean stop, however it died::

    supervisor -socket-> worker      closed: stop cleanly
               <-beats--             silent for long: kill it, it hangs
               <-wait---             exited: start another, later if it died young

What a worker does is its command's affair; nothing is forked that has threads.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

#: Seconds of life after which a death is no sign that the next worker will die too.
_YOUNG = 10.0

#: Seconds before a worker that died young is started again: at first, and at most.
_FIRST_DELAY = 1.0
_LONGEST_DELAY = 60.0

#: Seconds between two looks at the workers.
_LOOK = 0.2

#: Seconds without a sign of life after which a worker is killed: its loop hangs.
SILENCE = 60.0

#: Early deaths in a row after which it is said louder, whose mail waits.
_MANY_DEATHS = 5

#: Seconds over its own deadline that a worker has to end, before it is killed.
_GRACE = 12.0


def delay_after(early_deaths: int) -> float:
    """Return the seconds to wait after so many deaths in a row of workers that died young."""
    if not early_deaths:
        return 0.0
    return float(min(_FIRST_DELAY * 2 ** min(early_deaths - 1, 30), _LONGEST_DELAY))


class _Worker:
    """One place among the workers, and the process that fills it."""

    def __init__(self, index: int, command: Sequence[str], silence: float) -> None:
        self.index = index
        self.process: subprocess.Popen[bytes] | None = None
        self._command = command
        self._silence = silence
        self._line: socket.socket | None = None
        self._heard = 0.0
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
            self._listen(now)
            return
        self.hang_up()
        young = now - self._started < _YOUNG
        self._early_deaths = self._early_deaths + 1 if young else 0
        delay = delay_after(self._early_deaths)
        log.error(
            "worker %d, process %d, %s; starting another in %.0f s",
            *(self.index, self.process.pid, how_it_ended(code), delay),
        )
        if self._early_deaths >= _MANY_DEATHS:
            log.critical(
                "worker %d has died young %d times in a row: the mails of its mailboxes wait; what"
                " it logged before says why",
                *(self.index, self._early_deaths),
            )
        self.process = None
        self._due = now + delay

    def hang_up(self) -> None:
        """Tell it to stop."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _listen(self, now: float) -> None:
        """Kill the process when it has been silent for too long; `look` starts another."""
        assert self._line is not None  # noqa: S101 - it lives
        assert self.process is not None  # noqa: S101
        try:
            while self._line.recv(4096):
                self._heard = now
        except BlockingIOError:
            pass
        except OSError as error:
            log.debug("worker %d: %s", self.index, error)
        if now - self._heard > self._silence:
            log.critical(
                "worker %d, process %d: no sign of life for %.0f s; killing it",
                *(self.index, self.process.pid, now - self._heard),
            )
            self.process.kill()

    def _start(self, now: float) -> None:
        try:
            self._line, theirs = socket.socketpair()
            self._line.setblocking(False)
            with theirs:
                self.process = subprocess.Popen(self._command, stdin=theirs.fileno())  # noqa: S603
        except OSError as error:  # no memory, no more processes
            self.hang_up()
            self._early_deaths += 1
            delay = delay_after(self._early_deaths)
            log.error("worker %d: %s; trying again in %.0f s", self.index, error, delay)
            self._due = now + delay
            return
        self._started = self._heard = now
        log.info("worker %d is process %d", self.index, self.process.pid)


class Supervisor:
    """Keeps ``len(commands)`` processes running, one for each command.

    `silence`: seconds without a sign of life after which a worker is killed.
    `clock`: seconds on any clock that does not go back.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        *,
        silence: float = SILENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers = [_Worker(index, command, silence) for index, command in enumerate(commands)]
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
            worker.hang_up()
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
    """Call `stop` (in a thread) when the socket on standard input ends."""

    def watch() -> None:
        try:
            while os.read(0, 512):
                pass
        except OSError:
            pass
        stop()

    threading.Thread(target=watch, name="cpsmail-parent", daemon=True).start()


class Heart:
    """A worker's signs of life: `beat` sends one while the loop of its processor goes round.

    `pulse`: returns a value that changes while the loop does, or None while there is none.
    """

    def __init__(self, pulse: Callable[[], float | None]) -> None:
        self._pulse = pulse
        self._last: float | None = None
        self._line: socket.socket | None = None
        if stat.S_ISSOCK(os.fstat(0).st_mode):  # else somebody runs a worker by hand
            self._line = socket.socket(fileno=os.dup(0))

    def beat(self) -> None:
        """Send a sign of life, if there is one.  Never blocks, never raises."""
        pulse = self._pulse()
        if self._line is None or (pulse is not None and pulse == self._last):
            return
        self._last = pulse
        try:
            self._line.send(b".", socket.MSG_DONTWAIT)
        except OSError:
            pass  # nobody listens any more, or not now

    def close(self) -> None:
        """Give back the socket."""
        if self._line is not None:
            self._line.close()
            self._line = None
