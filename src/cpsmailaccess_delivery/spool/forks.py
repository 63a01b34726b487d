"""Locks must not outlive their owner in a forked child.

flock belongs to the open file, which parent and child share: a child that keeps it open
keeps a dead parent's leases and presence alive.  So a child closes them first thing,
and never unlocks them: that would take them from its living parent.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Final

#: Files that fit into one message: SCM_MAX_FD of Linux is 253.
_AT_ONCE: Final = 250

_fds: set[int] = set()
_generation = 0


def generation() -> int:
    """Return a number that a fork changes: what was locked under another is not ours."""
    return _generation


def keep(fd: int) -> None:
    """Remember a file that children must close."""
    _fds.add(fd)


def drop(fd: int) -> None:
    """Close a file that was kept."""
    _fds.discard(fd)  # first: a number that is free again may soon be somebody else's
    try:
        os.close(fd)
    except OSError:
        pass  # closed all the same, and nothing was written through it


def drop_all(fds: Sequence[int]) -> None:
    """Close many files that were kept, in few calls that let other threads run.

    The last close of a removed file frees its blocks, which may take a disk 0.1 to 2 ms;
    and a thread that closes one by one beside a busy loop waits 5 ms for the interpreter's
    lock after each.  Files that are under way in a socket are closed with it: the last
    close of 250 files is one call (measured: 0.4 ms each instead of 5).
    """
    for start in range(0, len(fds), _AT_ONCE):
        some = fds[start : start + _AT_ONCE]
        ends: tuple[socket.socket, ...] = ()
        with contextlib.suppress(OSError):  # no room: the closes below free them one by one
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            socket.send_fds(ends[0], [b"x"], some)
        for fd in some:
            drop(fd)
        for end in ends:
            with contextlib.suppress(OSError):  # closed all the same
                end.close()


def _in_child() -> None:
    global _generation
    _generation += 1
    while _fds:
        try:
            os.close(_fds.pop())
        except OSError:
            pass  # the child cannot do better


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
