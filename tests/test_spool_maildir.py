"""The Maildir spool: the contract, then files, foreign ones, hostile ones, full disks."""

from __future__ import annotations

import errno
import json
import os
import select
import stat
import time
from pathlib import Path

import pytest

from conftest import open_files
from cpsmailaccess_delivery.envelope import format_block
from cpsmailaccess_delivery.errors import InvalidEnvelope, SpoolError
from cpsmailaccess_delivery.interfaces import Entry, Outcome, Settlement, State
from cpsmailaccess_delivery.spool import Maildir, Presence, durable, names
from cpsmailaccess_delivery.spool.layout import Layout
from cpsmailaccess_delivery.watch import PollingWatch
from spool_contract import (
    ACCEPTED,
    DEADLINE,
    DEFERRED,
    MESSAGE,
    REFUSED,
    DoubtContract,
    SpoolContract,
    envelope,
    queue,
    settle,
    told,
)

NOW = 1_700_000_000.0
ZOPE_SENDMAIL = (
    b"X-Zope-From: alice@example.org\nX-Zope-To: bob@example.net\n"
    b"Message-Id: <old@example.org>\nSubject: from before\n\nbody\n"
)


@pytest.fixture
def now():
    return NOW


@pytest.fixture
def presence(tmp_path):
    presence = Presence(tmp_path / "box" / "presence")
    yield presence
    presence.close()


@pytest.fixture
def spool(tmp_path, presence, now):
    spool = Maildir(tmp_path / "box", presence, clock=lambda: now)
    yield spool
    spool.close()


def names_in(spool, where):
    return sorted(os.listdir(Path(spool.location, where)))


def put(spool, where, name, data):
    path = Path(spool.location, where, name)
    path.write_bytes(data)
    return path


def fail(monkeypatch, call, number, when=lambda *args, **kw: True):
    """Let a function of os fail where `when` says so."""
    real = getattr(os, call)

    def failing(*args, **kw):
        if when(*args, **kw):
            raise OSError(number, os.strerror(number))
        return real(*args, **kw)

    monkeypatch.setattr(os, call, failing)


class TestMaildir(SpoolContract, DoubtContract):
    pass


class TestPolling(SpoolContract):
    """The same where there is no inotify."""

    @pytest.fixture
    def spool(self, tmp_path, presence, now):
        spool = Maildir(tmp_path / "box", presence, clock=lambda: now, notify=False)
        yield spool
        spool.close()

    def test_what_is_due_again_is_told_at_once(self, spool, monkeypatch):
        monkeypatch.setattr(PollingWatch, "_look", lambda watch: [])  # it sees nothing itself
        watch = spool.watch()
        entry = queue(spool)
        assert list(watch.read()) == [entry]
        after = settle(spool, entry, State.DEFERRED, due=1.0, attempts=1)
        assert list(watch.read()) == [after]
        watch.close()

    def test_what_others_commit_is_found(self, spool, presence):
        watch = spool.watch()
        other = Maildir(spool.location, presence)
        queue(other)
        other.close()
        assert select.select([watch.fileno()], [], [], DEADLINE)[0]
        assert watch.read() is None  # scan again
        watch.close()


class TestFsyncEach(SpoolContract):
    """The same where syncfs is not there, or the disk is busy."""

    @pytest.fixture(autouse=True)
    def busy(self, monkeypatch):
        monkeypatch.setattr(durable, "_quiet", lambda: False)
        monkeypatch.setattr(durable, "_keeps_names", lambda directory: False)


