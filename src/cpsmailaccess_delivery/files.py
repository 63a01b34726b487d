"""Files and directories for their owner only, written whole and made durable."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

#: To read what may be anything: no link is followed, and nothing is waited for.
READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def make_private(path: str) -> None:
    """Make a directory for its owner only, whatever the umask, durably.

    One that is there keeps its mode: it is its administrator's.  Those above it that are
    missing are made as the umask says.
    """
    if _make(os.path.abspath(path), 0o700):
        os.chmod(path, 0o700)


def refuse_link(path: str) -> None:
    """Raises OSError (ELOOP) when a path is a symbolic link: nothing of an outbox is one."""
    if os.path.islink(path):
        raise OSError(errno.ELOOP, "is a symbolic link, and no part of an outbox may be one", path)


def open_inside(directory: str, name: str, flags: int = os.O_RDONLY) -> int:
    """Open a file of a directory; neither of them may be a symbolic link.  Never blocks.

    Raises OSError: ELOOP where one is.
    """
    beneath = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(directory, beneath)
    except NotADirectoryError:
        refuse_link(directory)
        raise
    try:
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=fd)
    finally:
        with contextlib.suppress(OSError):  # closed all the same; what was opened is wanted
            os.close(fd)


def write_new(
    path: str, *parts: bytes, mode: int = 0o600, sync: bool = False, dir_fd: int | None = None
) -> None:
    """Write a file that must not be there yet, `mode` whatever the umask; leave none half-done.

    `sync`: its content is durable, its name is not.  `dir_fd`: what `path` is relative to.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(path, flags, mode, dir_fd=dir_fd)
    try:
        try:
            os.fchmod(fd, mode)
            write_all(fd, *parts)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        os.unlink(path, dir_fd=dir_fd)
        raise


def write_all(fd: int, *parts: bytes) -> None:
    """Write all parts, whatever the system takes at a time."""
    left = [memoryview(part) for part in parts]
    while left:
        done = os.writev(fd, left)
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if left:
            left[0] = left[0][done:]


def read_all(fd: int, size: int) -> bytes:
    """Return a file as one bytes.  `size`: what fstat said; files of a spool do not grow."""
    data = os.read(fd, size + 1)
    if len(data) >= size or not data:
        return data
    parts = [data]  # over 2 GiB, or a signal
    while data:
        data = os.read(fd, size + 1)
        parts.append(data)
    return b"".join(parts)


def sync_path(path: str) -> None:
    """Make the content of a file, or the names in a directory, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make(path: str, mode: int) -> bool:
    if os.path.isdir(path):
        return False
    above = os.path.dirname(path)
    _make(above, 0o777)
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if os.path.isdir(path):
            return False  # another process was faster
        raise
    sync_path(above)
    return True
