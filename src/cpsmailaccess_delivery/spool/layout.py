"""The directories of a spool, as open descriptors.

Everything below goes through them: a path is resolved once, and no link that somebody
puts in later leads out of the spool.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from typing import Final

from ..errors import OutboxClosed, SpoolError
from ..files import make_private
from .durable import spool_error

_MAILDIR: Final = ("tmp", "new", "cur")
_OURS: Final = ("outcomes", "keys")
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Layout:
    """tmp/, new/, cur/, outcomes/ and keys/ of one path, made when missing, 0700.

    `beside`: names that may be in the directory before it is a Maildir.  Links are refused.
    """

    def __init__(self, path: str, *, beside: Collection[str]) -> None:
        self.path = path
        self._fds: dict[str, int] = {}
        try:
            self._refuse_others(beside)
            make_private(path)
            for name in beside:
                self._refuse_link(name)
            for name in (*_MAILDIR, *_OURS):
                self._refuse_link(name)  # before a directory is made where it points to
                make_private(os.path.join(path, name))
                self._fds[name] = self._open(name)
        except OSError as error:
            self.close()
            raise spool_error("use this directory as a spool", path, error) from error
        except SpoolError:
            self.close()
            raise

    def __getitem__(self, name: str) -> int:
        """Return the descriptor of a directory; -1, which every call refuses, once closed."""
        return self._fds.get(name, -1)

    def check_open(self) -> None:
        """Raises `OutboxClosed`."""
        if not self._fds:
            raise OutboxClosed(f"{self.path}: this outbox was closed; make a new Outbox")

    def listing(self, name: str) -> list[str]:
        """Return the names in a directory.  Raises `SpoolError`."""
        try:
            fd = os.open(".", _FLAGS, dir_fd=self[name])  # of its own: they share a position
            try:
                return os.listdir(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise spool_error(f"list {name}/", self.path, error) from error

    def move(self, old: str, old_name: str, new: str, new_name: str) -> None:
        """Rename a file from one directory to another.  Raises OSError."""
        os.rename(old_name, new_name, src_dir_fd=self[old], dst_dir_fd=self[new])

    def close(self) -> None:
        """Close the descriptors.  Twice is fine."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _refuse_others(self, beside: Collection[str]) -> None:
        try:
            names = set(os.listdir(self.path))
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise SpoolError(
                f"{self.path}: is a file; a spool is a directory: choose another path"
            ) from None
        if not names.issuperset(_MAILDIR):
            others = sorted(names.difference(_MAILDIR, _OURS, beside))
            if others:
                raise SpoolError(
                    f"{self.path}: is no Maildir and holds {others[0]!r}: choose an empty or new"
                    " directory for the spool"
                )

    def _open(self, name: str) -> int:
        try:
            return os.open(os.path.join(self.path, name), _FLAGS)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise SpoolError(
                f"{self.path}/{name}: is a symbolic link or a file; a spool has a directory there"
            ) from None

    def _refuse_link(self, name: str) -> None:
        if os.path.islink(os.path.join(self.path, name)):
            raise SpoolError(
                f"{self.path}/{name}: is a symbolic link; an outbox has none: move what it points"
                " to into its place"
            )
