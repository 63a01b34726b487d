"""From `stage` to `publish`: the directory tmp/.  What a crash leaves there, `sweep` sees to.

::

    stage            prepare               publish
    write, 0400  ->  0600, synced     ->   new/ (synced)
       |             1600: a witness         `-- disk full: 0700 in tmp/, a later call
       |             0400: alone                  (of anybody) takes it from there
       |                |
       | dead: removed  | dead: in doubt, held in cur/: see `doubts`
       |                | torn: removed

The mode says what was promised, so that one fsync makes content and promise durable.
A 0600 file whose size and checksum are not those of its name was being synced when the power
failed: `prepare` had not returned, so its transaction has not committed.
"""

from __future__ import annotations

import itertools
import logging
import os
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ..envelope import Envelope, format_block
from ..errors import SpoolError
from ..files import READ, write_all
from ..interfaces import Entry
from . import forks, names
from .durable import GroupSync, settle_files, spool_error
from .keys import Keys
from .layout import Layout
from .presence import Presence

log = logging.getLogger("cpsmailaccess_delivery.spool")

_STAGED: Final = 0o400
PREPARED: Final = 0o600
WITNESSED: Final = 0o1600  # prepared, and a witness will know; means nothing outside of tmp/
COMMITTED: Final = 0o700
_MAX_OPEN: Final = 256  # staged files kept open until prepared; the rest are opened again
_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


@dataclass(slots=True)
class _Staged:
    name: str
    serial: int
    fd: int  # -1: not kept open
    generation: int
    mode: int = _STAGED
    key: str = ""
    message_id: str = ""
    due: float = 0.0
    scrap: str = ""  # of its key, while that is taken


