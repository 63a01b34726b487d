"""Locks must not outlive their owner in a forked child.

flock belongs to the open file, which parent and child share: a child that keeps it open
keeps a dead parent's leases and presence alive.  So a child closes them first thing,
and never unlocks them: that would take them from its living parent.
"""

from __future__ import annotations

import os

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
    os.close(fd)


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