class TestLayout:
    def test_private_whatever_the_umask(self, tmp_path):
        old = os.umask(0)
        try:
            presence = Presence(tmp_path / "box" / "presence")
            spool = Maildir(tmp_path / "box", presence)
            settle(spool, queue(spool), State.DEFERRED, attempts=1)
            settle(spool, queue(spool), State.REFUSED, outcomes={"b@x": REFUSED})
            spool.stage(envelope(), MESSAGE)
        finally:
            os.umask(old)
        for directory, _, files in os.walk(tmp_path / "box"):
            assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
            for file in files:
                assert stat.S_IMODE(os.stat(Path(directory, file)).st_mode) & 0o177 == 0
        spool.close()
        presence.close()

    def test_a_link_that_is_made_while_it_is_opened_is_refused(self, tmp_path, monkeypatch):
        """Between the look and the open."""
        (tmp_path / "box").mkdir()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "box" / "new").symlink_to(tmp_path / "elsewhere")
        for name in ("tmp", "cur"):
            (tmp_path / "box" / name).mkdir()
        monkeypatch.setattr(Layout, "_refuse_link", lambda layout, name: None)
        presence = Presence(tmp_path / "box" / "presence")
        with pytest.raises(SpoolError, match="is a symbolic link or a file"):
            Maildir(tmp_path / "box", presence)
        presence.close()

    def test_usable_under_a_hostile_umask(self, tmp_path):
        old = os.umask(0o777)
        try:
            presence = Presence(tmp_path / "box" / "presence")
            spool = Maildir(tmp_path / "box", presence)
            entry = settle(spool, queue(spool), State.DEFERRED, attempts=1)
        finally:
            os.umask(old)
        (path,) = Path(spool.location, "cur").iterdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert spool.load(entry).envelope == envelope()
        spool.close()
        presence.close()

    def test_a_directory_with_other_things_is_refused(self, tmp_path, presence):
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "thesis.tex").write_text("x")
        with pytest.raises(SpoolError, match=r"thesis\.tex.*choose"):
            Maildir(tmp_path / "home", presence)
        assert os.listdir(tmp_path / "home") == ["thesis.tex"]

    def test_a_file_is_refused(self, tmp_path, presence):
        (tmp_path / "file").write_text("x")
        with pytest.raises(SpoolError, match="is a file"):
            Maildir(tmp_path / "file", presence)

    def test_a_maildir_of_zope_sendmail_is_taken(self, tmp_path, presence):
        for name in ("tmp", "new", "cur"):
            (tmp_path / "old" / name).mkdir(parents=True)
        (tmp_path / "old" / "README").write_text("x")
        Maildir(tmp_path / "old", presence).close()

    @pytest.mark.parametrize("name", ["tmp", "new", "cur", "outcomes"])
    def test_symbolic_links_are_refused(self, tmp_path, presence, name):
        Maildir(tmp_path / "box", presence).close()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "box" / name).rmdir()
        (tmp_path / "box" / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(SpoolError, match="symbolic link"):
            Maildir(tmp_path / "box", presence)

    def test_a_closed_spool_says_so(self, spool):
        entry = queue(spool)
        lease = spool.claim(entry)
        spool.close()
        for call in (
            lambda: spool.stage(envelope(), MESSAGE),
            lambda: list(spool.scan()),
            lambda: spool.claim(entry),
            lambda: lease.settle(Settlement(State.ACCEPTED)),
        ):
            with pytest.raises(SpoolError, match="closed"):
                call()
        lease.release()

    def test_the_files_are_what_the_design_says(self, spool):
        entry = spool.stage(envelope(), MESSAGE)
        (staged,) = names_in(spool, "tmp")
        path = Path(spool.location, "tmp", staged)
        assert stat.S_IMODE(path.stat().st_mode) == 0o400
        spool.prepare([entry])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        spool.publish([entry])
        assert names_in(spool, "tmp") == []
        (name,) = names_in(spool, "new")
        assert name == f"{entry.id},L={entry.lane}"
        assert Path(spool.location, "new", name).read_bytes() == format_block(envelope()) + MESSAGE
        settle(spool, entry, State.DEFERRED, due=20.5, attempts=2)
        assert names_in(spool, "cur") == [f"{name}:1,deferred,20.5,2"]

    def test_nothing_is_left_of_an_accepted_mail(self, spool):
        after = settle(spool, queue(spool), State.DEFERRED, outcomes={"b@x": ACCEPTED}, attempts=1)
        settle(spool, after, State.ACCEPTED)
        assert names_in(spool, "outcomes") == [after.id]  # until its removal is safe
        spool.sync()
        for where in ("tmp", "new", "cur", "outcomes"):
            assert names_in(spool, where) == []

    def test_descriptors_do_not_pile_up(self, spool):
        before = open_files()
        for n in range(400):
            settle(spool, queue(spool, f"{n}@x"), State.ACCEPTED)
        assert len(open_files() - before) < 300  # nobody calls sync here
        spool.sync()
        assert open_files() <= before

    @pytest.mark.parametrize("call", ["load", "read_message", "requeue", "cancel", "hold"])
    def test_who_has_the_entry_needs_no_listing(self, spool, monkeypatch, call):
        entry = queue(spool)
        monkeypatch.setattr(os, "listdir", None)
        getattr(spool, call)(entry, *(["why"] if call == "hold" else []))


class TestForeignFiles:
    def test_of_zope_sendmail(self, spool):
        put(spool, "new", "1700000000.42.host.123", ZOPE_SENDMAIL)
        (entry,) = spool.scan()
        assert entry == Entry("1700000000.42.host.123", "")
        assert spool.find("old@example.org")[0].entry == entry
        lease = spool.claim(entry)
        assert lease.envelope.route.mailbox == "*"
        assert lease.message.startswith(b"Message-Id:")
        after = lease.settle(
            Settlement(State.DEFERRED, {"bob@example.net": DEFERRED}, due=9.0, attempts=1)
        )
        assert names_in(spool, "cur") == ["1700000000.42.host.123:1,deferred,9,1"]
        assert list(spool.scan()) == [after]
        assert spool.requeue(after).id == entry.id
        lease = spool.claim(Entry(entry.id, "", State.QUEUED, 0.0, 1))
        assert lease.outcomes == {"bob@example.net": DEFERRED}
        lease.release()

    def test_in_cur_they_are_queued_too(self, spool):
        put(spool, "cur", "1700000000.42.host.123", ZOPE_SENDMAIL)
        assert list(spool.scan()) == [Entry("1700000000.42.host.123", "")]
        assert settle(spool, Entry("1700000000.42.host.123", ""), State.ACCEPTED) is None

    @pytest.mark.parametrize("where", ["new", "cur"])
    def test_hidden_ones_are_left_alone(self, spool, where):
        put(spool, where, ".sending-1.2.host.3", ZOPE_SENDMAIL)
        put(spool, where, ".rejected-1.2.host.3", ZOPE_SENDMAIL)
        assert list(spool.scan()) == []
        spool.sweep()
        assert len(names_in(spool, where)) == 2

    @pytest.mark.parametrize("where", ["new", "cur"])
    @pytest.mark.parametrize(
        "name",
        [
            "mail:2,S",
            "mail:1,deferred,5,1:1,deferred,5,1",
            "mail:1,accepted,0,0",
            "with space",
            "esc\x1b[2J",
            "new\nline",
            "bytes\udcff",
            "x" * 250,
            "\u00e4",
            ",",
        ],
    )
    def test_no_odd_name_gets_out(self, spool, where, name):
        put(spool, where, name, ZOPE_SENDMAIL)
        (entry,) = spool.scan()
        assert names.parse(names.file_name(entry), "new") == entry
        assert entry.id.isascii()
        assert entry.id.isprintable()
        assert settle(spool, entry, State.DEFERRED, attempts=1).state is State.DEFERRED
        assert len(list(spool.scan())) == 1

    def test_a_name_that_is_taken_is_not_taken_away(self, spool):
        entry = queue(spool)
        name = names.file_name(entry)
        put(spool, "cur", name + ":2,S", ZOPE_SENDMAIL)  # adopted, it would be `name`
        assert len(list(spool.scan())) == 2
        assert spool.load(entry).envelope == envelope()

    @pytest.mark.parametrize(
        "data", [b"", b"\n", b"Subject: x\n\n", b"X-Zope-Envelope: 2\n\n", b"\xff" * 5000]
    )
    def test_what_is_no_mail_is_held_once(self, spool, data):
        put(spool, "new", "strange", data)
        (entry,) = spool.scan()
        assert spool.claim(entry) is None
        (held,) = spool.scan()
        assert held.state is State.HELD
        assert spool.claim(held) is None
        assert list(spool.scan()) == [held]
        with pytest.raises(InvalidEnvelope):
            spool.load(held)
        spool.cancel(held)
        assert list(spool.scan()) == []

    def test_links_are_not_followed(self, spool, tmp_path):
        secret = tmp_path / "secret"
        secret.write_bytes(ZOPE_SENDMAIL)
        Path(spool.location, "new", "link").symlink_to(secret)
        (entry,) = spool.scan()
        with pytest.raises(InvalidEnvelope):
            spool.load(entry)
        assert spool.claim(entry) is None
        (held,) = spool.scan()
        assert held.state is State.HELD
        assert spool.claim(held) is None
        assert secret.read_bytes() == ZOPE_SENDMAIL

    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
    def test_what_is_no_file_is_held(self, spool, make):
        make(Path(spool.location, "new", "odd"))
        (entry,) = spool.scan()
        assert spool.claim(entry) is None
        assert next(spool.scan()).state is State.HELD

    def test_a_link_for_a_side_file_is_not_followed(self, spool, tmp_path):
        entry = queue(spool)
        (tmp_path / "secret").write_text("{}")
        Path(spool.location, "outcomes", entry.id).symlink_to(tmp_path / "secret")
        with pytest.raises(SpoolError, match="symbolic link"):
            spool.claim(entry)
        assert not spool.leased(entry)

    def test_a_watch_tells_of_complete_files_only(self, spool):
        watch = spool.watch()
        path = Path(spool.location, "new", "by-hand")
        with path.open("wb") as stream:
            stream.write(ZOPE_SENDMAIL)
            stream.flush()
            assert watch.read() == []
        assert told(watch) == [Entry("by-hand", "")]
        os.link(path, path.with_name("linked"))
        assert told(watch) == [Entry("linked", "")]
        put(spool, "tmp", "moved", ZOPE_SENDMAIL).rename(path.with_name("moved"))
        assert told(watch) == [Entry("moved", "")]
        watch.close()

    def test_a_watch_that_lost_count_says_so(self, spool, tmp_path):
        watch = spool.watch()
        limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
        path = put(spool, "tmp", "a", b"")
        for n in range(limit + 10):  # moves of one file are all told
            where, path_to = ("new", "a") if n % 2 == 0 else ("cur", "b")
            path = path.rename(Path(spool.location, where, path_to))
        assert watch.read() is None
        entry = queue(spool)
        assert entry in told(watch)
        watch.close()


class TestRaces:
    def test_files_that_vanish_during_a_scan(self, spool):
        entries = [queue(spool, f"{n}@x") for n in range(5)]
        scan = spool.scan()
        first = next(scan)
        for name in names_in(spool, "new"):
            os.unlink(Path(spool.location, "new", name))
        assert {first, *scan} == set(entries)  # told, though gone
        assert all(spool.claim(entry) is None for entry in entries)

    def test_an_odd_name_that_vanishes_during_a_scan(self, spool):
        put(spool, "new", "a", ZOPE_SENDMAIL)
        odd = put(spool, "new", "b:2,S", ZOPE_SENDMAIL)
        scan = spool.scan()
        next(scan)
        odd.unlink()
        assert list(scan) == []

    def test_settled_between_open_and_lock(self, spool, monkeypatch):
        """The lock is free again, but the name is another."""
        entry = queue(spool)
        real = os.open

        def slow(path, *args, **kw):
            fd = real(path, *args, **kw)
            if path == names.file_name(entry):
                monkeypatch.setattr(os, "open", real)
                settle(spool, entry, State.DEFERRED, attempts=1)
            return fd

        monkeypatch.setattr(os, "open", slow)
        assert spool.claim(entry) is None

    def test_another_file_of_this_name_between_open_and_lock(self, spool, monkeypatch):
        """What was locked is not what the name now means: the lock would guard nothing."""
        entry = queue(spool)
        name = names.file_name(entry)
        real = os.open

        def slow(path, *args, **kw):
            fd = real(path, *args, **kw)
            if path == name:
                monkeypatch.setattr(os, "open", real)
                put(spool, "tmp", "other", ZOPE_SENDMAIL).rename(Path(spool.location, "new", name))
            return fd

        monkeypatch.setattr(os, "open", slow)
        assert spool.claim(entry) is None
        assert settle(spool, entry, State.ACCEPTED) is None

    def test_a_mail_that_moves_while_it_is_looked_up(self, spool, monkeypatch):
        entry = queue(spool)
        real = os.open

        def slow(path, *args, **kw):
            if path == names.file_name(entry):
                monkeypatch.setattr(os, "open", real)
                settle(spool, entry, State.DEFERRED, attempts=1)
            return real(path, *args, **kw)

        monkeypatch.setattr(os, "open", slow)
        assert spool.load(entry).entry.state is State.DEFERRED


class TestCrashes:
    """States that a crash between two system calls leaves; made by hand."""

    def test_side_written_mail_not_renamed(self, spool, monkeypatch):
        entry = queue(spool)
        lease = spool.claim(entry)
        outcomes = {"bob@example.net": ACCEPTED, "carol@example.net": REFUSED}
        with monkeypatch.context() as patch:
            fail(patch, "rename", errno.EIO, lambda old, new, **kw: ":1," in str(new))
            with pytest.raises(SpoolError):
                lease.settle(Settlement(State.REFUSED, outcomes, attempts=1))
        assert spool.leased(entry)  # to be settled again
        lease.release()
        assert list(spool.scan()) == [entry]
        assert spool.claim(entry) is None  # the name follows instead
        (after,) = spool.scan()
        assert (after.state, after.attempts) == (State.REFUSED, 1)
        assert spool.load(entry).outcomes == outcomes

    def test_requeued_after_that_it_is_not_refused_again(self, spool, monkeypatch):
        self.test_side_written_mail_not_renamed(spool, monkeypatch)
        (after,) = spool.scan()
        again = spool.requeue(after)
        lease = spool.claim(again)
        assert lease is not None
        lease.release()

    def test_a_removal_that_a_power_loss_undid(self, spool):
        """The mail is back; so are its outcomes."""
        first = settle(
            spool, queue(spool), State.DEFERRED, outcomes={"bob@example.net": ACCEPTED}, attempts=1
        )
        name = names.file_name(first)
        data = Path(spool.location, "cur", name).read_bytes()
        settle(spool, first, State.ACCEPTED)
        put(spool, "cur", name, data)
        lease = spool.claim(first)
        assert lease.outcomes == {"bob@example.net": ACCEPTED}
        lease.release()

    @pytest.mark.parametrize("where", ["new", "cur"])
    def test_two_names_for_one_file(self, spool, where):
        entry = queue(spool)
        if where == "cur":
            entry = settle(spool, entry, State.DEFERRED, due=1.0, attempts=1)
        after = Entry(entry.id, entry.lane, State.DEFERRED, 5.0, 2)
        root = Path(spool.location)
        os.link(root / where / names.file_name(entry), root / "cur" / names.file_name(after))
        other = queue(spool, "other@x")
        assert sorted(spool.scan(), key=lambda e: e.id) == sorted(
            [after, other], key=lambda e: e.id
        )
        assert len(names_in(spool, "new")) + len(names_in(spool, "cur")) == 2

    def test_a_mail_that_moves_while_it_seems_to_have_two_names(self, spool, monkeypatch):
        held = spool.hold(queue(spool), "why")
        again = spool.requeue(held)
        root = Path(spool.location)
        new, cur = root / "new" / names.file_name(again), root / "cur" / names.file_name(held)
        real_listdir, real_stat = os.listdir, os.stat

        def both(fd):
            return real_listdir(fd) or [cur.name]

        def late(path, *args, **kw):
            """Each name is there when it is looked at: the mail goes to and fro."""
            if path != cur.name:
                return real_stat(path, *args, **kw)
            new.rename(cur)
            try:
                return real_stat(path, *args, **kw)
            finally:
                cur.rename(new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", both)
            patch.setattr(os, "stat", late)
            list(spool.scan())
        assert names_in(spool, "new") == [new.name]

    def test_a_torn_note_is_forgotten(self, spool):
        after = settle(spool, queue(spool), State.DEFERRED, outcomes={"b@x": DEFERRED}, attempts=1)
        put(spool, "outcomes", after.id, b'{"state": "defer')
        lease = spool.claim(after)
        assert lease.outcomes == {}
        lease.release()

    @pytest.mark.parametrize("data", [b"", b"{}", b'{"state": "refu', b"[]", b"\xff", b"null"])
    def test_damaged_outcomes_hold_the_mail(self, spool, data):
        after = settle(spool, queue(spool), State.DEFERRED, outcomes={"b@x": ACCEPTED}, attempts=1)
        path = Path(spool.location, "outcomes", after.id)
        path.chmod(0o600)
        path.write_bytes(data)
        path.chmod(0o400)
        assert spool.claim(after) is None
        (held,) = spool.scan()
        assert held.state is State.HELD
        assert "damaged" in spool.load(held).reason
        assert path.read_bytes() == data
        again = spool.requeue(held)
        assert spool.claim(again) is None
        spool.cancel(held)
        assert list(spool.scan()) == []

    def test_orphaned_outcomes_are_swept_when_old(self, spool):
        after = settle(spool, queue(spool), State.DEFERRED, attempts=1)
        put(spool, "outcomes", "orphan", b"{}")
        put(spool, "outcomes", "young", b"{}")
        old = time.time() - 2 * 3600
        os.utime(Path(spool.location, "outcomes", "orphan"), (old, old))
        os.utime(Path(spool.location, "outcomes", after.id), (old, old))
        spool.sweep()
        assert names_in(spool, "outcomes") == sorted([after.id, "young"])
        put(spool, "outcomes", "orphan", b"{}")
        os.utime(Path(spool.location, "outcomes", "orphan"), (old, old))
        spool.sweep()
        assert "orphan" in names_in(spool, "outcomes")  # for an hour: to look lists all mails

    def test_abandoned_files_of_others_are_swept(self, spool):
        old = time.time() - 37 * 3600
        os.utime(put(spool, "tmp", "1.2.host", b"x"), (old, old))
        put(spool, "tmp", "3.4.host", b"x")
        spool.sweep()
        assert names_in(spool, "tmp") == ["3.4.host"]


class TestDurability:
    """Which calls are made, in which order; the crash enumerator judges what they mean."""

    @pytest.fixture
    def calls(self, monkeypatch, spool):
        calls = []
        monkeypatch.setattr(durable, "_quiet", lambda: False)
        monkeypatch.setattr(durable, "_keeps_names", lambda directory: False)

        def where(fd):
            path = os.readlink(f"/proc/self/fd/{fd}")
            return os.path.relpath(path, spool.location).split("/")[0 if "," in path else -1] + (
                "/*" if "," in path else "/"
            )

        for call in ("fsync", "rename", "unlink"):
            real = getattr(os, call)

            def recording(*args, _real=real, _call=call, **kw):
                if _call == "fsync":
                    calls.append(f"fsync {where(args[0])}")
                elif "src_dir_fd" in kw:
                    calls.append(f"rename {where(kw['src_dir_fd'])}* {where(kw['dst_dir_fd'])}*")
                elif "dir_fd" in kw:
                    calls.append(f"unlink {where(kw['dir_fd'])}*")
                return _real(*args, **kw)

            monkeypatch.setattr(os, call, recording)
        return calls

    def test_of_a_commit(self, spool, calls):
        entry = spool.stage(envelope(), MESSAGE)
        assert calls == []
        spool.prepare([entry])
        assert calls == ["fsync tmp/*", "fsync tmp/"]
        calls.clear()
        spool.publish([entry])
        assert calls == ["rename tmp/* new/*", "fsync new/"]

    def test_of_a_commit_where_fsync_keeps_the_name_too(self, spool, calls, monkeypatch):
        monkeypatch.setattr(durable, "_keeps_names", lambda directory: True)
        spool.prepare([spool.stage(envelope(), MESSAGE)])
        assert calls == ["fsync tmp/*"]
        calls.clear()
        spool.prepare([spool.stage(envelope(), MESSAGE) for _ in range(3)])
        assert calls == ["fsync tmp/*"] * 3

    def test_of_more_mails_than_files_may_be_open(self, spool, calls):
        entries = [spool.stage(envelope(), MESSAGE) for _ in range(300)]
        spool.prepare(entries)
        assert calls.count("fsync tmp/*") == 300
        assert calls[-1] == "fsync tmp/"
        assert max(n for n, call in enumerate(calls) if call == "fsync tmp/*") == len(calls) - 2

    def test_of_a_prepared_mail_that_is_discarded(self, spool, calls):
        entry = spool.stage(envelope(), MESSAGE)
        spool.prepare([entry])
        calls.clear()
        spool.discard([entry])
        assert calls == ["unlink tmp/*", "fsync tmp/"]

    def test_of_a_settlement_that_binds(self, spool, calls):
        lease = spool.claim(queue(spool))
        calls.clear()
        lease.settle(Settlement(State.DEFERRED, {"b@x": ACCEPTED}, attempts=1))
        assert calls == [
            "fsync tmp/*",
            "rename tmp/* outcomes/*",
            "fsync outcomes/",
            "rename new/* cur/*",
        ]

    def test_of_a_deferral(self, spool, calls):
        lease = spool.claim(queue(spool))
        calls.clear()
        lease.settle(Settlement(State.DEFERRED, {"b@x": DEFERRED}, attempts=1))
        assert calls == ["rename tmp/* outcomes/*", "rename new/* cur/*"]

    def test_of_accepted_mails(self, spool, calls):
        entries = [queue(spool, f"{n}@x") for n in range(3)]
        calls.clear()
        for entry in entries:
            settle(spool, entry, State.ACCEPTED)
        assert calls == ["unlink new/*"] * 3
        calls.clear()
        spool.sync()
        assert calls == ["fsync new/", "fsync cur/", "fsync tmp/"]
        calls.clear()
        spool.sync()
        assert calls == []

    def test_of_what_a_person_decides(self, spool, calls):
        entry = queue(spool)
        calls.clear()
        spool.hold(entry, "why")
        assert calls[-2:] == ["rename new/* cur/*", "fsync cur/"]
        calls.clear()
        spool.cancel(entry)
        assert calls[:2] == ["unlink cur/*", "fsync new/"]

    def test_outcomes_are_named_by_address_in_plain_json(self, spool):
        outcomes = {"bob@example.net": Outcome(State.ACCEPTED, "250 \udc80 ok", 5.5)}
        after = settle(spool, queue(spool), State.DEFERRED, outcomes=outcomes, attempts=1)
        path = Path(spool.location, "outcomes", after.id)
        assert json.loads(path.read_bytes())["outcomes"]["bob@example.net"][0] == "accepted"
        assert spool.load(after).outcomes == outcomes


class TestFaults:
    def test_no_room_to_stage(self, spool, monkeypatch):
        fail(monkeypatch, "writev", errno.ENOSPC)
        with pytest.raises(SpoolError, match="disk is full"):
            spool.stage(envelope(), MESSAGE)
        assert names_in(spool, "tmp") == []

    def test_short_writes_are_completed(self, spool, monkeypatch):
        real = os.writev
        monkeypatch.setattr(os, "writev", lambda fd, parts: real(fd, [bytes(parts[0])[:7]]))
        entry = queue(spool)
        assert spool.read_message(entry) == MESSAGE

    @pytest.mark.parametrize("call", ["fchmod", "fsync"])
    def test_prepare_fails_and_leaves_nothing(self, spool, monkeypatch, call):
        monkeypatch.setattr(durable, "_quiet", lambda: False)
        monkeypatch.setattr(durable, "_keeps_names", lambda directory: False)
        entries = [spool.stage(envelope(f"{n}@x"), MESSAGE) for n in range(3)]
        with monkeypatch.context() as patch:
            fail(patch, call, errno.EIO)
            with pytest.raises(SpoolError, match="disk reports an error"):
                spool.prepare(entries)
        spool.discard(entries)
        assert names_in(spool, "tmp") == []

    def test_syncfs_fails(self, spool, monkeypatch):
        def failing(fd):
            raise OSError(errno.EIO, "I/O")

        monkeypatch.setattr(durable, "_quiet", lambda: True)
        monkeypatch.setattr(durable, "_keeps_names", lambda directory: False)
        monkeypatch.setattr(durable, "_syncfs", failing)
        entry = spool.stage(envelope(), MESSAGE)
        with pytest.raises(SpoolError, match="disk reports an error"):
            spool.prepare([entry])
        spool.discard([entry])
        assert names_in(spool, "tmp") == []

    def test_publish_without_room_loses_nothing(self, spool, monkeypatch):
        """A rename may need a block for the directory; the mail is committed all the same."""
        entry = spool.stage(envelope(), MESSAGE)
        spool.prepare([entry])
        with monkeypatch.context() as patch:
            fail(patch, "rename", errno.ENOSPC)
            spool.publish([entry])
        assert list(spool.scan()) == []
        report = spool.sweep()
        assert (report.held, report.removed) == ((), ())
        assert list(spool.scan()) == [entry]
        (name,) = names_in(spool, "new")
        assert stat.S_IMODE(Path(spool.location, "new", name).stat().st_mode) == 0o600

    def test_publish_replaces_nothing(self, spool):
        entry = spool.stage(envelope(), MESSAGE)
        spool.prepare([entry])
        put(spool, "new", names.file_name(entry), ZOPE_SENDMAIL)
        spool.publish([entry])
        assert Path(spool.location, "new", names.file_name(entry)).read_bytes() == ZOPE_SENDMAIL
        assert len(names_in(spool, "tmp")) == 1

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EIO])
    def test_accepted_cannot_be_recorded_at_once(self, spool, monkeypatch, number):
        entry = queue(spool)
        lease = spool.claim(entry)
        with monkeypatch.context() as patch:
            fail(patch, "unlink", number)
            with pytest.raises(SpoolError):
                lease.settle(Settlement(State.ACCEPTED))
        assert spool.claim(entry) is None  # still ours
        assert lease.settle(Settlement(State.ACCEPTED)) is None
        assert list(spool.scan()) == []

    def test_outcomes_cannot_be_recorded_at_once(self, spool, monkeypatch):
        entry = queue(spool)
        lease = spool.claim(entry)
        settlement = Settlement(State.DEFERRED, {"b@x": ACCEPTED}, attempts=1)
        with monkeypatch.context() as patch:
            fail(patch, "writev", errno.ENOSPC)
            with pytest.raises(SpoolError, match="disk is full"):
                lease.settle(settlement)
        assert names_in(spool, "tmp") == []
        assert lease.settle(settlement).state is State.DEFERRED

    def test_too_many_open_files(self, spool, monkeypatch):
        entry = queue(spool)
        with monkeypatch.context() as patch:
            fail(patch, "open", errno.EMFILE, lambda *args, **kw: "dir_fd" in kw)
            with pytest.raises(SpoolError, match="ulimit"):
                spool.claim(entry)
        assert list(spool.scan()) == [entry]

    def test_a_file_of_somebody_else_is_held(self, spool, monkeypatch):
        entry = queue(spool)
        with monkeypatch.context() as patch:
            name = names.file_name(entry)
            fail(patch, "open", errno.EACCES, lambda path, *args, **kw: path == name)
            patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
            assert spool.claim(entry) is None
        (held,) = spool.scan()
        assert held.state is State.HELD
        assert "ermission" in spool.load(held).reason

    def test_a_sync_that_fails_is_made_up_for(self, spool, monkeypatch):
        """Else a power loss sends again what was accepted long ago."""
        spool.claim(queue(spool)).settle(Settlement(State.ACCEPTED))
        with monkeypatch.context() as patch:
            fail(patch, "fsync", errno.EIO)
            with pytest.raises(SpoolError, match="disk reports an error"):
                spool.sync()
        synced = []
        monkeypatch.setattr(os, "fsync", synced.append)
        spool.sync()
        assert len(synced) == 3
        spool.sync()
        assert len(synced) == 3

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
    @pytest.mark.parametrize("call", ["open", "stat"])
    def test_a_moment_without_permission_holds_nothing(self, spool, monkeypatch, call, number):
        """Our own file, with a mode that lets us read it: the system says no for now."""
        entry = queue(spool)
        name = names.file_name(entry)
        with monkeypatch.context() as patch:
            fail(patch, call, number, lambda path, *args, **kw: path == name)
            with pytest.raises(SpoolError, match="ermi"):
                spool.claim(entry)
            if call == "open":
                with pytest.raises(SpoolError, match="ermi"):
                    spool.load(entry)
        assert list(spool.scan()) == [entry]
        spool.claim(entry).release()

    def test_a_mail_that_was_removed_before_its_commit_fails_it(self, spool):
        """Else it commits, and is lost."""
        kept, removed = (spool.stage(envelope(name), MESSAGE) for name in ("a@x", "b@x"))
        (name,) = (n for n in names_in(spool, "tmp") if n.startswith(removed.id))
        os.unlink(Path(spool.location, "tmp", name))
        with pytest.raises(SpoolError, match="removed a mail from tmp/"):
            spool.prepare([kept, removed])
        spool.discard([kept, removed])
        assert names_in(spool, "tmp") == []

    @pytest.mark.parametrize("prepared", [False, True])
    def test_who_cannot_tell_who_lives_sweeps_nothing(self, spool, tmp_path, monkeypatch, prepared):
        other = Presence(tmp_path / "box" / "presence")
        theirs = Maildir(tmp_path / "box", other)
        entry = theirs.stage(envelope(), MESSAGE)
        if prepared:
            theirs.prepare([entry])
        with monkeypatch.context() as patch:
            fail(patch, "open", errno.EMFILE, lambda path, *args, **kw: path == other.token)
            report = spool.sweep()
        assert (report.removed, report.held) == ((), ())
        theirs.prepare([entry])
        theirs.publish([entry])
        assert list(spool.scan()) == [entry]
        theirs.close()
        other.close()

    def test_who_cannot_tell_takes_it_for_leased(self, spool, monkeypatch):
        """Else nobody looks at it again before the next start."""
        entry = queue(spool)
        with monkeypatch.context() as patch:
            fail(patch, "open", errno.EMFILE, lambda *args, **kw: "dir_fd" in kw)
            assert spool.leased(entry)
        assert not spool.leased(entry)

    def test_more_mails_than_files_may_be_open(self, spool):
        before = open_files()
        entries = [spool.stage(envelope(f"{n}@x"), MESSAGE) for n in range(400)]
        assert len(open_files() - before) < 300
        spool.prepare(entries)
        modes = {
            stat.S_IMODE(Path(spool.location, "tmp", name).stat().st_mode)
            for name in names_in(spool, "tmp")
        }
        assert modes == {0o600}
        spool.publish(entries)
        assert len(list(spool.scan())) == 400
