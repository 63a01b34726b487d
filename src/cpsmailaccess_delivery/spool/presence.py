"""Which process a left-over file belongs to, and whether that process still lives.

Each process (and outbox) holds a lock on a file of its own, named by a random token, for
as long as it lives; the token stands in the names of what it stages.  A missing or unlocked file
means dead: no process ids (reused), no host names (changed), no clock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Final

from zope.interface import implementer

from ..errors import SpoolError
from ..files import make_private, open_inside, refuse_link
from ..interfaces import IPresence
from . import forks
from .durable import spool_error

log = logging.getLogger(__name__)

_NEW: Final = os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_FORGOTTEN: Final = 3600.0  # seconds: an unfinished file is only touched when this old


@dataclass(frozen=True, slots=True)
class Deliverer:
    """A living process that delivers: ``pid``; ``since``: seconds since the epoch.

    ``here``: this one.  ``host``: of another machine, where that can be.  The number is for
    people: other containers may have the same.
    """

    pid: int
    since: float
    here: bool
    host: str = ""


@implementer(IPresence)
class Presence:
    """This process, as others that share `directory` see it.

    After a fork the child is another process: it gets a token of its own when it first
    asks for one.  Raises `SpoolError`.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = os.fspath(directory)
        self._token = ""
        self._fd = -1
        self._generation = -1
        self._processors = 0  # that run here
        self._lock = threading.Lock()
        self._appear()

    @property
    def token(self) -> str:
        """16 hexadecimal digits, for names of files that this process stages.

        Another one after a fork, and after somebody has removed our file: without it we
        would be taken for dead.
        """
        if self._generation != forks.generation() or self._is_removed():
            self._appear()
        return self._token

    def is_alive(self, token: str) -> bool:
        """Tell whether the process with this token lives.  Never says dead of a living one."""
        try:
            fd = open_inside(self._directory, os.path.basename(token))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise spool_error("see which process lives", self._path(token), error) from error
        try:  # shared: two that ask do not take each other for the owner
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def delivers(self) -> None:
        """See `IPresence`."""
        with self._lock:
            try:
                _ = self.token  # after a fork there is another file
            except SpoolError as error:
                log.warning("cannot say that this process delivers: %s", error)
            self._processors += 1
            if self._processors == 1:
                self._say(str(os.getpid()))

    def rests(self) -> None:
        """See `IPresence`."""
        with self._lock:
            self._processors = max(self._processors - 1, 0)
            if not self._processors:
                self._say("")

    def deliverers(self) -> list[Deliverer]:
        """See `IPresence`."""
        found = []
        for name in os.listdir(self._directory):
            if name.startswith("."):
                continue
            try:
                with open(open_inside(self._directory, name), encoding="ascii") as file:
                    pid = int(file.read(20) or 0)
                    since = os.fstat(file.fileno()).st_mtime
                if pid and self.is_alive(name):
                    found.append(Deliverer(pid, since, name == self._token))
            except (OSError, ValueError, SpoolError):
                continue  # gone, not ours, or a link
        return sorted(found, key=lambda each: each.since)

    def _say(self, text: str) -> None:
        """Put a text into our file, whose lock stays where it is."""
        if self._fd < 0 or self._generation != forks.generation():
            return  # closed; or of our parent, whose processors did not come along
        try:
            fd = open_inside(self._directory, self._token, os.O_WRONLY | os.O_TRUNC)
            with open(fd, "w", encoding="ascii") as file:
                file.write(text)
        except (OSError, SpoolError) as error:
            log.warning("cannot say whether this process delivers: %s", error)

    def tidy(self) -> None:
        """Remove what dead processes left in the directory: missing means dead as well."""
        for name in os.listdir(self._directory):
            path = self._path(name)
            try:
                if name.startswith(".") and time.time() - os.lstat(path).st_mtime < _FORGOTTEN:
                    continue  # perhaps just being made, not locked yet
                if not self.is_alive(name):
                    os.unlink(path)
            except (OSError, SpoolError):
                continue  # gone, not ours to remove, or a link

    def close(self) -> None:
        """Leave: what is staged under the token may be swept from now on.  Twice is fine."""
        if self._fd >= 0 and self._generation == forks.generation():
            try:
                os.unlink(self._path(self._token))
            except OSError:
                pass  # unlocked is as good
            forks.drop(self._fd)
        self._fd = -1

    def _is_removed(self) -> bool:
        try:
            os.stat(self._path(self._token))
        except FileNotFoundError:
            return True
        except OSError:
            return False  # not known: what we staged so far is named by this one
        return False

    def _appear(self) -> None:
        token = os.urandom(8).hex()
        hidden, path = self._path("." + token), self._path(token)
        fd = -1
        try:
            make_private(os.path.dirname(self._directory) or ".")
            refuse_link(self._directory)
            make_private(self._directory)
            fd = os.open(hidden, _NEW, 0o600)
            forks.keep(fd)
            os.fchmod(fd, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(hidden, path)  # locked before anybody can see it
        except OSError as error:
            if fd >= 0:
                forks.drop(fd)
            raise spool_error("make a presence file", self._directory, error) from error
        if self._generation != forks.generation():
            self._processors = 0  # they stayed with the parent
        self._token, self._fd, self._generation = token, fd, forks.generation()
        if self._processors:
            self._say(str(os.getpid()))

    def _path(self, token: str) -> str:
        return os.path.join(self._directory, os.path.basename(token))
