"""Mails that come from another spool, until they are admitted: hidden files in cur/.

::

    cur/.ORIGIN.NAME, cur/.ID.side --admit--> outcomes/ID, then new/NAME or cur/NAME

A name that begins with a dot is no mail, for a processor as for any reader of a Maildir.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

from zope.interface import implementer

from ..envelope import format_block
from ..errors import SpoolError
from ..files import write_new
from ..interfaces import Entry, ITransit, KeyNote, Record
from . import names
from .durable import spool_error
from .keys import Keys
from .layout import Layout
from .outcomes import SYNCED, Side, dump_side

_SIDE: Final = ".side"


@implementer(ITransit)
class Transit:
    """See `ITransit`.  For one thread of one process at a time, until it closes this."""

    def __init__(self, layout: Layout, keys: Keys) -> None:
        self._layout = layout
        self._keys = keys
        self._lock = -1  # while it is ours, nobody else changes what has arrived
        self._copies: dict[str, tuple[str, Entry]] | None = None  # by id: origin, entry
        self._visible: set[str] = set()  # ids of mails that were there before

    def place(self) -> tuple[object, ...]:
        """See `ITransit`."""
        try:
            status = os.fstat(self._layout["cur"])
        except OSError as error:
            raise spool_error("look at cur/", self._layout.path, error) from error
        return (status.st_dev, status.st_ino)

    def arrive(self, mails: Sequence[tuple[Record, bytes]], origin: str) -> Collection[str]:
        """See `ITransit`."""
        self._look()
        wanted = [mail for mail in mails if mail[0].entry.id not in self._visible]
        self.dismiss([record.entry.id for record, _ in wanted])
        cur = self._layout["cur"]
        try:
            for record, message in wanted:
                entry = names.normal(record.entry)
                if record.outcomes or record.reason or entry.attempts:
                    side = Side(
                        *(entry.state, entry.due, entry.attempts),
                        *(record.reason, record.outcomes, record.cancel),
                    )
                    name = _side_name(entry.id)
                    write_new(name, dump_side(side), mode=SYNCED, sync=True, dir_fd=cur)
                block = format_block(record.envelope)
                write_new(names.arriving_name(entry, origin), block, message, sync=True, dir_fd=cur)
                self._known[entry.id] = origin, entry
            os.fsync(cur)
        except OSError as error:
            raise spool_error("keep a mail that arrives", self._layout.path, error) from error
        return [record.entry.id for record, _ in wanted]

    def arrived(self, origin: str) -> Collection[str]:
        """See `ITransit`."""
        self._look()
        return [each for each, (there, _) in self._known.items() if there == origin]

    def _look(self) -> None:
        """List the spool, once: while the lock is ours, we know what changes."""
        if self._copies is not None:
            return
        self._take_lock()
        copies = {}
        for where in ("new", "cur", "new"):
            for name in self._layout.listing(where):
                if not name.startswith("."):
                    self._visible.add(name.partition(":")[0].partition(",L=")[0])
                elif where == "cur" and (arriving := names.parse_arriving(name)):
                    copies[arriving[1].id] = arriving
        self._copies = copies

    def admit(self, ids: Collection[str]) -> None:
        """See `ITransit`."""
        self._look()
        cur = self._layout["cur"]
        admitted = [self._known[each] for each in ids if each in self._known]
        try:
            for _, entry in admitted:
                self._admit_side(entry)
            if admitted:
                os.fsync(self._layout["outcomes"])
            for origin, entry in admitted:
                target = names.folder(entry.state)
                old = names.arriving_name(entry, origin)
                self._layout.move("cur", old, target, names.file_name(entry))
                del self._known[entry.id]
                self._visible.add(entry.id)
            if admitted:
                os.fsync(self._layout["new"])
                os.fsync(cur)
        except OSError as error:
            raise spool_error("admit a mail", self._layout.path, error) from error

    def _admit_side(self, entry: Entry) -> None:
        try:
            self._layout.move("cur", _side_name(entry.id), "outcomes", entry.id)
        except FileNotFoundError:
            pass  # it has none; or a crash came after this

    def dismiss(self, ids: Collection[str]) -> None:
        """See `ITransit`."""
        self._look()
        cur = self._layout["cur"]
        try:
            for entry_id in ids:
                doomed = [_side_name(entry_id)]
                if known := self._known.get(entry_id):
                    doomed.append(names.arriving_name(known[1], known[0]))
                for name in doomed:
                    try:
                        os.unlink(name, dir_fd=cur)
                    except FileNotFoundError:
                        pass
                self._known.pop(entry_id, None)
        except OSError as error:
            raise spool_error("forget a mail that arrived", self._layout.path, error) from error

    def key_notes(self) -> Iterator[KeyNote]:
        """See `ITransit`."""
        return self._keys.notes()

    def keep_keys(self, notes: Iterable[KeyNote]) -> None:
        """See `ITransit`."""
        self._keys.keep(notes)

    def close(self) -> None:
        """See `ITransit`."""
        if self._lock >= 0:
            lock, self._lock = self._lock, -1
            os.close(lock)
        self._copies = None
        self._visible.clear()

    def _take_lock(self) -> None:
        try:
            self._lock = os.open(".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._layout["cur"])
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise SpoolError(
                f"{self._layout.path}: another process moves mails into it; wait for that"
            ) from None
        except OSError as error:
            raise spool_error("lock cur/", self._layout.path, error) from error

    @property
    def _known(self) -> dict[str, tuple[str, Entry]]:
        assert self._copies is not None  # noqa: S101 - `_look` was called
        return self._copies


def _side_name(entry_id: str) -> str:
    return f".{entry_id}{_SIDE}"
