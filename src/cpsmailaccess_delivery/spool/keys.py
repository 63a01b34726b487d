"""Idempotency keys: which have been committed, and by which mail.  The directory keys/.

::

    take                     confirm                prune
    tmp/ID,K=DIGEST,P=...    (removed)
    keys/DIGEST  (a link) -> keys/DIGEST   ...  ->  30 days later: removed
       |
       +- give_back; or its process is dead, and its mail was never prepared: removed
    free    its mail was cancelled before it was tried: that is tmp/ID,X=DIGEST,P=... meanwhile

One of those who link the same name wins.  While the file has its other name in tmp/, the
transaction has not ended.  `prepare` takes the key before the mail is durable, and `publish`
confirms it before the mail is visible: so whatever crashes, a mail that may be delivered
has its key, and a key without a mail is free again after the next sweep.  In doubt they
are together: the key is taken while the mail is held, and free when that is cancelled.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from ..errors import KeyTaken, SpoolError
from ..files import READ, read_all, write_new
from ..interfaces import KeyNote
from . import names
from .durable import settle_files, spool_error
from .layout import Layout
from .presence import Presence

log = logging.getLogger("cpsmailaccess_delivery.spool")

KEPT: Final = 30 * 86400.0  # seconds: as long as the journal's events
_PRUNE_EVERY: Final = 86400.0
_PRUNED: Final = ".pruned"
_DIGEST: Final = re.compile(r"[0-9a-f]{32}")
_WRITE: Final = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Keys:
    """The keys of a spool.  `sweep`: tidies what dead processes left."""

    def __init__(self, layout: Layout, presence: Presence, sweep: Callable[[], object]) -> None:
        self._layout = layout
        self._presence = presence
        self._sweep = sweep

    def holder(self, key: str) -> KeyNote | None:
        """Return what is known of the mail that was committed, or is in doubt, with a key.

        None: nobody has it, or a transaction that has not ended.  Raises `SpoolError`.
        """
        digest = digest_of(key)
        try:
            found = self._look(digest)
            if found is not None and found.pending:
                if self._presence.is_alive(found.presence):
                    return None
                self._sweep()
                found = self._look(digest)
        except OSError as error:
            raise spool_error("look up an idempotency key", self._layout.path, error) from error
        return None if found is None or found.pending else found.note(digest)

    def scrap(self, key: str, entry_id: str) -> str:
        """Return the name in tmp/ of a key that a mail of this process takes."""
        return names.key_name(entry_id, digest=digest_of(key), presence=self._presence.token)

    def take(self, key: str, *, scrap: str, entry_id: str, message_id: str, due: float) -> None:
        """Take a key for a mail of a transaction.  `scrap`: see there.

        Durable.  `due`: seconds since the epoch; it is kept longer when that is later.
        Raises `KeyTaken`, OSError.
        """
        digest, presence = digest_of(key), names.presence_of(scrap)
        tmp, keys = self._layout["tmp"], self._layout["keys"]
        content = f"{entry_id}\n{presence}\n{message_id}\n".encode()
        write_new(scrap, content, dir_fd=tmp)
        try:
            now = time.time()
            if due > now:
                os.utime(scrap, (now, due), dir_fd=tmp)
            self._settle(scrap)  # first: a key without its scrap is one that was confirmed
            for last in (False, True):
                try:
                    os.link(scrap, digest, src_dir_fd=tmp, dst_dir_fd=keys)
                    break
                except FileExistsError:
                    if last or not self._abandoned(digest):
                        raise KeyTaken(
                            f"idempotency_key={key!r}: another transaction has committed it, or"
                            " is about to; begin again, and send returns its Message-Id"
                        ) from None
                    self._sweep()
            os.fsync(keys)
        except BaseException:
            self.give_back(scrap)
            raise

    def confirm(self, scraps: Sequence[str]) -> bool:
        """Keep keys that were taken: their mails are committed, or in doubt.  Never raises.

        Durable: when a scrap comes back after its mail has been delivered, the next sweep
        frees the key.  Returns whether all is done; if not, try again.
        """
        if not scraps:
            return True
        tmp = self._layout["tmp"]
        removed = [_unlink("tmp", scrap, tmp) for scrap in scraps]
        return _sync("tmp", tmp) and all(removed)

    def give_back(self, scrap: str) -> bool:
        """Free a key that was taken.  Never raises.  Returns whether it is; if not, try again."""
        digest = names.key_of(scrap)[1]
        tmp, keys = self._layout["tmp"], self._layout["keys"]
        try:
            ours = os.stat(scrap, dir_fd=tmp, follow_symlinks=False)
            there = os.stat(digest, dir_fd=keys, follow_symlinks=False)
            taken = os.path.samestat(ours, there)
            if taken and not (_unlink("keys", digest, keys) and _sync("keys", keys)):
                return False  # the scrap stays: without it the key would seem confirmed
        except FileNotFoundError:
            pass  # it was not taken, after all
        except OSError as error:
            log.error("keys/%s cannot be freed: %s", digest, error)
            return False
        return _unlink("tmp", scrap, tmp)

    def recover(self, scrap: str) -> str | None:
        """Take over what a dead process left; the name it has now, or None: too late."""
        entry_id, digest = names.key_of(scrap)
        ours = names.key_name(entry_id, digest=digest, presence=self._presence.token)
        try:
            self._layout.move("tmp", scrap, "tmp", ours)
        except OSError:
            return None  # another sweep was faster
        return ours

    def freed(self, key: str, entry_id: str) -> str:
        """Return the name in tmp/ of a mail that is cancelled, until `free`."""
        return names.freed_name(entry_id, digest=digest_of(key), presence=self._presence.token)

    def free(self, freed: str) -> bool:
        """Free the key of a mail that was cancelled before it was tried.  Never raises.

        `freed`: see there; removed at last.  Returns whether all is done; if not, try again.
        """
        entry_id, digest = names.freed_of(freed)
        try:
            found = self._look(digest)
        except OSError as error:
            log.error("keys/%s cannot be read: %s", digest, error)
            return False
        if found is not None and found.entry_id == entry_id:
            keys = self._layout["keys"]
            if not (_unlink("keys", digest, keys) and _sync("keys", keys)):
                return False
        return _unlink("tmp", freed, self._layout["tmp"])

    def prune(self) -> None:
        """Forget old keys; about once a day.  Never raises."""
        keys = self._layout["keys"]
        try:
            fd = os.open(_PRUNED, _WRITE, 0o600, dir_fd=keys)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                now, status = time.time(), os.fstat(fd)
                if status.st_size and now - status.st_mtime < _PRUNE_EVERY:
                    return
                for name in self._layout.listing("keys"):
                    there = os.stat(name, dir_fd=keys, follow_symlinks=False)
                    if name != _PRUNED and there.st_nlink == 1 and now - there.st_mtime > KEPT:
                        os.unlink(name, dir_fd=keys)
                os.pwrite(fd, b"pruned\n", 0)
            finally:
                os.close(fd)
        except BlockingIOError:
            pass  # somebody else does it
        except (OSError, SpoolError) as error:
            log.error("keys/ cannot be pruned; trying again tomorrow: %s", error)

    def notes(self) -> Iterator[KeyNote]:
        """See `ITransit.key_notes`."""
        for name in self._layout.listing("keys"):
            try:
                found = self._look(name) if _DIGEST.fullmatch(name) else None
            except OSError as error:
                raise spool_error(f"read keys/{name}", self._layout.path, error) from error
            if found is not None and not found.pending:
                yield found.note(name)

    def keep(self, notes: Iterable[KeyNote]) -> None:
        """See `ITransit`."""
        tmp, keys = self._layout["tmp"], self._layout["keys"]
        there = set(self._layout.listing("keys"))
        for note in notes:
            if note.digest in there:
                continue
            # Without a digest in its name: a scrap that means nothing until it is linked.
            scrap = names.scrap_name(
                note.entry, chance=secrets.token_hex(4), presence=self._presence.token
            )
            content = f"{note.entry}\n{self._presence.token}\n{note.message_id}\n".encode()
            try:
                write_new(scrap, content, sync=True, dir_fd=tmp)
                try:
                    since = note.until - KEPT
                    os.utime(scrap, (since, since), dir_fd=tmp)
                    os.link(scrap, note.digest, src_dir_fd=tmp, dst_dir_fd=keys)
                except FileExistsError:
                    pass  # taken meanwhile
                finally:
                    _unlink("tmp", scrap, tmp)
            except OSError as error:
                raise spool_error("keep an idempotency key", self._layout.path, error) from error
        if not _sync("keys", keys):
            raise SpoolError(f"{self._layout.path}: keys/ cannot be synced: see to the disk")

    def _settle(self, scrap: str) -> None:
        """Make a scrap durable, with its name."""
        tmp = self._layout["tmp"]
        fd = os.open(scrap, READ, dir_fd=tmp)
        try:
            settle_files([fd], tmp)
        finally:
            os.close(fd)

    def _abandoned(self, digest: str) -> bool:
        found = self._look(digest)
        if found is None:
            return True  # given back meanwhile
        return found.pending and not self._presence.is_alive(found.presence)

    def _look(self, digest: str) -> _Taken | None:
        try:
            fd = os.open(digest, READ, dir_fd=self._layout["keys"])
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(fd)
            text = read_all(fd, status.st_size).decode("utf-8", "replace")
        finally:
            os.close(fd)
        entry_id, presence, message_id = (*text.split("\n"), "", "", "")[:3]
        pending = status.st_nlink > 1
        return _Taken(entry_id, presence, message_id, status.st_mtime, pending=pending)


class _Taken:
    __slots__ = ("entry_id", "message_id", "pending", "presence", "since")

    def __init__(
        self, entry_id: str, presence: str, message_id: str, since: float, *, pending: bool
    ) -> None:
        self.entry_id = entry_id
        self.presence = presence
        self.message_id = message_id
        self.since = since
        self.pending = pending

    def note(self, digest: str) -> KeyNote:
        return KeyNote(digest, self.entry_id, self.message_id, self.since + KEPT)


def digest_of(key: str) -> str:
    """Return what stands for a key in names and tables."""
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _sync(where: str, directory: int) -> bool:
    try:
        os.fsync(directory)
    except OSError as error:
        log.error("%s/ cannot be synced; a power loss may change who has a key: %s", where, error)
        return False
    return True


def _unlink(where: str, name: str, directory: int) -> bool:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.error("%s/%s cannot be removed: %s", where, name, error)
        return False
    return True
