"""Several processes on one spool: real ones, killed with kill -9, and forked."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cpsmailaccess_delivery.errors import SpoolError
from cpsmailaccess_delivery.interfaces import Settlement, State
from cpsmailaccess_delivery.spool import Maildir, Presence
from spool_contract import DEADLINE, MESSAGE, envelope, queue, told

PRELUDE = """
import sys, signal
sys.path.insert(0, {tests!r})
from spool_contract import *
from cpsmailaccess_delivery.spool import Maildir, Presence
presence = Presence({box!r} + "/presence")
spool = Maildir({box!r}, presence)
def ready(what=""):
    print(what, flush=True)
def wait():
    sys.stdin.read()
"""


@pytest.fixture
def box(tmp_path):
    return str(tmp_path / "box")


@pytest.fixture
def presence(box):
    presence = Presence(box + "/presence")
    yield presence
    presence.close()


@pytest.fixture
def spool(box, presence):
    spool = Maildir(box, presence)
    yield spool
    spool.close()


@pytest.fixture
def start(box):
    children = []

    def start(code):
        prelude = PRELUDE.format(tests=str(Path(__file__).parent), box=box)
        child = subprocess.Popen(
            [sys.executable, "-c", prelude + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate(timeout=DEADLINE)


def kill(child):
    os.kill(child.pid, signal.SIGKILL)
    child.wait(DEADLINE)


def _is_mail(fd):
    try:
        return ",L=" in os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return False  # the listing's own


def in_child(function):
    """Return the exit status of `function` in a forked child: 0 unless it raised."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class TestLeases:
    def test_kill_9_frees_a_lease(self, spool, start):
        entry = queue(spool)
        child = start("lease = spool.claim(next(spool.scan())); ready(); wait()")
        assert child.stdout.readline()
        assert spool.leased(entry)
        assert spool.claim(entry) is None
        kill(child)
        lease = spool.claim(entry)
        assert lease is not None
        lease.release()

    def test_each_mail_goes_to_one_process(self, spool, start):
        entries = [queue(spool, f"{n}@x") for n in range(200)]
        code = """
ready()
sys.stdin.readline()
for entry in list(spool.scan()):
    lease = spool.claim(entry)
    if lease is not None:
        lease.settle(Settlement(State.ACCEPTED))
        ready(entry.id)
"""
        children = [start(code) for _ in range(3)]
        for child in children:
            assert child.stdout.readline()
        for child in children:
            child.stdin.write("\n")
            child.stdin.flush()
        taken = [child.communicate(timeout=DEADLINE)[0].split() for child in children]
        assert sorted(entry_id for ids in taken for entry_id in ids) == sorted(
            entry.id for entry in entries
        )
        assert list(spool.scan()) == []

    def test_a_child_cannot_keep_or_end_a_lease(self, spool):
        entry = queue(spool)
        lease = spool.claim(entry)

        def child():
            lease.release()  # the parent's: nothing happens
            assert spool.claim(entry) is None
            with pytest.raises(SpoolError):
                lease.settle(Settlement(State.ACCEPTED))

        assert in_child(child) == 0
        assert spool.leased(entry)
        assert lease.settle(Settlement(State.ACCEPTED)) is None

    def test_a_child_that_lives_on_does_not_hold_the_lease(self, spool, start):
        entry = queue(spool)
        parent = start(
            """
import os
lease = spool.claim(next(spool.scan()))
there, here = os.pipe()
pid = os.fork()
if not pid:
    os.write(here, b"!")  # past what a fork does first: the lease is let go of
    wait()
    os._exit(0)
os.read(there, 1)
ready(pid)
signal.pause()
"""
        )
        assert parent.stdout.readline()
        assert spool.leased(entry)
        kill(parent)
        lease = spool.claim(entry)  # though the child lives
        assert lease is not None
        lease.release()

    def test_a_lease_ends_though_a_child_has_not_closed_it_yet(self, spool):
        entry = queue(spool)
        lease = spool.claim(entry)
        copies = [os.dup(int(fd)) for fd in os.listdir("/proc/self/fd") if _is_mail(fd)]
        assert copies
        lease.release()
        assert not spool.leased(entry)
        for fd in copies:
            os.close(fd)

    def test_a_child_can_use_the_spool(self, spool):
        def child():
            entry = queue(spool, "child@x")
            lease = spool.claim(entry)
            lease.settle(Settlement(State.DEFERRED, attempts=1))

        assert in_child(child) == 0
        (record,) = spool.find("child@x")
        assert record.entry.state is State.DEFERRED

    def test_a_child_neither_commits_nor_aborts_what_its_parent_staged(self, spool):
        entry = spool.stage(envelope(), MESSAGE)

        def child():
            with pytest.raises(SpoolError, match="process"):
                spool.prepare([entry])
            spool.discard([entry])
            spool.publish([entry])

        assert in_child(child) == 0
        spool.prepare([entry])
        spool.publish([entry])
        assert list(spool.scan()) == [entry]


