"""One sync for many, and closing many files: what faults and signals do to those who wait."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import open_files
from cpsmailaccess_delivery.spool import forks
from cpsmailaccess_delivery.spool.durable import GroupSync

DEADLINE = 30.0


class Waiter(threading.Thread):
    """Waits for the sync of an item; tells what it got."""

    def __init__(self, sync: Callable[[str], None], item: str) -> None:
        super().__init__(daemon=True)
        self.sync = sync
        self.item = item
        self.got: BaseException | str = "nothing"
        self.start()

    def run(self) -> None:
        try:
            self.sync(self.item)
            self.got = "synced"
        except BaseException as error:
            self.got = error


class Disk:
    """Syncs when told to; `synced` is what has reached it."""

    def __init__(self) -> None:
        self.synced: list[str] = []
        self.begun: list[list[str]] = []
        self.go = threading.Event()
        self.errors: list[BaseException] = []

    def __call__(self, items: list[str]) -> None:
        self.begun.append(items)
        assert self.go.wait(DEADLINE)
        if len(self.begun) > 1 and self.errors:
            raise self.errors.pop()
        self.synced += items


def wait_for(condition: Callable[[], bool]) -> None:
    ready = threading.Event()
    for _ in range(int(DEADLINE * 100)):
        if condition():
            return
        ready.wait(0.01)
    raise AssertionError("not in time")


def three(disk: Disk) -> list[Waiter]:
    """One syncs, and two wait for the sync after it."""
    group = GroupSync(disk)
    first = Waiter(group, "first")
    wait_for(lambda: disk.begun == [["first"]])
    others = [Waiter(group, "a"), Waiter(group, "b")]
    wait_for(lambda: len(group._waiting) == 2)
    disk.go.set()
    waiters = [first, *others]
    for waiter in waiters:
        waiter.join(DEADLINE)
        assert not waiter.is_alive()
    return waiters


def test_what_waits_shares_the_next_sync():
    disk = Disk()
    assert [waiter.got for waiter in three(disk)] == ["synced"] * 3
    assert [sorted(items) for items in disk.begun] == [["first"], ["a", "b"]]


def test_an_error_of_the_disk_is_told_to_all_who_shared_it():
    disk = Disk()
    disk.errors.append(OSError(errno.EIO, "input/output error"))
    first, *others = three(disk)
    assert first.got == "synced"
    assert [type(waiter.got) for waiter in others] == [OSError, OSError]
    assert disk.synced == ["first"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_who_is_interrupted_takes_nobody_with_it(error):
    """Ctrl-C, a worker's time limit: the others are not told that they are safe."""
    disk = Disk()
    disk.errors.append(error)
    first, *others = three(disk)
    assert first.got == "synced"
    (interrupted,) = [waiter for waiter in others if waiter.got is error]
    (other,) = [waiter for waiter in others if waiter is not interrupted]
    assert other.got == "synced"
    assert disk.synced == ["first", other.item]


def test_who_is_interrupted_while_it_waits_leaves_the_queue():
    """Else the next one syncs a file that is gone, and fails for it."""

    class Stop(Exception):
        pass

    def stop(number: int, frame: object) -> None:
        raise Stop

    disk = Disk()
    group = GroupSync(disk)
    first = Waiter(group, "first")
    wait_for(lambda: disk.begun == [["first"]])
    main = threading.main_thread().ident
    assert main == threading.get_ident()

    def interrupt() -> None:
        wait_for(lambda: len(group._waiting) == 1)
        signal.pthread_kill(main, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        with pytest.raises(Stop):
            group("interrupted")
        interrupting.join(DEADLINE)
    finally:
        signal.signal(signal.SIGUSR1, before)
    disk.go.set()
    first.join(DEADLINE)
    group("later")
    assert disk.begun == [["first"], ["later"]]


@pytest.mark.parametrize("call", ["socketpair", "close"])
def test_many_are_closed_when_the_system_has_no_socket_for_it(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files: that is when they must be closed."""
    fds = [os.open(tmp_path, os.O_RDONLY) for _ in range(300)]
    for fd in fds:
        forks.keep(fd)

    def failing(*args: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    if call == "socketpair":
        monkeypatch.setattr(socket, "socketpair", failing)
    else:
        real = socket.socket.close
        monkeypatch.setattr(socket.socket, "close", lambda self: (real(self), failing()))
    forks.drop_all(fds)
    assert not {str(fd) for fd in fds} & {fd for fd, _ in open_files()}
    assert not forks._fds.intersection(fds)
