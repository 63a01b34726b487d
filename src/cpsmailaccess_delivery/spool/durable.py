"""What has reached the disk, and what an error of the disk means to people.

`settle_files` makes new files and their directory entries durable together.  fsync of
each file and of the directory costs a device flush each; one syncfs (Linux) writes all in
one journal commit, but also everything else that waits on that file system.  So it is used
only while little waits on this machine.

POSIX does not say that fsync of a new file makes its name durable, too.  ext4 and xfs do:
there the name is in the same journal commit as the file, or an earlier one (and without a
journal ext4 writes the directory).  On any other file system the directory is synced as well.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, Generic, TypeVar

from ..errors import SpoolError
from . import forks

T = TypeVar("T")

_JOURNALLING: Final = ("ext4", "xfs")  # as mountinfo calls them
_QUIET: Final = 16 * 1024 * 1024  # bytes that may wait for the disk besides ours
_LOOK_EVERY: Final = 0.05  # seconds: what other programs write in between is the risk taken

_WAYS_OUT: Final = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space or raise it",
    errno.EACCES: "no permission: run as the owner of the spool, or give it back its owner",
    errno.EPERM: "not permitted: run as the owner of the spool, or give it back its owner",
    errno.EROFS: "the file system is read-only: remount it for writing",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine: raise fs.file-max",
    errno.EIO: "the disk reports an error: check it (dmesg), then its file system",
    errno.EBADF: "the spool is closed: open a new one",
    errno.ENOENT: "part of the spool is gone: close it, look where it went, open it again",
    errno.ELOOP: "is a symbolic link: a spool has none; put the directory itself there",
    errno.ENAMETOOLONG: "the name is too long: give the spool a shorter path",
}


def spool_error(action: str, where: str, error: OSError) -> SpoolError:
    """Return the error to raise: what could not be done, where, and the way out."""
    way_out = _WAYS_OUT.get(error.errno or 0, "see the system's message")
    return SpoolError(f"{where}: cannot {action}: {error.strerror or error}; {way_out}")


def settle_files(fds: Sequence[int], directory: int) -> None:
    """Make these new files of one directory durable, with their names.

    `fds`: open since before they were written, the oldest first: a write error that
    another call has seen is then still reported to this one (errseq of Linux).
    """
    named = _keeps_names(directory)
    if named and len(fds) == 1:
        os.fsync(fds[0])
        return
    if _syncfs is not None and _quiet():
        _syncfs(fds[0])
        return
    if len(fds) > 1 and hasattr(os, "posix_fadvise"):
        for fd in fds:  # starts the writes, so that the first fsync commits for all
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for fd in fds:
        os.fsync(fd)
    if not named:
        os.fsync(directory)


class GroupSync(Generic[T]):
    """One sync for all threads that wait for one: what comes while one runs shares the next.

    `sync` gets what has come; an OSError that it raises, each of them gets.  What ends one thread
    only (a signal's exception) is not theirs: the next one syncs for them.
    """

    def __init__(self, sync: Callable[[list[T]], None]) -> None:
        self._sync = sync
        self._begin()

    def __call__(self, item: T) -> None:
        """Return when a sync that began after this call has ended.  Raises what it raised."""
        if self._generation != forks.generation():
            self._begin()  # the lock may be held by a thread that the child does not have
        turn = _Turn(item)
        self._waiting.append(turn)
        try:
            with self._lock:
                if not turn.done:
                    self._take_turns(turn)
        except BaseException:  # an interrupt: nobody waits for our turn any more
            try:
                self._waiting.remove(turn)
            except ValueError:
                with self._lock:  # another thread syncs it: not before that is over
                    pass
            raise
        if turn.error is not None:
            raise turn.error

    def _take_turns(self, own: _Turn[T]) -> None:
        """Sync for all that wait."""
        turns = [self._waiting.popleft() for _ in range(len(self._waiting))]
        error: Exception | None = None
        try:
            self._sync([turn.item for turn in turns])
        except OSError as raised:
            error = raised
        except BaseException:  # of this thread alone: the others begin anew
            turns.remove(own)
            self._waiting.extendleft(reversed(turns))
            raise
        for turn in turns:
            turn.error = error
            turn.done = True

    def _begin(self) -> None:
        self._generation = forks.generation()
        self._lock = threading.Lock()
        self._waiting: deque[_Turn[T]] = deque()


class _Turn(Generic[T]):
    __slots__ = ("done", "error", "item")

    def __init__(self, item: T) -> None:
        self.item = item
        self.done = False
        self.error: Exception | None = None


def _load_syncfs() -> Callable[[int], None] | None:
    if sys.platform != "linux":
        return None
    release = tuple(int(part) for part in os.uname().release.split(".")[:2] if part.isdecimal())
    if release < (5, 8):  # earlier ones do not report write errors here
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if function is None:
        return None

    def syncfs(fd: int) -> None:
        if function(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    return syncfs


def _keeps_names(directory: int) -> bool:
    """Tell whether fsync of a new file in a directory makes its name durable, too."""
    return _is_journalling(os.fstat(directory).st_dev)


@lru_cache(64)
def _is_journalling(device: int) -> bool:
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                mount, _, system = line.partition(" - ")
                if mount.split()[2] == wanted:
                    return system.split()[0] in _JOURNALLING
    except (OSError, IndexError):
        pass  # unknown: no
    return False


class _Dirt:
    """How much waits for the disks of this machine: an upper bound for one file system."""

    def __init__(self) -> None:
        self._until = 0.0
        self._quiet = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if now >= self._until:
            self._quiet = self._look()
            self._until = now + _LOOK_EVERY
        return self._quiet

    @staticmethod
    def _look() -> bool:
        try:
            fd = os.open("/proc/meminfo", os.O_RDONLY | os.O_CLOEXEC)
            try:
                text = os.read(fd, 4096)
            finally:
                os.close(fd)
        except OSError:
            return False
        at = text.find(b"\nDirty:")
        return at >= 0 and int(text[at + 7 :].split(None, 1)[0]) * 1024 <= _QUIET


_syncfs = _load_syncfs()
_quiet = _Dirt()
