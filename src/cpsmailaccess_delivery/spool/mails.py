"""One visible mail: reading it, claiming it, and every change of it.

A crash between two steps of a change leaves what the next reader puts right:

* side file written, mail not renamed: the side counts more attempts, and `claim` lets the
  name follow;
* mail removed, side file left: an orphan, swept after an hour.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Final, TypeVar

from ..envelope import Envelope, parse_block
from ..errors import InvalidEnvelope, NoSuchEntry, SpoolError
from ..files import READ, read_all
from ..interfaces import Entry, Record, State
from ..message import LARGEST
from . import forks, names
from .durable import spool_error
from .keys import Keys
from .layout import Layout
from .lease import Lease, is_locked, lock_file, unlock
from .outcomes import NOTHING, DamagedSide, Side, SideFiles

log = logging.getLogger("cpsmailaccess_delivery.spool")

T = TypeVar("T")

_MAX_BLOCK: Final = 8 * 1024 * 1024  # bytes of a private block, and some
_ORPHANED: Final = 3600.0  # seconds since a side file was written
_MAX_BURIED: Final = 256

#: What makes a file no mail, rather than the disk no disk: links, sockets ...
_NO_MAIL: Final = (errno.ELOOP, errno.ENXIO)
#: ... and other people's.  Of a file of ours it is said for a moment only.
_DENIED: Final = (errno.EACCES, errno.EPERM)


class Mails:
    """The files of new/ and cur/, by their entries, with their side files.

    `tell`: told of mails whose attempt is over: watches of this process may not see it.
    """

    def __init__(
        self,
        layout: Layout,
        sides: SideFiles,
        keys: Keys,
        tell: Callable[[Iterable[Entry]], None],
    ) -> None:
        self._layout = layout
        self._keys = keys
        self._sides = sides
        self._tell = tell
        self._orphans_due = 0.0  # by the monotonic clock
        self._removed = False  # whether a removal is not synced yet
        self._spent: deque[str] = deque()  # ids of those among them that had a side file
        self._freed: deque[str] = deque()  # names in tmp/ of mails whose keys are to be freed
        self._buried: deque[tuple[int, int]] = deque()  # open files without a name

    def read(self, entry: Entry) -> tuple[Record, bytes]:
        """Return a mail.  Raises FileNotFoundError, `InvalidEnvelope`, `SpoolError`."""
        name = names.file_name(entry)
        try:
            fd = os.open(name, READ, dir_fd=self._layout[names.folder(entry.state)])
            try:
                status = os.fstat(fd)
                data = self._content(fd, status)
            finally:
                os.close(fd)
        except FileNotFoundError:
            raise
        except OSError as error:
            if self._is_no_mail(entry, error):
                raise InvalidEnvelope(f"{entry.id}: cannot be read: {error.strerror}") from error
            raise spool_error(f"read {entry.id}", self._layout.path, error) from error
        envelope, offset = parse_block(data)
        try:
            side = self._side(entry) or NOTHING
        except DamagedSide as error:
            side = Side(reason=str(error))
        return Record(
            entry=entry,
            envelope=envelope,
            outcomes=side.outcomes,
            size=len(data) - offset,
            reason="" if entry.state is State.QUEUED else side.reason,
            cancel=side.cancel,
        ), data[offset:]

    def _side(self, entry: Entry) -> Side | None:
        """Return the side of a mail; None: it has none.  Raises `DamagedSide`.

        A mail is set aside when its name says so: after its side file; and put back before that.
        """
        side = self._sides.read(entry.id)
        return side if side is None or entry.state is State.HELD else side.restored()

    def lock(self, entry: Entry) -> tuple[int, os.stat_result] | None:
        """Lock a mail; None: gone, changed or locked by another."""
        try:
            return lock_file(names.file_name(entry), self._layout[names.folder(entry.state)])
        except OSError as error:
            if not self._is_no_mail(entry, error):
                raise spool_error(f"lease {entry.id}", self._layout.path, error) from error
            if entry.state is not State.HELD:
                self.hold(entry, f"the file cannot be opened: {error.strerror}")
            return None

    def leased(self, entry: Entry) -> bool:
        """See `ISpool.leased`.  Where nobody can tell now, it is: so it is looked at again."""
        try:
            return is_locked(names.file_name(entry), self._layout[names.folder(entry.state)])
        except OSError as error:
            return not self._is_no_mail(entry, error)

    def _is_no_mail(self, entry: Entry, error: OSError) -> bool:
        """Tell whether a mail cannot be opened for what it is, not for what the system is now."""
        if error.errno not in _DENIED:
            return error.errno in _NO_MAIL
        directory = self._layout[names.folder(entry.state)]
        try:
            status = os.stat(names.file_name(entry), dir_fd=directory, follow_symlinks=False)
        except OSError:
            return False
        return status.st_uid != os.geteuid() or not status.st_mode & stat.S_IRUSR

    def claim(self, entry: Entry) -> Lease | None:
        """See `ISpool.claim`."""
        locked = self.lock(entry)
        if locked is None:
            return None
        fd, status = locked
        try:
            lease = self._lease(fd, status, entry)
        except OSError as error:
            unlock(fd)
            raise spool_error(f"read {entry.id}", self._layout.path, error) from error
        except BaseException:
            unlock(fd)
            raise
        if lease is None:
            unlock(fd)
        return lease

    def _lease(self, fd: int, status: os.stat_result, entry: Entry) -> Lease | None:
        try:
            data = self._content(fd, status)
            envelope, offset = parse_block(data)
        except InvalidEnvelope as error:
            self.hold(entry, str(error))
            return None
        try:
            side = self._side(entry)
        except DamagedSide as error:
            log.error("%s is held: %s", entry.id, error)
            self.rename(entry, names.held(entry))
            return None
        if side is not None and side.attempts > entry.attempts:
            # Somebody died between the two steps of `record`: take the second.
            after = entry._replace(state=side.state, due=side.due, attempts=side.attempts)
            self.rename(entry, names.normal(after))
            return None
        return Lease(self, fd, entry, envelope=envelope, message=data[offset:], side=side)

    def message(self, fd: int, entry: Entry) -> bytes:
        """Return the message of an open mail."""
        try:
            os.lseek(fd, 0, os.SEEK_SET)
            data = self._content(fd, os.fstat(fd))
            return data[parse_block(data)[1] :]
        except OSError as error:
            raise spool_error(f"read {entry.id} again", self._layout.path, error) from error
        except InvalidEnvelope as error:
            raise SpoolError(f"{entry.id}: was changed by somebody: {error}") from error

    def _content(self, fd: int, status: os.stat_result) -> bytes:
        if not stat.S_ISREG(status.st_mode):
            raise InvalidEnvelope("this is no file: a mail is a regular file")
        if status.st_size > LARGEST + _MAX_BLOCK:
            raise InvalidEnvelope(f"{status.st_size:,} bytes: larger than any mail")
        return read_all(fd, status.st_size)

    # Changing: the caller holds the lock

    def remove(self, entry: Entry, *, has_side: bool) -> None:
        """Remove a mail; its side file goes after the next `sync`.

        So when a power loss brings the mail back, it comes back with its outcomes.
        """
        self._unlink(entry)
        self._note_removal(entry, has_side=has_side)

    def cancel(self, entry: Entry, envelope: Envelope, *, has_side: bool) -> None:
        """Remove a mail; the key of one that was never tried is free after the next `sync`.

        So when a power loss brings the mail back, its key is not another's.  Until then the mail
        is in tmp/: when we die, `sweep` knows from that whose key is to be freed.
        """
        keyed = envelope.key and not entry.attempts
        freed = self._keys.freed(envelope.key, entry.id) if keyed else ""
        if not (freed and self._move_away(entry, freed)):
            self._unlink(entry)
        if freed:
            self._freed.append(freed)
        self._note_removal(entry, has_side=has_side)

    def _move_away(self, entry: Entry, freed: str) -> bool:
        try:
            self._layout.move(names.folder(entry.state), names.file_name(entry), "tmp", freed)
        except OSError as error:  # on a full disk it can be removed all the same
            log.warning("%s: if we die now, its key is kept: %s", entry.id, error)
            return False
        return True

    def _unlink(self, entry: Entry) -> None:
        try:
            os.unlink(names.file_name(entry), dir_fd=self._layout[names.folder(entry.state)])
        except FileNotFoundError:
            log.warning("%s: somebody has removed it already", entry.id)
        except OSError as error:
            raise spool_error(f"remove {entry.id}", self._layout.path, error) from error

    def _note_removal(self, entry: Entry, *, has_side: bool) -> None:
        if has_side:
            self._spent.append(entry.id)
        self._removed = True  # last: see `sync`

    def bury(self, fd: int) -> None:
        """Close the file of a removed mail with the next `sync`.

        The close is what frees its blocks, and costs more than all the rest of a claim.
        """
        self._buried.append((forks.generation(), fd))
        if len(self._buried) > _MAX_BURIED:
            self._close_buried()  # nobody calls `sync`

    def record(self, before: Entry, after: Entry, side: Side) -> None:
        """Write what is known of a mail, then let its name follow."""
        self._sides.write(before.id, side)
        self.rename(before, after)
        self._tell([after])

    def hold(self, entry: Entry, reason: str, *, sync: bool = False) -> Entry:
        """Set a mail aside.  `sync`: at once against a power loss too."""
        after = names.held(entry)
        try:
            outcomes = (self._sides.read(entry.id) or NOTHING).outcomes
            side = Side(after.state, after.due, after.attempts, reason, outcomes)
            self._sides.write(entry.id, side, sync=sync)
        except DamagedSide as error:
            log.error("%s: %s", entry.id, error)  # left as it is: evidence
        log.warning("%s is held: %s", entry.id, reason)
        self.rename(entry, after)
        if sync:
            self._sync("cur")
        return after

    def set_aside(self, entry: Entry, side: Side) -> Entry:
        """Hold a mail for as long as its lease lasts, and longer when nobody ends that.

        Durable after `sync_names` only: when that fails, the mail is held all the same.
        """
        after = names.held(entry)
        self._sides.write(entry.id, side, sync=True)
        self.rename(entry, after)
        return after

    def sync_names(self) -> None:
        """Make what was set aside durable; no earlier name comes back when it is removed."""
        for name in ("cur", "new"):
            self._sync(name)

    def put_back(self, entry: Entry, before: Entry, side: Side | None) -> None:
        """Undo `set_aside`: name and side file are what they were."""
        self.rename(entry, before)
        self._sync("cur")  # first: held, it is recognised by its side file
        if side is None:
            self._sides.remove(entry.id)
        else:
            self._sides.write(entry.id, side, sync=before.state is State.HELD)

    def requeue(self, entry: Entry, *, unclear: bool = False) -> Entry:
        """Make a mail due now; see `ISpool.requeue`."""
        try:
            side = self._sides.read(entry.id) or NOTHING
        except DamagedSide:
            side = NOTHING  # the next claim holds it again, and says why
        if unclear and any(outcome.held for outcome in side.outcomes.values()):
            outcomes = {r: outcome._replace(held=False) for r, outcome in side.outcomes.items()}
            self._sides.write(entry.id, replace(side, outcomes=outcomes))
        attempts = max(entry.attempts, side.attempts)  # so that the side file is not newer
        after = names.normal(entry._replace(state=State.QUEUED, due=0.0, attempts=attempts))
        self.rename(entry, after)
        return after

    def rename(self, before: Entry, after: Entry) -> None:
        """Change the state of a mail."""
        if before == after:
            return
        old, new = names.folder(before.state), names.folder(after.state)
        try:
            self._layout.move(old, names.file_name(before), new, names.file_name(after))
        except FileNotFoundError:
            raise NoSuchEntry(f"{before.id}: somebody has removed it") from None
        except OSError as error:
            action = f"change {before.id} from {before.state} to {after.state}"
            raise spool_error(action, self._layout.path, error) from error

    def sync(self) -> None:
        """Make removals safe against a power loss, and forget what was kept in case of one."""
        self._close_buried()
        if not self._removed:
            return
        self._removed = False
        # All of them were removed before the flag was taken down.
        spent, freed = len(self._spent), len(self._freed)
        try:
            for name in ("new", "cur", "tmp"):
                self._sync(name)
        except SpoolError:
            self._removed = True
            raise
        for name in _take(self._freed, freed):
            if not self._keys.free(name):
                self._freed.append(name)
                self._removed = True
        for entry_id in _take(self._spent, spent):
            self._sides.remove(entry_id)

    def refused_before(self, when: float) -> Iterator[Entry]:
        """See `ISpool`: the side file was written when the mail was settled."""
        for name in self._layout.listing("cur"):
            entry = names.parse(name, "cur") if ":1,refused," in name else None
            if entry is None or entry.staged_at >= when:
                continue
            written = self._sides.written_at(entry.id)
            if written is not None and written < when:
                yield entry

    def remove_orphans(self) -> None:
        """Remove side files whose mail is gone, when they have not been written for long."""
        if time.monotonic() < self._orphans_due:
            return  # what is younger than that stays anyway, and to look lists all mails
        self._orphans_due = time.monotonic() + _ORPHANED
        orphans = set(self._layout.listing("outcomes"))
        if not orphans:
            return
        for where in ("new", "cur", "new"):  # a mail that moves is seen in one of them
            for name in self._layout.listing(where):
                if arriving := names.parse_arriving(name):
                    orphans.discard(arriving[1].id)
                orphans.discard(name.partition(":")[0].partition(",L=")[0])
        for entry_id in orphans:
            try:
                status = os.stat(entry_id, dir_fd=self._layout["outcomes"], follow_symlinks=False)
            except OSError:
                continue
            if time.time() - status.st_mtime > _ORPHANED:
                self._sides.remove(entry_id)

    def close(self) -> None:
        """Close what is open; not a `sync`."""
        self._close_buried()

    def _close_buried(self) -> None:
        buried = []
        while self._buried:
            try:
                generation, fd = self._buried.popleft()
            except IndexError:
                break  # another thread does it
            if generation == forks.generation():
                buried.append(fd)
        if buried:
            forks.drop_all(buried)

    def _sync(self, name: str) -> None:
        try:
            os.fsync(self._layout[name])
        except OSError as error:
            raise spool_error(f"make {name}/ durable", self._layout.path, error) from error


def _take(queue: deque[T], count: int) -> Iterator[T]:
    for _ in range(count):
        try:
            yield queue.popleft()
        except IndexError:
            return  # another thread does it