class TestSweep:
    def test_what_a_killed_process_staged_is_removed(self, spool, start):
        child = start("ready(spool.stage(envelope(), MESSAGE).id); wait()")
        entry_id = child.stdout.readline().strip()
        assert spool.sweep().removed == ()
        kill(child)
        (name,) = spool.left_overs()
        assert name.startswith(entry_id)
        assert spool.sweep().removed == (entry_id,)
        assert spool.left_overs() == []
        assert os.listdir(spool.location + "/tmp") == []
        assert list(spool.scan()) == []

    def test_a_presence_is_private_whatever_the_umask(self, tmp_path):
        before = os.umask(0o777)
        try:
            presence = Presence(tmp_path / "presence")
        finally:
            os.umask(before)
        path = tmp_path / "presence" / presence.token
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        presence.close()

    def test_what_a_killed_process_prepared_is_in_doubt(self, spool, start):
        child = start(
            "entry = spool.stage(envelope(), MESSAGE); spool.prepare([entry]);"
            " ready(entry.id); wait()"
        )
        entry_id = child.stdout.readline().strip()
        assert spool.sweep().held == ()
        kill(child)
        assert spool.sweep().held == (entry_id,)
        record = spool.load(spool.look_up(entry_id))
        assert record.entry.state is State.HELD
        assert record.reason.startswith("in doubt: ")
        assert spool.sweep().held == ()
        again = spool.requeue(record.entry)
        lease = spool.claim(again)
        assert lease.message == MESSAGE
        lease.release()

    def test_what_a_killed_process_prepared_alone_is_removed(self, spool, start):
        """No transaction decides about it: whoever wanted it makes it again."""
        child = start(
            "entry = spool.stage(envelope(), MESSAGE); spool.prepare([entry], alone=True);"
            " ready(entry.id); wait()"
        )
        entry_id = child.stdout.readline().strip()
        kill(child)
        report = spool.sweep()
        assert (report.removed, report.held) == ((entry_id,), ())
        assert list(spool.scan()) == []

    def test_what_was_being_synced_when_the_power_failed_is_removed(self, spool, start):
        child = start(
            "entry = spool.stage(envelope(), MESSAGE); spool.prepare([entry]);"
            " ready(entry.id); wait()"
        )
        entry_id = child.stdout.readline().strip()
        kill(child)
        (path,) = Path(spool.location, "tmp").iterdir()
        data = bytearray(path.read_bytes())
        data[-5:] = bytes(5)
        path.write_bytes(data)
        report = spool.sweep()
        assert (report.removed, report.held) == ((entry_id,), ())

    def test_a_published_mail_whose_staged_name_came_back(self, spool, start):
        child = start(
            """
import os
entry = spool.stage(envelope(), MESSAGE)
spool.prepare([entry])
(name,) = os.listdir(spool.location + "/tmp")
os.link(spool.location + "/tmp/" + name, spool.location + "/tmp/keep")
spool.publish([entry])
os.rename(spool.location + "/tmp/keep", spool.location + "/tmp/x")
os.rename(spool.location + "/tmp/x", spool.location + "/tmp/y")
os.link(spool.location + "/tmp/y", spool.location + "/tmp/" + name)
os.unlink(spool.location + "/tmp/y")
ready(entry.id)
wait()
"""
        )
        entry_id = child.stdout.readline().strip()
        kill(child)
        report = spool.sweep()
        assert (report.removed, report.held) == ((), ())
        assert [entry.id for entry in spool.scan()] == [entry_id]
        assert os.listdir(spool.location + "/tmp") == []

    def test_half_written_outcomes_are_removed(self, spool, start):
        child = start(
            """
import os
rename = os.rename
def stop(*args, **kw):
    ready()
    wait()
lease = None
queue(spool)
lease = spool.claim(next(spool.scan()))
os.rename = stop
lease.settle(Settlement(State.DEFERRED, {"b@x": ACCEPTED}, attempts=1))
"""
        )
        assert child.stdout.readline()
        kill(child)
        assert len(os.listdir(spool.location + "/tmp")) == 1
        report = spool.sweep()
        assert (report.removed, report.held) == ((), ())
        assert os.listdir(spool.location + "/tmp") == []
        (entry,) = spool.scan()
        assert entry.state is State.QUEUED

    def test_two_sweepers(self, box, spool, start):
        child = start(
            "entries = [spool.stage(envelope(f'{n}@x'), MESSAGE) for n in range(50)];"
            " spool.prepare(entries); ready(); wait()"
        )
        assert child.stdout.readline()
        kill(child)
        sweepers = [start("ready(len(spool.sweep().held))") for _ in range(2)]
        held = [int(child.communicate(timeout=DEADLINE)[0]) for child in sweepers]
        assert sum(held) == 50
        assert len(list(spool.scan())) == 50


