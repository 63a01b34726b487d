"""Tells that an account changed: by inotify, or by looking at the directory's time."""

from __future__ import annotations

import os
import socket
import threading
from typing import Final

from zope.interface import implementer

from .interfaces import IWatch

_INTERVAL: Final = 1.0  # seconds between two looks, where there is no inotify


def watch_directory(path: str) -> NotifyWatch | PollingWatch:
    """Return a watch on the names in a directory.  Raises OSError.

    It polls where there is no inotify, or no more of it (a limit per user).
    """
    try:
        return NotifyWatch(path)
    except (ImportError, AttributeError, OSError):
        return PollingWatch(path)


@implementer(IWatch)
class NotifyWatch:
    """See `IWatch`."""

    def __init__(self, path: str) -> None:
        from inotify_simple import INotify, flags

        self._notify = INotify(nonblocking=True)
        try:
            self._notify.add_watch(
                path, flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.ONLYDIR
            )
        except OSError:
            self._notify.close()
            raise

    def fileno(self) -> int:
        """See `IWatch`."""
        return int(self._notify.fileno())

    def read(self) -> None:
        """See `IWatch`: what changed is not said."""
        self._notify.read(timeout=0)

    def close(self) -> None:
        """See `IWatch`."""
        self._notify.close()


@implementer(IWatch)
class PollingWatch:
    """See `IWatch`.  A thread looks, so that the descriptor can become readable."""

    def __init__(self, path: str, interval: float = _INTERVAL) -> None:
        self._path = path
        self._interval = interval
        self._seen = os.stat(path).st_mtime_ns
        self._stop = threading.Event()
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        self._thread = threading.Thread(target=self._look, name="cpsmail-accounts", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """See `IWatch`."""
        return self._ours.fileno()

    def read(self) -> None:
        """See `IWatch`: what changed is not said."""
        try:
            while self._ours.recv(4096):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        """See `IWatch`."""
        self._stop.set()
        self._thread.join()
        self._ours.close()
        self._theirs.close()

    def _look(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                now = os.stat(self._path).st_mtime_ns
                if now != self._seen:
                    self._seen = now
                    self._theirs.send(b"!")
            except OSError:  # the directory is gone for now, or nobody has read yet
                pass