class Staging:
    """The mails that this process has staged.

    `clock`: seconds since the epoch.
    """

    def __init__(
        self, layout: Layout, presence: Presence, keys: Keys, clock: Callable[[], float]
    ) -> None:
        self._layout = layout
        self._keys = keys
        self._presence = presence
        self._clock = clock
        self._staged: dict[str, _Staged] = {}
        self._late: deque[tuple[Entry, _Staged]] = deque()  # committed, not published yet
        self._rubbish: deque[_Staged] = deque()  # discarded, not removed yet
        self._open = 0
        self._serial = itertools.count()
        self._settle = GroupSync(self._settle_all)
        self._sync_new = GroupSync[None](lambda _: os.fsync(self._layout["new"]))

    def scrap(self, entry_id: str) -> str:
        """Return a fresh name in tmp/ for a file that `sweep` removes when we die."""
        chance = os.urandom(6).hex()
        return names.scrap_name(entry_id, chance=chance, presence=self._presence.token)

    def stage(self, envelope: Envelope, message: bytes) -> Entry:
        """See `ISpool`."""
        self._layout.check_open()
        block = format_block(envelope)
        entry_id = names.new_id(self._clock(), os.urandom(3).hex(), envelope.message_id)
        entry = names.first_entry(entry_id, envelope)
        name = names.staged_name(
            entry,
            size=len(block) + len(message),
            check=zlib.crc32(message, zlib.crc32(block)),
            presence=self._presence.token,
        )
        tmp = self._layout["tmp"]
        try:
            fd = os.open(name, _WRITE, _STAGED, dir_fd=tmp)
            try:
                write_all(fd, block, message)
            except BaseException:
                os.close(fd)
                unlink(name, tmp)
                raise
        except OSError as error:
            raise spool_error("stage a mail", self._layout.path, error) from error
        if self._open < _MAX_OPEN:
            self._open += 1
        else:
            os.close(fd)
            fd = -1
        staged = _Staged(name, next(self._serial), fd, forks.generation())
        if envelope.key:
            staged.key, staged.message_id = envelope.key, envelope.message_id
            staged.due = entry.due
        self._staged[entry.id] = staged
        return entry

    def prepare(
        self, entries: Sequence[Entry], *, witnessed: bool = False, alone: bool = False
    ) -> None:
        """See `ISpool`."""
        mode = _STAGED if alone else WITNESSED if witnessed else PREPARED
        staged = [self._mine(entry) for entry in entries]
        if not staged:
            return
        try:
            for entry, each in zip(entries, staged, strict=True):
                if each.key:
                    each.scrap = self._keys.scrap(each.key, entry.id)
                    self._keys.take(
                        each.key,
                        scrap=each.scrap,
                        entry_id=entry.id,
                        message_id=each.message_id,
                        due=each.due,
                    )
            for each in staged:
                each.mode = mode
                if each.fd >= 0:
                    os.fchmod(each.fd, mode)
            self._settle(staged)
            for each in staged:
                os.stat(each.name, dir_fd=self._layout["tmp"], follow_symlinks=False)
        except FileNotFoundError:
            raise SpoolError(
                f"{self._layout.path}: somebody has removed a mail from tmp/ before its commit"
            ) from None
        except OSError as error:
            raise spool_error("make mails durable", self._layout.path, error) from error
        finally:
            for each in staged:
                self._shut(each)

    def publish(self, entries: Sequence[Entry]) -> None:
        """See `ISpool`."""
        self.retry()
        published = []
        for entry in entries:
            staged = self._staged.pop(entry.id, None)
            if staged is None or staged.generation != forks.generation():
                log.critical("%s: published, but not staged by this process", entry.id)
                continue
            self._shut(staged)
            published.append((entry, staged))
        self._publish(published)
        try:
            self._sync_new(None)
        except OSError as error:
            log.critical("new/ cannot be synced; a power loss may leave in doubt: %s", error)

    def discard(self, entries: Sequence[Entry]) -> None:
        """See `ISpool`."""
        self.retry()
        sync = False
        for entry in entries:
            staged = self._staged.get(entry.id)
            if staged is None or staged.generation != forks.generation():
                continue
            del self._staged[entry.id]
            self._shut(staged)
            self._remove(staged)
            sync = sync or staged.mode != _STAGED
        if sync:  # else a power loss brings it back, in doubt
            try:
                os.fsync(self._layout["tmp"])
            except OSError as error:
                log.error("tmp/ cannot be synced: discarded mails may come back held: %s", error)

    def close(self) -> None:
        """Remove what is staged and not prepared: its transaction cannot commit any more."""
        for entry_id, staged in list(self._staged.items()):
            if staged.mode != _STAGED:
                self._shut(staged)
            else:
                self.discard([Entry(entry_id, "")])

    def _settle_all(self, groups: list[list[_Staged]]) -> None:
        staged = sorted(itertools.chain(*groups), key=lambda each: each.serial)
        fds = [each.fd for each in staged if each.fd >= 0]
        tmp = self._layout["tmp"]
        if fds:
            settle_files(fds, tmp)
        for each in staged:
            if each.fd < 0:
                fd = os.open(each.name, READ, dir_fd=tmp)
                try:
                    os.fchmod(fd, each.mode)
                    os.fsync(fd)
                finally:
                    os.close(fd)
        if len(fds) < len(staged):
            os.fsync(tmp)

    def _mine(self, entry: Entry) -> _Staged:
        staged = self._staged.get(entry.id)
        if staged is None or staged.generation != forks.generation():
            raise SpoolError(
                f"{self._layout.path}: {entry.id} was not staged by this process: a transaction"
                " commits in the process that began it"
            )
        return staged

    def _shut(self, staged: _Staged) -> None:
        if staged.fd >= 0:
            fd, staged.fd = staged.fd, -1
            self._open -= 1
            try:
                os.close(fd)
            except OSError as error:
                log.warning("%s: the file was closed with an error: %s", staged.name, error)

    def _publish(self, mails: Sequence[tuple[Entry, _Staged]]) -> None:
        scraps = [staged.scrap for _, staged in mails if staged.scrap]
        confirmed = self._keys.confirm(scraps)  # first: a processor may soon deliver them
        for entry, staged in mails:
            safe = self.move_to_new(staged.name, entry)
            if not safe:
                try:
                    os.chmod(staged.name, COMMITTED, dir_fd=self._layout["tmp"])
                    safe = True  # the next sweep, of anybody, publishes it
                except FileNotFoundError:
                    safe = True  # another sweep was faster
                except OSError as error:
                    log.critical("%s: committed, but only in doubt on disk: %s", entry.id, error)
            if not safe or (staged.scrap and not confirmed):
                self._late.append((entry, staged))

    def _remove(self, staged: _Staged) -> None:
        removed = unlink(staged.name, self._layout["tmp"])
        if not removed or (staged.scrap and not self._keys.give_back(staged.scrap)):
            self._rubbish.append(staged)

    def retry(self) -> None:
        """Do what a fault of the disk has prevented: it may be over."""
        late = [self._late.popleft() for _ in range(len(self._late))]
        rubbish = [self._rubbish.popleft() for _ in range(len(self._rubbish))]
        self._publish([mail for mail in late if mail[1].generation == forks.generation()])
        for staged in rubbish:
            if staged.generation == forks.generation():
                self._remove(staged)

    def move_to_new(self, name: str, entry: Entry) -> bool:
        """Let a mail of tmp/ be seen; return whether this call did.  Never raises."""
        target = names.file_name(entry)
        tmp, new = self._layout["tmp"], self._layout["new"]
        try:
            there = _status(target, new)
            if there is not None:
                if os.path.samestat(os.stat(name, dir_fd=tmp, follow_symlinks=False), there):
                    os.unlink(name, dir_fd=tmp)  # half of a rename, after a power loss
                    return True
                log.critical("%s: a file of this name is in new/ already; not replaced", entry.id)
                return False
            os.rename(name, target, src_dir_fd=tmp, dst_dir_fd=new)
        except FileNotFoundError:
            return False  # another sweep was faster
        except OSError as error:
            log.critical("%s: cannot be moved to new/, stays in tmp/: %s", entry.id, error)
            return False
        return True


def _status(name: str, directory: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def unlink(name: str, directory: int) -> bool:
    """Remove a file of tmp/; return whether it is gone.  Never raises."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.error("tmp/%s cannot be removed: %s", name, error)
        return False
    return True