class TestPresence:
    def test_of_the_living_and_the_dead(self, presence, start):
        child = start("ready(presence.token); wait()")
        token = child.stdout.readline().strip()
        assert presence.is_alive(token)
        assert presence.is_alive(presence.token)
        assert presence.token != token
        kill(child)
        assert not presence.is_alive(token)

    def test_an_unknown_token_is_dead(self, presence):
        assert not presence.is_alive("0" * 16)
        assert not presence.is_alive("../../etc/passwd")

    def test_close_removes_the_file(self, box):
        presence = Presence(box + "/presence")
        token = presence.token
        presence.close()
        presence.close()
        assert os.listdir(box + "/presence") == []
        other = Presence(box + "/presence")
        assert not other.is_alive(token)
        other.close()

    def test_two_that_ask_do_not_take_each_other_for_the_owner(self, box, presence, start):
        child = start("ready(presence.token); wait()")
        token = child.stdout.readline().strip()
        kill(child)
        fd = os.open(f"{box}/presence/{token}", os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_SH)  # another that asks, just now
        assert not presence.is_alive(token)
        os.close(fd)

    def test_a_child_is_another_process(self, presence):
        token = presence.token

        def child():
            assert presence.token != token
            assert presence.is_alive(token)
            presence.close()

        assert in_child(child) == 0
        assert presence.token == token
        assert presence.is_alive(token)

    def test_a_child_does_not_keep_its_dead_parent_alive(self, presence, start):
        parent = start(
            """
import os
reader, writer = os.pipe()
pid = os.fork()
if not pid:
    os.write(writer, b"!")
    wait()
    os._exit(0)
os.read(reader, 1)  # before, the child has closed nothing yet
ready(presence.token)
signal.pause()
"""
        )
        token = parent.stdout.readline().strip()
        assert presence.is_alive(token)
        kill(parent)
        assert not presence.is_alive(token)

    def test_the_dead_are_tidied_away(self, box, presence, start):
        child = start("ready(presence.token); wait()")
        living = start("ready(presence.token); wait()")
        dead, alive = child.stdout.readline().strip(), living.stdout.readline().strip()
        kill(child)
        presence.tidy()
        assert sorted(os.listdir(box + "/presence")) == sorted([presence.token, alive])
        assert dead != alive


def test_what_is_being_made_is_not_tidied_away(tmp_path):
    """A presence that another process has not locked yet; an hour later it is a dead one's."""
    presence = Presence(tmp_path / "presence")
    young, old = (tmp_path / "presence" / name for name in (".0123456789abcdef", ".old"))
    for path in (young, old):
        path.touch()
    os.utime(old, (0, 0))
    presence.tidy()
    assert (young.exists(), old.exists()) == (True, False)
    presence.close()


def test_a_watch_tells_of_other_processes(spool, start):
    watch = spool.watch()
    child = start("ready(queue(spool).id)")
    assert [entry.id for entry in told(watch)] == [child.stdout.readline().strip()]
    watch.close()


def test_who_delivers(tmp_path):
    """Each process for itself, as long as it lives and as many processors as it has."""
    ours, theirs = Presence(tmp_path / "presence"), Presence(tmp_path / "presence")
    assert ours.deliverers() == []
    ours.delivers()
    ours.delivers()
    (one,) = theirs.deliverers()
    assert (one.pid, one.here) == (os.getpid(), False)
    assert [each.here for each in ours.deliverers()] == [True]
    ours.rests()
    assert len(theirs.deliverers()) == 1
    os.unlink(tmp_path / "presence" / ours.token)  # by somebody; the next token says it again
    assert ours.token
    assert len(theirs.deliverers()) == 1

    def child():
        assert ours.deliverers()[0].pid == os.getppid()
        ours.delivers()
        assert {each.pid for each in ours.deliverers()} == {os.getppid(), os.getpid()}

    assert in_child(child) == 0
    assert len(theirs.deliverers()) == 1, "the child has died"
    ours.rests()
    assert theirs.deliverers() == []
    ours.delivers()
    ours.close()
    ours.rests()  # one that took long to stop
    assert theirs.deliverers() == []
    theirs.tidy()  # what the child has left
    assert os.listdir(tmp_path / "presence") == [theirs.token]
    theirs.close()
