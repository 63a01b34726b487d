"""What a power loss may leave of recorded calls, by four models of a file system.

==========  ==========================================================================
model       after a power loss
==========  ==========================================================================
posix       Only what was synced is certain: content and mode by fsync of the file, names
            by fsync of their directory.  Of the rest any part may be there, in any order:
            of every name and of every mode an older value, of content an older one, a
            prefix, zeros of the new length, or both.  A rename is in force, not yet, or
            half: both names.
unordered   The same, and half of a rename may be the other half: neither name.  ext2,
            ext4 without a journal.
journal     Names and modes are as they were at one moment, not before the last sync of
            whatever it be.  Content as above.  ext4 and xfs.
btrfs       As posix, but fsync of a file makes its names durable as well.
==========  ==========================================================================
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recorder import ROOT, Op

MODELS = ("posix", "unordered", "journal", "btrfs")

Key = tuple[int, str]  # a directory and a name in it
Names = dict[Key, int]
#: (path, is a directory, mode, content, time, number of the first path of the same file)
State = tuple[tuple[str, bool, int, bytes, Any, int], ...]


class Versions:
    """What a thing has been; from `floor` on, the disk may hold any of these."""

    __slots__ = ("floor", "values")

    def __init__(self, value: Any, *more: Any) -> None:
        self.values = [value, *more]
        self.floor = 0

    def add(self, value: Any) -> None:
        self.values.append(value)

    @property
    def last(self) -> int:
        return len(self.values) - 1

    def possible(self) -> list[Any]:
        return list(dict.fromkeys(self.values[self.floor :]))


class Disk:
    """Applies recorded operations; `states` are what a power loss now may leave."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._names: dict[Key, Versions] = {}
        self._renames: list[tuple[Key, int, Key, int]] = []
        self._is_dir = {ROOT: True}
        self._data: dict[int, Versions] = {}
        self._modes: dict[int, Versions] = {ROOT: Versions(0o700)}
        self._times: dict[int, Versions] = {}
        self._moments: list[tuple[Names, dict[int, int], dict[int, Any]]] = []
        self._keep_moment()

    def apply(self, op: Op) -> None:
        getattr(self, f"_do_{op.kind}")(*op.args)
        if self.model == "journal" and op.kind not in ("data", "mark", "sync", "syncfs", "settle"):
            self._keep_moment()

    def _do_settle(self) -> None:
        """Everything is on the disk."""
        for known in (self._names, self._data, self._modes, self._times):
            for versions in known.values():
                versions.floor = versions.last
        self._renames.clear()
        del self._moments[:-1]

    _do_syncfs = _do_settle

    def _do_mark(self, *args: Any) -> None:
        pass

    def _do_new(self, inode: int, is_dir: bool, mode: int) -> None:
        self._is_dir[inode] = is_dir
        self._data[inode] = Versions(b"")
        self._modes[inode] = Versions(mode)
        self._times[inode] = Versions(None)

    def _do_data(self, inode: int, data: bytes) -> None:
        self._data[inode].add(data)

    def _do_mode(self, inode: int, mode: int) -> None:
        self._modes[inode].add(mode)

    def _do_time(self, inode: int, time: float) -> None:
        self._times[inode].add(time)

    def _set(self, key: Key, inode: int | None) -> int:
        versions = self._names.setdefault(key, Versions(None))
        versions.add(inode)
        return versions.last

    def _do_link(self, directory: int, name: str, inode: int) -> None:
        self._set((directory, name), inode)

    def _do_unlink(self, directory: int, name: str) -> None:
        self._set((directory, name), None)

    def _do_rename(self, old_dir: int, old_name: str, new_dir: int, new_name: str) -> None:
        old, new = (old_dir, old_name), (new_dir, new_name)
        inode = self._names[old].values[-1]
        self._renames.append((old, self._set(old, None), new, self._set(new, inode)))

    def _do_sync(self, inode: int) -> None:
        if self.model == "journal":
            del self._moments[:-1]
        if self._is_dir[inode]:
            for (directory, _), versions in self._names.items():
                if directory == inode:
                    versions.floor = versions.last
        else:
            for known in (self._data, self._modes, self._times):
                known[inode].floor = known[inode].last
            if self.model == "btrfs":
                for versions in self._names.values():
                    if inode in versions.values[versions.floor :]:
                        versions.floor = versions.last
        if self.model != "unordered":
            self._keep_renames()

    def _keep_renames(self) -> None:
        """The old name of a rename is not gone for good before the new one is there."""
        changed = True
        while changed:
            changed = False
            for old, gone, new, there in self._renames:
                if self._names[old].floor >= gone and self._names[new].floor < there:
                    self._names[new].floor = there
                    changed = True

    def _keep_moment(self) -> None:
        self._moments.append(
            (
                {k: v.values[-1] for k, v in self._names.items() if v.values[-1] is not None},
                {inode: versions.values[-1] for inode, versions in self._modes.items()},
                {inode: versions.values[-1] for inode, versions in self._times.items()},
            )
        )

    # What may be left

    def states(self) -> Iterator[State]:
        """Yield each state that may be found; some more than once."""
        if self.model == "journal":
            for names, modes, times in self._moments:
                fixed_modes = {inode: [mode] for inode, mode in modes.items()}
                fixed_times = {inode: [time] for inode, time in times.items()}
                yield from self._with_content(names, fixed_modes, fixed_times)
            return
        modes = {inode: versions.possible() for inode, versions in self._modes.items()}
        times = {inode: versions.possible() for inode, versions in self._times.items()}
        for names in self._possible_names():
            yield from self._with_content(names, modes, times)

    def _possible_names(self) -> Iterator[Names]:
        fixed, open_ = {}, []
        for key, versions in self._names.items():
            if versions.floor == versions.last:
                if versions.values[-1] is not None:
                    fixed[key] = versions.values[-1]
            else:
                open_.append(key)
        place = {key: n for n, key in enumerate(open_)}
        bound = [
            (place[old], gone, new, there)
            for old, gone, new, there in self._renames
            if old in place and self.model != "unordered"
        ]
        ranges = [range(self._names[k].floor, self._names[k].last + 1) for k in open_]
        for chosen in itertools.product(*ranges):
            if any(
                chosen[old] >= gone
                and (chosen[place[new]] if new in place else self._names[new].floor) < there
                for old, gone, new, there in bound
            ):
                continue
            names = dict(fixed)
            for key, version in zip(open_, chosen, strict=True):
                inode = self._names[key].values[version]
                if inode is not None:
                    names[key] = inode
            yield names

    def _with_content(
        self, names: Names, modes: dict[int, list[int]], times: dict[int, list[Any]]
    ) -> Iterator[State]:
        tree: dict[int, list[tuple[str, int]]] = {}
        for (directory, name), inode in names.items():
            tree.setdefault(directory, []).append((name, inode))
        paths: list[tuple[str, int]] = []
        todo = [("", ROOT)]
        while todo:
            above, directory = todo.pop()
            for name, inode in tree.get(directory, ()):
                path = f"{above}/{name}" if above else name
                paths.append((path, inode))
                if self._is_dir[inode]:
                    todo.append((path, inode))
        paths.sort()
        inodes = list(dict.fromkeys(inode for _, inode in paths))
        first = {inode: [i for _, i in paths].index(inode) for inode in inodes}
        choices = [
            list(itertools.product(modes[inode], self._contents(inode), times[inode]))
            for inode in inodes
        ]
        for chosen in itertools.product(*choices):
            of = dict(zip(inodes, chosen, strict=True))
            yield tuple(
                (path, self._is_dir[inode], *of[inode], first[inode]) for path, inode in paths
            )

    def _contents(self, inode: int) -> list[bytes]:
        versions = self._data[inode]
        found = versions.possible()
        if versions.floor < versions.last:
            new = versions.values[-1]
            half = new[: len(new) // 2]
            found += [half, bytes(len(new)), half + bytes(len(new) - len(half))]
        return list(dict.fromkeys(found))


def lay_out(state: State, root: Path) -> None:
    """Make the files of a state.  `root`: an empty directory."""
    made: list[str] = []
    for path, is_dir, mode, data, time, first in state:
        where = os.path.join(root, path)
        made.append(where)
        if is_dir:
            os.mkdir(where, mode)
        elif first < len(made) - 1:
            os.link(made[first], where)
        else:
            fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(fd, data)
            os.fchmod(fd, mode)
            os.close(fd)
            if time is not None:
                os.utime(where, (time, time))
