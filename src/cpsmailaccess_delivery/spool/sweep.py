"""What dead processes left in tmp/: removed, held in doubt, or published after all.

The mode of a file says what was promised of it, see `staging`; the mails that it holds in doubt
are `doubts`.
"""

from __future__ import annotations

import logging
import os
import stat
import time
import zlib
from collections.abc import Callable
from typing import Final

from ..errors import SpoolError
from ..files import READ, read_all
from ..interfaces import Entry, SweepReport
from . import names
from .keys import Keys
from .layout import Layout
from .presence import Presence
from .staging import COMMITTED, PREPARED, WITNESSED, Staging, unlink

log = logging.getLogger("cpsmailaccess_delivery.spool")

#: Seconds: the rule of Maildir for files in tmp/ that are nobody's.
_ABANDONED: Final = 36 * 3600.0


class Sweep:
    """One look at tmp/.

    `hold`: moves a file of tmp/ to the held ones; whether it did.  It is told whether a witness
    knows what became of the mail's transaction.
    """

    def __init__(
        self,
        layout: Layout,
        presence: Presence,
        keys: Keys,
        staging: Staging,
        hold: Callable[[str, Entry, bool], bool],
    ) -> None:
        self._layout = layout
        self._presence = presence
        self._keys = keys
        self._staging = staging
        self._hold = hold
        self._tmp = layout["tmp"]
        self._removed: list[str] = []
        self._held: list[str] = []
        self._alive: dict[str, bool] = {}
        self._visible: set[str] | None = None  # a listing of all ids, when it is needed
        self._scraps: dict[str, str] = {}  # of keys, by id; they stand before their mail

    def run(self) -> SweepReport:
        """See `ISpool.sweep`."""
        self._staging.retry()
        for name in sorted(self._layout.listing("tmp")):
            self._see_to(name)
        self._recover_keys()
        self._presence.tidy()
        return SweepReport(tuple(self._removed), tuple(self._held))

    def _see_to(self, name: str) -> None:
        token = names.presence_of(name)
        if token is None:
            self._remove_abandoned(name)
            return
        try:
            mode = stat.S_IMODE(os.stat(name, dir_fd=self._tmp, follow_symlinks=False).st_mode)
        except OSError:
            return  # published, discarded or swept meanwhile
        found = names.parse_staged(name)
        if found and mode == COMMITTED:
            self._publish_late(name, found[0])
            return
        if token not in self._alive:
            ours = token == self._presence.token
            self._alive[token] = ours or _may_live(self._presence, token)
        if self._alive[token]:
            return
        entry_id, _ = names.key_of(name)
        cancelled, _ = names.freed_of(name)
        if entry_id:
            self._scraps[entry_id] = name
        elif cancelled:
            self._free(cancelled, name)
        elif found and mode in (PREPARED, WITNESSED):
            self._prepared(name, *found, witnessed=mode == WITNESSED)
        else:
            unlink(name, self._tmp)
            if found:
                self._removed.append(found[0].id)

    def _prepared(self, name: str, entry: Entry, size: int, check: int, *, witnessed: bool) -> None:
        if self._visible is None:
            self._visible = self._ids()
        if entry.id in self._visible:
            unlink(name, self._tmp)  # published: only this name came back
        elif self._whole(name, size=size, check=check):
            if entry.id in self._scraps:  # first: it may soon be delivered
                self._keys.confirm([self._scraps.pop(entry.id)])
            if self._hold(name, entry, witnessed):
                self._held.append(entry.id)
        else:
            unlink(name, self._tmp)
            self._removed.append(entry.id)

    def _publish_late(self, name: str, entry: Entry) -> None:
        if self._staging.move_to_new(name, entry):
            try:
                os.chmod(names.file_name(entry), PREPARED, dir_fd=self._layout["new"])
            except OSError:
                pass  # delivered already

    def _free(self, cancelled: str, name: str) -> None:
        """Free the key of a mail that was removed when somebody died."""
        if cancelled in self._ids():
            unlink(name, self._tmp)  # a power loss has brought it back
        else:
            self._keys.free(name)

    def _recover_keys(self) -> None:
        """Free the keys of mails that were not prepared."""
        visible = self._ids() if self._scraps else set()
        for entry_id, name in self._scraps.items():
            scrap = self._keys.recover(name)
            if scrap is None:
                continue
            if entry_id in visible:
                self._keys.confirm([scrap])
            else:
                self._keys.give_back(scrap)

    def _ids(self) -> set[str]:
        """Return the ids of all visible mails; cur/ between two looks at new/: mails move."""
        return {
            name.partition(":")[0].partition(",L=")[0]
            for where in ("new", "cur", "new")
            for name in self._layout.listing(where)
        }

    def _whole(self, name: str, *, size: int, check: int) -> bool:
        try:
            fd = os.open(name, READ, dir_fd=self._tmp)
            try:
                data = read_all(fd, os.fstat(fd).st_size)
            finally:
                os.close(fd)
        except OSError as error:
            log.error("tmp/%s cannot be read: %s", name, error)
            return True  # unknown: held, never removed
        return len(data) == size and zlib.crc32(data) == check

    def _remove_abandoned(self, name: str) -> None:
        try:
            status = os.stat(name, dir_fd=self._tmp, follow_symlinks=False)
        except OSError:
            return
        if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > _ABANDONED:
            unlink(name, self._tmp)


def left_overs(layout: Layout, presence: Presence) -> list[str]:
    """See `ISpool`: files of tmp/ that belong to dead processes."""
    owners = {name: names.presence_of(name) for name in layout.listing("tmp")}
    dead = {token for token in owners.values() if token and not _may_live(presence, token)}
    return [name for name, token in owners.items() if token in dead]


def _may_live(presence: Presence, token: str) -> bool:
    try:
        return presence.is_alive(token)
    except SpoolError as error:
        log.error("%s; what this process has staged is left alone", error)
        return True
