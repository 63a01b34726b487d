"""What was recorded a moment ago, and is not in the journal yet: kept for when we are killed.

::

    journal.sqlite.<who>.0    what the writer thread writes to the journal just now
    journal.sqlite.<who>.1    what came since; then they change places

An event is a line, in the memory of the system at once; nothing is synced.  A process locks both
while it lives.  What one leaves that was killed, the next one reads: see `left_behind`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from .journal_file import Event

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"\.[0-9a-f]{16}\.[01]\Z", re.ASCII)
_FLAGS: Final = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

#: Bytes that are read of a file: hundred times what a process records in the time of one batch.
_MOST: Final = 16 * 1024 * 1024

_encode = json.JSONEncoder(separators=(",", ":")).encode


class JournalTail:
    """Of one process.  `path`: of the journal.  `forget` may run beside `append`, nothing else."""

    def __init__(self, path: str) -> None:
        self._base = f"{path}.{secrets.token_hex(8)}"
        self._fds: list[int] = []
        self._used = [False, False]
        self._now = 0  # which of the two
        self._failed = False

    def append(self, event: Event) -> None:
        """Keep an event until `forget`.  Never raises: the journal does without."""
        try:
            if not self._fds:
                self._open()
            self._used[self._now] = True
            # The line end first: a line that a full disk has cut does not spoil the next.
            os.write(self._fds[self._now], b"\n" + _encode(event).encode())
        except (OSError, TypeError, ValueError) as error:
            if not self._failed:
                log.warning(
                    "%s.*: %s: should this process be killed, its last events are lost",
                    self._base,
                    error,
                )
            self._failed = True

    def turn(self) -> None:
        """Let what comes now stand apart from what came before, and is about to be written."""
        self._now = 1 - self._now

    def forget(self) -> None:
        """Forget what stands apart: it is in the journal, or given up.  Never raises."""
        other = 1 - self._now
        if self._used[other]:
            try:
                os.ftruncate(self._fds[other], 0)
            except OSError:
                return  # tried again; to write an event twice harms nobody
            self._used[other] = False

    def close(self) -> None:
        """Remove both files: nothing is left to be written.  Never raises."""
        for number in range(len(self._fds)):
            try:
                os.unlink(f"{self._base}.{number}")
            except FileNotFoundError:
                pass  # see `_open`
            except OSError as error:
                log.warning("%s.%d cannot be removed: %s", self._base, number, error.strerror)
        self.leave()

    def leave(self) -> None:
        """Let go of the files without a change: in a forked child they are its parent's."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._used = [False, False]

    def _open(self) -> None:
        try:
            for number in range(2):
                fd = os.open(f"{self._base}.{number}", _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
                self._fds.append(fd)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(fd).st_nlink:
                    raise OSError(errno.ESTALE, "taken for a dead process's before it was locked")
        except OSError:
            self.close()
            raise


def left_behind(path: str) -> Iterator[str]:
    """Yield the paths of the files that processes have kept beside a journal, living or dead."""
    directory, name = os.path.split(path)
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return
    for found in sorted(names):
        if found.startswith(name) and _NAME.fullmatch(found, len(name)):
            yield os.path.join(directory, found)


@contextmanager
def taken_over(path: str) -> Iterator[list[Event]]:
    """Give the events in the file of a process that died, and remove it; none: it lives.

    Raises OSError.
    """
    fd = os.open(path, _FLAGS)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield []
            return
        yield list(_events(os.read(fd, _MOST)))
        os.unlink(path)
    finally:
        os.close(fd)


def _events(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            yield Event(*json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue  # torn, or not ours
