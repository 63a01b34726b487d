"""How a processor learns at once that something changed in directories: inotify, or looking."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from zope.interface import implementer

from .interfaces import Entry, IWatch

log = logging.getLogger(__name__)

#: Returns the entry of (folder, name), or None: there is none to tell of.
EntryOf = Callable[[str, str], Entry | None]

_INTERVAL: Final = 1.0  # seconds between two looks, where there is no inotify


def watch_folders(
    root: str,
    folders: Sequence[str],
    entry_of: EntryOf | None = None,
    *,
    notify: bool = True,
    on_close: Callable[[PollingWatch], None] = lambda watch: None,
) -> NotifyWatch | PollingWatch:
    """Return a watch on folders of a directory.  Raises OSError.

    `entry_of`: what is told of a file that is complete; None: only that something changed.
    It polls without `notify`, and where there is no inotify (left: a limit per user).
    `on_close`: see `PollingWatch`.
    """
    if notify:
        try:
            return NotifyWatch(root, folders, entry_of)
        except (ImportError, AttributeError, OSError) as error:
            log.info("no inotify for %s, looking once a second instead: %s", root, error)
    return PollingWatch(root, folders, on_close)


@implementer(IWatch)
class NotifyWatch:
    """See `IWatch`.  Raises ImportError or OSError where there is no inotify (left).

    Only complete files are told of: moved in, closed after writing, or linked.
    """

    def __init__(self, root: str, folders: Sequence[str], entry_of: EntryOf | None) -> None:
        from inotify_simple import INotify, flags

        self._root = root
        self._entry_of = entry_of
        self._flags = flags
        self._notify = INotify(nonblocking=True)
        wanted = flags.MOVED_TO | flags.ONLYDIR
        wanted |= flags.CLOSE_WRITE | flags.CREATE if entry_of else flags.MOVED_FROM | flags.DELETE
        try:
            self._folders = {
                self._notify.add_watch(os.path.join(root, folder), wanted): folder
                for folder in folders
            }
        except OSError:
            self._notify.close()
            raise

    def fileno(self) -> int:
        """See `IWatch`."""
        return int(self._notify.fileno())

    def read(self) -> Iterable[Entry] | None:
        """See `IWatch`."""
        entries: dict[Entry, None] = {}  # once each, in order
        lost = self._flags.Q_OVERFLOW | self._flags.IGNORED | self._flags.UNMOUNT
        complete = self._entry_of is not None
        for event in self._notify.read(timeout=0):
            if event.mask & lost:
                complete = False
            elif not event.mask & self._flags.ISDIR and not event.name.startswith("."):
                entry = self._entry(event)
                if entry is not None:
                    entries[entry] = None
        return list(entries) if complete else None

    def close(self) -> None:
        """See `IWatch`."""
        self._notify.close()

    def _entry(self, event: Any) -> Entry | None:
        if self._entry_of is None:
            return None
        folder = self._folders[event.wd]
        if event.mask & self._flags.CREATE:
            try:
                status = os.lstat(os.path.join(self._root, folder, event.name))
            except OSError:
                return None
            if status.st_nlink < 2:
                return None  # being written: its close is told too
        return self._entry_of(folder, event.name)


class Told:
    """What a thread tells who reads a watch, and the descriptor that is readable meanwhile."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque()
        self._stale = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)

    def fileno(self) -> int:
        """See `IWatch`."""
        return self._reader

    def tell(self, entries: Iterable[Entry]) -> None:
        """Pass entries on."""
        self._entries.extend(entries)
        self._wake()

    def lose_count(self) -> None:
        """Let who reads look again: nobody knows what has changed."""
        self._stale = True
        self._wake()

    def read(self) -> list[Entry] | None:
        """See `IWatch`."""
        try:
            while os.read(self._reader, 4096):
                pass
        except BlockingIOError:
            pass
        stale, self._stale = self._stale, False
        told = []
        while self._entries:
            told.append(self._entries.popleft())
        return None if stale else told

    def close(self) -> None:
        """Close the descriptor, once nobody tells any more."""
        os.close(self._reader)
        os.close(self._writer)

    def _wake(self) -> None:
        try:
            os.write(self._writer, b"!")
        except BlockingIOError:
            pass  # full: it is readable


@implementer(IWatch)
class PollingWatch:
    """See `IWatch`.  What `tell` is told is passed on at once, the rest is looked for.

    A thread looks, because a descriptor must become readable and nothing else would
    make it so; it reads time stamps, and touches nothing.
    """

    def __init__(
        self,
        root: str,
        folders: Sequence[str],
        on_close: Callable[[PollingWatch], None] = lambda watch: None,
        interval: float = _INTERVAL,
    ) -> None:
        self._paths = [os.path.join(root, folder) for folder in folders]
        self._on_close = on_close
        self._told = Told()
        self._stamps = self._look()
        self._stop = threading.Event()
        self._interval = interval
        self._thread = threading.Thread(target=self._watch, name="cpsmail-watch", daemon=True)
        self._thread.start()

    def tell(self, entries: Iterable[Entry]) -> None:
        """Pass on what this process has made visible or changed."""
        self._told.tell(entries)

    def fileno(self) -> int:
        """See `IWatch`."""
        return self._told.fileno()

    def read(self) -> Iterable[Entry] | None:
        """See `IWatch`."""
        return self._told.read()

    def close(self) -> None:
        """See `IWatch`."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join()
            self._on_close(self)
            self._told.close()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            stamps = self._look()
            if stamps != self._stamps:
                self._stamps = stamps
                self._told.lose_count()

    def _look(self) -> list[int]:
        stamps = []
        for path in self._paths:
            try:
                stamps.append(os.stat(path).st_mtime_ns)
            except OSError:
                stamps.append(0)  # gone for now
        return stamps
