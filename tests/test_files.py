"""Private files and directories: what is left when it fails, and what is synced."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from cpsmailaccess_delivery.files import make_private, open_inside, write_new


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture(params=[0, 0o022, 0o777])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def synced(monkeypatch):
    paths = []
    monkeypatch.setattr(os, "fsync", lambda fd: paths.append(os.readlink(f"/proc/self/fd/{fd}")))
    return paths


def test_a_directory_is_private_whatever_the_umask(tmp_path, umask, synced):
    make_private(str(tmp_path / "a"))
    assert mode(tmp_path / "a") == 0o700
    assert synced == [str(tmp_path)]


def test_those_above_are_made_as_the_umask_says_and_durably(tmp_path, monkeypatch, synced):
    before = os.umask(0o022)
    try:
        make_private(str(tmp_path / "a" / "b" / "c"))
    finally:
        os.umask(before)
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/c")] == [0o755, 0o755, 0o700]
    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]


def test_one_that_is_there_is_left_alone(tmp_path, monkeypatch, synced):
    tmp_path.chmod(0o750)
    make_private(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make_private("")
    assert (mode(tmp_path), synced) == (0o750, [])


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(FileExistsError):
        make_private(str(tmp_path / "a"))


def test_a_new_file_is_private_whatever_the_umask(tmp_path, umask, synced):
    write_new(str(tmp_path / "a"), b"x", b"y")
    write_new(str(tmp_path / "b"), b"x", mode=0o400, sync=True)
    assert (tmp_path / "a").read_bytes() == b"xy"
    assert (mode(tmp_path / "a"), mode(tmp_path / "b")) == (0o600, 0o400)
    assert synced == [str(tmp_path / "b")]


def test_no_file_is_replaced_and_no_link_followed(tmp_path):
    (tmp_path / "a").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("a", "link"):
        with pytest.raises(FileExistsError):
            write_new(str(tmp_path / name), b"after")
    assert (tmp_path / "a").read_text() == "before"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("call", ["fchmod", "writev", "fsync"])
def test_nothing_is_left_of_a_file_that_fails(tmp_path, monkeypatch, call):
    def failing(*args):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match="no space"):
        write_new(str(tmp_path / "a"), b"x", sync=True)
    assert list(tmp_path.iterdir()) == []


def test_what_is_opened_inside_a_directory_is_inside_of_it(tmp_path):
    """Neither the directory nor the file is a link, and nothing is waited for."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "link").symlink_to("file")
    os.mkfifo(tmp_path / "real" / "fifo")
    fd = open_inside(str(tmp_path / "real"), "file")
    assert os.read(fd, 100) == b"content"
    os.close(fd)
    for directory, name in (("link", "file"), ("real", "link")):
        with pytest.raises(OSError, match="symbolic link") as raised:
            open_inside(str(tmp_path / directory), name)
        assert raised.value.errno == errno.ELOOP
    os.close(open_inside(str(tmp_path / "real"), "fifo"))  # would wait for a writer
