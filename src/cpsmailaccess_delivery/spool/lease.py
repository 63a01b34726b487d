"""The claim of one processor on one mail: a lock on its file that dies with the process.

::

    open -> lock -> still this file under this name? -> read -> ... -> settle | release
                 \\-- locked: leased elsewhere       \\-- no: gone or changed

The name is looked up again after the lock, because the mail may have been settled between
open and lock.  There is no time-out, so no clock to trust.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from zope.interface import implementer

from ..envelope import Envelope
from ..errors import NoSuchEntry, SpoolError
from ..files import READ
from ..interfaces import Entry, ILease, Outcome, Settlement, State
from . import forks, names
from .outcomes import NOTHING, Side, side_aside

if TYPE_CHECKING:
    from .mails import Mails

log = logging.getLogger("cpsmailaccess_delivery.spool")

_GONE: Final = (State.ACCEPTED, State.CANCELLED)
_SETTLED: Final = (State.DEFERRED, State.HELD, State.UNCLEAR, State.REFUSED)


def lock_file(name: str, directory: int) -> tuple[int, os.stat_result] | None:
    """Open and lock a file by its name; None: gone, changed or locked.  Raises OSError."""
    try:
        fd = os.open(name, READ, dir_fd=directory)
    except FileNotFoundError:
        return None
    forks.keep(fd)
    try:
        if _lock(fd):
            status = os.fstat(fd)
            now = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if status.st_ino == now.st_ino and status.st_dev == now.st_dev:
                return fd, status
    except FileNotFoundError:
        pass
    except BaseException:
        unlock(fd)
        raise
    unlock(fd)
    return None


def unlock(fd: int) -> None:
    """Unlock for children too that a fork has just made, and close."""
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        forks.drop(fd)


def is_locked(name: str, directory: int) -> bool:
    """Tell whether somebody holds the lock of a file.  Raises OSError."""
    try:
        fd = os.open(name, READ, dir_fd=directory)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _lock(fd: int) -> bool:
    for _ in range(1000):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            try:  # shared with others: only an `is_locked` is in the way, for an instant
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            os.sched_yield()
        else:
            return True
    return False


@implementer(ILease)
class Lease:
    """See `ILease`.  When `settle` raises, the lease is still held: settle again, or release."""

    __slots__ = (
        "_before",
        "_fd",
        "_generation",
        "_mails",
        "_side",
        "entry",
        "envelope",
        "message",
        "outcomes",
    )

    def __init__(
        self,
        mails: Mails,
        fd: int,
        entry: Entry,
        *,
        envelope: Envelope,
        message: bytes,
        side: Side | None,
    ) -> None:
        self._mails = mails
        self._fd = fd
        self._generation = forks.generation()
        self._side = side
        self._before: Entry | None = None  # the entry as it was before `set_aside`
        self.entry = entry
        self.envelope = envelope
        self.message = message
        self.outcomes: Mapping[str, Outcome] = side.outcomes if side else {}

    def __repr__(self) -> str:
        return f"<Lease {self.entry.id}{'' if self._fd >= 0 else ' ended'}>"

    def settle(self, settlement: Settlement) -> Entry | None:
        """See `ILease`."""
        if self._fd < 0 or self._generation != forks.generation():
            raise SpoolError(f"{self.entry.id}: the lease has ended, or is another process's")
        if settlement.state in _GONE or not settlement.keep:
            has_side = self._side is not None or self._before is not None
            if settlement.state is State.CANCELLED:
                self._mails.cancel(self.entry, self.envelope, has_side=has_side)
            else:
                self._mails.remove(self.entry, has_side=has_side)
            fd, self._fd = self._fd, -1
            self._mails.bury(fd)
            return None
        if settlement.state not in _SETTLED:
            raise SpoolError(f"{self.entry.id}: a mail is not settled as {settlement.state}")
        due, attempts = settlement.due, settlement.attempts
        after = names.normal(
            self.entry._replace(state=settlement.state, due=due, attempts=attempts)
        )
        outcomes = {**self.outcomes, **settlement.outcomes}
        side = Side(after.state, after.due, after.attempts, settlement.reason, outcomes)
        try:
            self._mails.record(self.entry, after, side)
        except NoSuchEntry as error:
            log.warning("%s; nothing is left to be settled", error)
            self.leave()
            return None
        self.leave()
        return after

    def forget_message(self) -> None:
        """See `ILease`."""
        self.message = b""

    def read_message(self) -> bytes:
        """See `ILease`."""
        if self._fd < 0 or self._generation != forks.generation():
            raise SpoolError(f"{self.entry.id}: the lease has ended, or is another process's")
        return self.message or self._mails.message(self._fd, self.entry)

    def set_aside(self, reason: str, token: str = "") -> None:
        """See `ILease`."""
        if self._fd < 0 or self._generation != forks.generation():
            raise SpoolError(f"{self.entry.id}: the lease has ended, or is another process's")
        self._before = before = self.entry
        side = side_aside(before, self._side or NOTHING, reason, token)
        self.entry = self._mails.set_aside(before, side)
        self._mails.sync_names()

    def release(self) -> None:
        """See `ILease`."""
        if self._fd < 0 or self._generation != forks.generation():
            return
        if self._before is not None:
            try:
                self._mails.put_back(self.entry, self._before, self._side)
            except SpoolError as error:
                log.error("%s stays held: %s", self.entry.id, error)
        self.leave()

    def leave(self) -> None:
        """See `ILease`."""
        if self._fd >= 0 and self._generation == forks.generation():
            fd, self._fd = self._fd, -1
            unlock(fd)

    def __del__(self) -> None:
        self.leave()  # a mail that was set aside stays so: nobody has decided
