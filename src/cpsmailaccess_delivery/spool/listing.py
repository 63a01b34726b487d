"""Which mails there are, from names alone.

No name that leaves here holds anything but letters, digits and a few signs, and the names
and places of states always agree: a file that was not named by us is given such a name.
Two names for one file (a file system that saved half of a rename) become one: the later
state stays.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator

from ..interfaces import Entry
from . import names
from .layout import Layout

log = logging.getLogger("cpsmailaccess_delivery.spool")


class Listing:
    """The entries of new/ and cur/.  `clock`: seconds since the epoch, for new ids."""

    def __init__(self, layout: Layout, clock: Callable[[], float]) -> None:
        self._layout = layout
        self._clock = clock

    def __iter__(self) -> Iterator[Entry]:
        """Yield the entries, the oldest first.

        Names are let go as they are used: a million of them is most of what a start
        costs in memory.
        """
        new, cur = (sorted(self._layout.listing(name), reverse=True) for name in ("new", "cur"))
        while new or cur:
            where, listing = (
                ("cur", cur) if not new or (cur and cur[-1] < new[-1]) else ("new", new)
            )
            name = listing.pop()
            base = name.partition(":")[0]
            if (new and new[-1].startswith(base) and new[-1].partition(":")[0] == base) or (
                cur and cur[-1].startswith(base) and cur[-1].partition(":")[0] == base
            ):
                yield from self._resolve([(where, name), *_pop_twins(base, new=new, cur=cur)])
                continue
            entry = self.entry_of(where, name)
            if entry is not None:
                yield entry

    def entry_of(self, where: str, name: str) -> Entry | None:
        """Return the entry of a file; one that we did not name is made usable, and queued.

        So no name that leaves here holds anything but letters, digits and a few signs,
        and names and places of states always agree.
        """
        if name.startswith("."):
            return None  # hidden, as in Maildir: zope.sendmail's .sending-, .rejected-
        return names.parse(name, where) or self._adopt(where, name)

    def _adopt(self, where: str, name: str) -> Entry | None:
        entry = names.usable_id(name)
        if entry is None or self._exists("new", entry):
            entry = Entry(names.new_id(self._clock(), os.urandom(3).hex(), ascii(name)), "")
        try:
            self._layout.move(where, name, "new", names.file_name(entry))
        except OSError as error:
            if error.errno != errno.ENOENT:
                log.error("%s/%a: is not named as a mail and cannot be: %s", where, name, error)
            return None
        log.info("%s/%a: now queued as %s", where, name, entry.id)
        return entry

    def _resolve(self, twins: list[tuple[str, str]]) -> list[Entry]:
        """Return the entries of files that share an id: one, when they are one file."""
        found: dict[int, list[tuple[bool, int, float, str, str]]] = {}
        linked: dict[int, bool] = {}
        for where, name in twins:
            entry = self.entry_of(where, name)
            if entry is None:
                continue
            where, name = names.folder(entry.state), names.file_name(entry)
            try:
                status = os.stat(name, dir_fd=self._layout[where], follow_symlinks=False)
            except OSError:
                continue
            rank = (where == "cur", entry.attempts, entry.due, where, name)
            found.setdefault(status.st_ino, []).append(rank)
            linked[status.st_ino] = status.st_nlink > 1
        entries = []
        for inode, ranks in found.items():
            ranks.sort()
            *earlier, (_, _, _, where, name) = ranks
            for _, _, _, old_where, old_name in earlier:
                if not linked[inode]:
                    continue  # one name after all: the mail moved while we looked
                log.warning("%s/%s: is %s/%s as well; removed", old_where, old_name, where, name)
                try:
                    os.unlink(old_name, dir_fd=self._layout[old_where])
                except OSError as error:
                    log.error("%s/%s: cannot be removed: %s", old_where, old_name, error)
            entry = names.parse(name, where)
            if entry is not None:
                entries.append(entry)
        return entries

    def _exists(self, where: str, entry: Entry) -> bool:
        try:
            os.stat(names.file_name(entry), dir_fd=self._layout[where], follow_symlinks=False)
        except OSError:
            return False
        return True


def _pop_twins(base: str, **listings: list[str]) -> Iterator[tuple[str, str]]:
    """Take the names that share an id off the listings."""
    for where, listing in listings.items():
        while listing and listing[-1].partition(":")[0] == base:
            yield where, listing.pop()
