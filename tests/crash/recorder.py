"""Every call of `os` that touches a directory: recorded, counted, and made to fail on demand.

The functions of `os` themselves are replaced, so that pathlib and whatever else the spool
goes through is seen as well.  What happens outside of the directory passes through.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cpsmailaccess_delivery
from cpsmailaccess_delivery.spool import durable

PACKAGE = os.path.dirname(cpsmailaccess_delivery.__file__)

ROOT = 0  # the inode of the directory that is watched

#: The site of what no code of ours does.
BY_HAND = "by hand"

#: What takes a path (and dir_fd), and what takes a descriptor.
BY_PATH = ("open", "mkdir", "rmdir", "unlink", "chmod", "utime", "stat", "lstat", "access")
BY_TWO = ("rename", "replace", "link")
BY_FD = ("write", "writev", "pwrite", "fchmod", "fsync", "fstat", "read", "posix_fadvise", "close")
BY_EITHER = ("listdir",)

#: A call that a fault stops before it has changed anything; `close` closes all the same.
Fault = Callable[["Call"], OSError | None]


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Call(NamedTuple):
    """One call: its number, its name, what it is about, and where in the package it is.

    An open for writing is called ``create``.
    """

    number: int
    name: str
    what: str
    site: str

    def __str__(self) -> str:
        return f"{self.name} {self.what} ({self.site})"


class Op(NamedTuple):
    """One change of the file system, or a sync.

    ``kind``: new, data, mode, time, link, unlink, rename, sync, syncfs; or mark: the world
    has moved on, ``args`` says how.
    """

    kind: str
    args: tuple[Any, ...]
    site: str = ""


class Recorder:
    """Use `recording` as a context; then `ops` is what happened.

    It knows descriptors that were opened since.  `mirror`: follow what is in the files, too;
    the directory must be empty then.
    """

    def __init__(self, root: Path, *, mirror: bool = True) -> None:
        self._mirror = mirror
        self.root = os.fspath(root)
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.fault: Fault | None = None
        self._real: dict[str, Any] = {}
        self._lock = threading.RLock()
        self._dirs: dict[int, dict[str, int]] = {ROOT: {}}
        self._data: dict[int, bytes] = {}
        self._paths: dict[int, str] = {}  # of open descriptors
        self._inodes: dict[int, int] = {}  # of open descriptors
        self._positions: dict[int, int] = {}
        self._next = ROOT

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        self._real = {name: getattr(os, name) for name in (*BY_PATH, *BY_TWO, *BY_FD, *BY_EITHER)}
        syncfs = durable._syncfs
        self._real["syncfs"] = syncfs
        for name in self._real:
            if name != "syncfs":
                setattr(os, name, self._replacement(name))
        if syncfs is not None:
            durable._syncfs = self._replacement("syncfs")
        try:
            yield self
        finally:
            for name, function in self._real.items():
                if name != "syncfs":
                    setattr(os, name, function)
            durable._syncfs = syncfs

    def mark(self, *args: Any) -> None:
        """Note that the world has moved on."""
        self.ops.append(Op("mark", args))

    def _replacement(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(*args: Any, **kw: Any) -> Any:
            with self._lock:
                what = self._what(name, args, kw)
                if what is None:
                    return real(*args, **kw)
                site = _site()
                known = "create" if name == "open" and args[1] & _WRITES else name
                this = Call(len(self.calls), known, what, site)
                self.calls.append(this)
                error = self.fault(this) if self.fault is not None else None
                if error is not None:
                    if name == "access":
                        return False  # it never raises
                    if name == "close":
                        self._close(*args)
                        real(*args)
                    raise error
                if name == "close":
                    self._close(*args)
                result = real(*args, **kw)
                handle = getattr(self, f"_{name}", None)
                if handle is not None and name != "close" and (self._mirror or name == "open"):
                    handle(result, site, *args, **kw)
                return result

        return call

    # What a call is about

    def _what(self, name: str, args: tuple[Any, ...], kw: dict[str, Any]) -> str | None:
        if name == "syncfs" or name in BY_FD or (args and isinstance(args[0], int)):
            return self._paths.get(args[0])
        if name in BY_TWO:
            old = self._path(args[0], kw.get("src_dir_fd"))
            new = self._path(args[1], kw.get("dst_dir_fd"))
            return f"{old} {new}" if old is not None and new is not None else None
        return self._path(args[0], kw.get("dir_fd"))

    def _path(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return a path relative to the root; None: outside."""
        text = os.fsdecode(path)
        if dir_fd is not None and not text.startswith("/"):
            above = self._paths.get(dir_fd)
            if above is None:
                return None
            return above if text == "." else f"{above}/{text}".lstrip("/")
        if text == self.root:
            return ""
        if not text.startswith(self.root + "/"):
            return None
        return text[len(self.root) + 1 :]

    def _find(self, path: str) -> tuple[int, str]:
        """Return the inode of the directory above, and the name."""
        above, _, name = path.rpartition("/")
        inode = ROOT
        for part in above.split("/") if above else ():
            inode = self._dirs[inode][part]
        return inode, name

    def _inode(self, path: str) -> int:
        if not path:
            return ROOT
        directory, name = self._find(path)
        return self._dirs[directory][name]

    # What it changed

    def _add(self, kind: str, *args: Any, site: str = "") -> None:
        self.ops.append(Op(kind, args, site))

    def _enter(self, path: str, inode: int) -> None:
        directory, name = self._find(path)
        self._dirs[directory][name] = inode
        self._add("link", directory, name, inode)

    def _create(self, path: str, *, is_dir: bool) -> int:
        self._next += 1
        inode = self._next
        mode = self._real["stat"](os.path.join(self.root, path)).st_mode & 0o7777
        if is_dir:
            self._dirs[inode] = {}
        else:
            self._data[inode] = b""
        self._add("new", inode, is_dir, mode)
        self._enter(path, inode)
        return inode

    def _open(
        self, fd: int, site: str, path: Any, flags: int, mode: int = 0o777, *, dir_fd: Any = None
    ) -> None:
        relative = self._path(path, dir_fd)
        assert relative is not None
        self._paths[fd] = relative
        if not self._mirror:
            return
        try:
            inode = self._inode(relative)
        except KeyError:
            inode = self._create(relative, is_dir=False)
        self._inodes[fd] = inode
        self._positions[fd] = 0

    def _close(self, fd: int) -> None:
        for known in (self._paths, self._inodes, self._positions):
            known.pop(fd, None)

    def _mkdir(self, _: None, site: str, path: Any, mode: int = 0o777, *, dir_fd: Any = None):
        self._create(self._path(path, dir_fd) or "", is_dir=True)

    def _unlink(self, _: None, site: str, path: Any, *, dir_fd: Any = None) -> None:
        directory, name = self._find(self._path(path, dir_fd) or "")
        del self._dirs[directory][name]
        self._add("unlink", directory, name)

    def _rename(
        self,
        _: None,
        site: str,
        old: Any,
        new: Any,
        *,
        src_dir_fd: Any = None,
        dst_dir_fd: Any = None,
    ) -> None:
        old_dir, old_name = self._find(self._path(old, src_dir_fd) or "")
        new_dir, new_name = self._find(self._path(new, dst_dir_fd) or "")
        self._dirs[new_dir][new_name] = self._dirs[old_dir].pop(old_name)
        self._add("rename", old_dir, old_name, new_dir, new_name)

    _replace = _rename

    def _link(
        self,
        _: None,
        site: str,
        old: Any,
        new: Any,
        *,
        src_dir_fd: Any = None,
        dst_dir_fd: Any = None,
    ) -> None:
        self._enter(
            self._path(new, dst_dir_fd) or "", self._inode(self._path(old, src_dir_fd) or "")
        )

    def _written(self, fd: int, data: bytes, at: int) -> None:
        inode = self._inodes[fd]
        before = self._data[inode]
        self._data[inode] = before[:at].ljust(at, b"\0") + data + before[at + len(data) :]
        self._add("data", inode, self._data[inode])

    def _write(self, done: int, site: str, fd: int, data: Any) -> None:
        self._written(fd, bytes(data)[:done], self._positions[fd])
        self._positions[fd] += done

    def _writev(self, done: int, site: str, fd: int, parts: Any) -> None:
        self._write(done, site, fd, b"".join(bytes(part) for part in parts))

    def _pwrite(self, done: int, site: str, fd: int, data: Any, offset: int) -> None:
        self._written(fd, bytes(data)[:done], offset)

    def _fchmod(self, _: None, site: str, fd: int, mode: int) -> None:
        self._add("mode", self._inodes[fd], mode)

    def _chmod(self, _: None, site: str, path: Any, mode: int, *, dir_fd: Any = None) -> None:
        self._add("mode", self._inode(self._path(path, dir_fd) or ""), mode)

    def _utime(
        self,
        _: None,
        site: str,
        path: Any,
        times: Any = None,
        *,
        ns: Any = None,
        dir_fd: Any = None,
    ) -> None:
        when = ns[1] / 1e9 if ns else times[1]
        self._add("time", self._inode(self._path(path, dir_fd) or ""), when)

    def _fsync(self, _: None, site: str, fd: int) -> None:
        self._add("sync", self._inodes[fd], site=f"{site}: {_kind(self._paths[fd])}")

    def _syncfs(self, _: None, site: str, fd: int) -> None:
        self._add("syncfs", site=f"{site}: everything")


def _kind(path: str) -> str:
    """Return what is synced, without the names of mails."""
    if path in ("", "box"):
        return "the directory above"
    name = path.removeprefix("box/")
    return f"{name}/" if "/" not in name and "." not in name else "the file"


def _site() -> str:
    """Return the function of the package that calls, and the one that called that."""
    found: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(found) < 2:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            name = os.path.relpath(file, PACKAGE).removesuffix(".py").replace("/", ".")
            found.append(f"{name}.{frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)


@contextmanager
def in_memory() -> Iterator[Path]:
    """Give an empty directory, in memory where there is such a file system."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)
