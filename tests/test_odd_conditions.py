"""Clocks that jump, processes that fork, spools that move, links and files put there by hand."""

from __future__ import annotations

import codecs
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
from click.testing import CliRunner

from cli_helpers import Site
from conftest import open_files
from cpsmailaccess_delivery import Account, Outbox, recorder
from cpsmailaccess_delivery import processor as processor_module
from cpsmailaccess_delivery.cli import cli
from cpsmailaccess_delivery.errors import (
    InvalidEnvelope,
    OutboxError,
    SpoolError,
    VaultError,
    WrongKey,
)
from cpsmailaccess_delivery.interfaces import LaneNote, Settlement, State
from cpsmailaccess_delivery.processor import QueueProcessorThread
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.spool import staging
from cpsmailaccess_delivery.testing import SMTPServer

ALICE = "alice@example.org"
DEADLINE = 30.0
HOUR, YEAR = 3600.0, 365 * 86_400.0
ZOPE_SENDMAIL = (
    b"X-Zope-From: alice@example.org\nX-Zope-To: bob@example.net\n"
    b"Message-Id: <%s@example.org>\nSubject: by hand\n\nbody\n"
)


@pytest.fixture
def server() -> Iterator[SMTPServer]:
    with SMTPServer() as server:
        yield server


@pytest.fixture
def box(tmp_path: Path, server: SMTPServer) -> Iterator[Outbox]:
    with Outbox(tmp_path / "box", helo_name="client.example.org") as outbox:
        put(outbox, server)
        yield outbox


def put(outbox: Outbox, server: SMTPServer, mailbox: str = "*") -> None:
    with transaction.manager:
        outbox.accounts.put(
            Account(mailbox=mailbox, host=server.host, port=server.port, security="plain")
        )


def send(outbox: Outbox, name: str = "1", **options: Any) -> str:
    with transaction.manager:
        message = f"Message-Id: <{name}@example.org>\nSubject: x\n\nbody\n"
        return outbox.delivery.send(ALICE, ["bob@example.net"], message, **options)


def names_of(server: SMTPServer) -> list[str]:
    return sorted(mail.message_id.partition("@")[0] for mail in server.mails)


# Threads


@pytest.mark.parametrize("name", ["cpsmail sync", "cpsmail sweep", "cpsmail-journal"])
def test_no_room_for_a_thread_at_first(
    box: Outbox, server: SMTPServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What is sent is recorded, and once there is room all goes on."""
    monkeypatch.setattr(processor_module, "_RESTART", 0.05)
    monkeypatch.setattr(recorder, "_SYNC_MANY", 1)
    start, failed = threading.Thread.start, []

    def start_later(self: threading.Thread) -> None:
        if self.name.startswith(name) and len(failed) < 10:
            failed.append(self.name)
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", start_later)
    for number in range(12):
        send(box, str(number))
    running = box.processor()
    running.start()
    server.wait_for(12)
    deadline = time.monotonic() + DEADLINE
    while list(box.spool.scan()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert running.stop()
    assert len(failed) == 10
    assert len(server.mails) == 12


# Clocks


class Clock:
    """Seconds since the epoch, and what somebody has done to them."""

    def __init__(self) -> None:
        self.jump = 0.0

    def __call__(self) -> float:
        return time.time() + self.jump


@pytest.mark.parametrize("jump", [-HOUR, HOUR, YEAR, -YEAR])
def test_the_clock_jumps_while_a_processor_runs(
    box: Outbox, server: SMTPServer, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """What comes after the jump is sent; what was deferred before it is tried again; once each."""
    monkeypatch.setattr("cpsmailaccess_delivery.agenda.LONGEST_SLEEP", 0.1)
    clock = Clock()
    schedule = Schedule(first=0.2, longest=0.2, jitter=0.0, delay_notice=0.0)
    processor = QueueProcessorThread(
        box.spool, box.vault, box.journal, schedule=schedule, helo_name="c.test", clock=clock
    )
    server.on("RCPT", reply="450 4.2.0 later", times=1)
    send(box, "deferred")
    processor.start()
    server.wait_until(lambda: server.sessions, DEADLINE)
    clock.jump = jump
    send(box, "after")
    server.wait_for(2, DEADLINE)
    assert processor.stop(DEADLINE)
    assert names_of(server) == ["after", "deferred"]
    assert list(box.spool.scan()) == []


@pytest.mark.parametrize("jump", [-HOUR, YEAR])
def test_the_clock_jumped_between_stop_and_start(
    box: Outbox, server: SMTPServer, jump: float
) -> None:
    server.on("RCPT", reply="450 4.2.0 later", times=1)
    send(box, "deferred")
    box.processor().run(forever=False)
    assert [entry.state for entry in box.spool.scan()] == [State.DEFERRED]
    clock = Clock()
    clock.jump = jump + 2 * HOUR  # it would be due by then
    schedule = Schedule(first=1.0, longest=HOUR, jitter=0.0)
    QueueProcessorThread(
        box.spool, box.vault, box.journal, schedule=schedule, helo_name="c.test", clock=clock
    ).run(forever=False)
    assert names_of(server) == ["deferred"]


def test_a_mail_is_not_given_up_because_of_the_clock_alone(box: Outbox, server: SMTPServer) -> None:
    """A year has passed, says the clock; its first refusal is still no reason to give up."""
    send(box)
    server.on("RCPT", reply="450 4.2.0 later")
    clock = Clock()
    clock.jump = YEAR
    schedule = Schedule(delay_notice=0.0)
    processor = QueueProcessorThread(
        box.spool, box.vault, box.journal, schedule=schedule, helo_name="c.test", clock=clock
    )
    assert processor.run(forever=False).deferred == 1
    assert [entry.state for entry in box.spool.scan()] == [State.DEFERRED]


# Forks


def test_preloaded_then_forked(box: Outbox, server: SMTPServer) -> None:
    """As gunicorn --preload does: each worker commits its own; what the parent has is its own."""
    processor = box.processor()
    processor.start()
    send(box, "before")
    server.wait_for(1, DEADLINE)  # the journal's thread runs, too
    transaction.begin()
    box.delivery.send(ALICE, ["b@example.net"], "Message-Id: <parent@example.org>\n\nx\n")
    children = []
    for number in range(3):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                transaction.abort()  # what the parent staged is not the child's to remove
                send(box, f"child{number}")
                box.journal.flush()
                begun = time.monotonic()
                box.close()  # the processor is the parent's: nothing to wait for
                status = 0 if time.monotonic() - begun < 10 else 2
            finally:
                os._exit(status)
        children.append(pid)
    for pid in children:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    transaction.commit()
    server.wait_for(5, DEADLINE)
    assert processor.is_alive()
    assert processor.stop(DEADLINE)
    assert names_of(server) == ["before", "child0", "child1", "child2", "parent"]
    assert box.status("parent@example.org").state == "accepted"
    assert box.spool.left_overs() == []


def test_a_forked_child_ends_at_once(tmp_path: Path) -> None:
    """At its exit the processor of its parent is not waited for."""
    code = """
import os, sys, time
from cpsmailaccess_delivery import Outbox
outbox = Outbox(sys.argv[1])
processor = outbox.processor()
processor.start()
while processor.scheduler is None:
    time.sleep(0.01)
pid = os.fork()
if not pid:
    sys.exit(0)  # runs what is registered with atexit
begun = time.monotonic()
os.waitpid(pid, 0)
print(time.monotonic() - begun)
assert processor.is_alive() and processor.stop(20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "box")],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    assert float(done.stdout) < 10.0


def test_a_processor_made_before_the_fork_runs_in_the_child(
    box: Outbox, server: SMTPServer
) -> None:
    processor = box.processor()
    send(box)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            processor.start()
            deadline = time.monotonic() + DEADLINE
            while list(box.spool.scan()) and time.monotonic() < deadline:
                threading.Event().wait(0.01)
            status = 0 if processor.stop(DEADLINE) else 2
        finally:
            os._exit(status)
    server.wait_for(1, DEADLINE)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# Two spools, moved spools, other hosts


def test_two_spools_in_one_process(tmp_path: Path) -> None:
    with (
        SMTPServer() as one,
        SMTPServer() as two,
        Outbox(tmp_path / "one", helo_name="c.test") as first,
        Outbox(tmp_path / "two", helo_name="c.test") as second,
    ):
        for outbox, server in ((first, one), (second, two)):
            put(outbox, server)
        processors = [first.processor(), second.processor()]
        for processor in processors:
            processor.start()
        with transaction.manager:
            for outbox, name in ((first, "one"), (second, "two")):
                message = f"Message-Id: <{name}@example.org>\n\nx\n"
                outbox.delivery.send(ALICE, ["bob@example.net"], message)
        for server, name in ((one, "one"), (two, "two")):
            server.wait_for(1, DEADLINE)
            assert names_of(server) == [name]
        for processor in processors:
            assert processor.stop(DEADLINE)
        assert [first.status("one@example.org").state] == ["accepted"]


def test_a_spool_moved_while_stopped(
    tmp_path: Path, server: SMTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To another place, on a host of another name, with its key: everything is as it was."""
    with Outbox(tmp_path / "old", helo_name="c.test") as outbox:
        with transaction.manager:
            outbox.accounts.put(
                Account(
                    mailbox="*",
                    host=server.host,
                    port=server.port,
                    security="plain",
                    username="u",
                    password="p",
                )
            )
        send(outbox, "queued", idempotency_key="k")
        send(outbox, "held")
        outbox.queue.hold("held@example.org", "wait")
    (tmp_path / "new").mkdir()
    (tmp_path / "old").rename(tmp_path / "new" / "box")
    with Outbox(tmp_path / "new" / "box") as outbox, pytest.raises(WrongKey, match="key"):
        outbox.vault.get("*")
    (tmp_path / "old.key").rename(tmp_path / "new" / "box.key")
    monkeypatch.setattr(socket, "gethostname", lambda: "another.example.com")
    server.users["u"] = "p"
    with Outbox(tmp_path / "new" / "box") as outbox:
        assert send(outbox, "again", idempotency_key="k") == "queued@example.org"
        outbox.processor().run(forever=False)
        assert names_of(server) == ["queued"]
        outbox.queue.release("held@example.org")
        outbox.processor().run(forever=False)
        assert names_of(server) == ["held", "queued"]
    assert not (tmp_path / "old").exists()


# Files put there by hand


def test_files_put_there_by_hand(box: Outbox, server: SMTPServer) -> None:
    root = Path(box.location)
    send(box, "ours")
    for where, name in (
        ("new", "1700000000.M1P2.host"),
        ("cur", "1700000001.M1P2.host:2,S"),
        ("new", "by hand"),
    ):
        (root / where / name).write_bytes(ZOPE_SENDMAIL % name.split()[0][:10].encode())
    for where in ("new", "cur", "tmp", "outcomes", "keys", "lanes", "presence", "accounts"):
        (root / where).mkdir(exist_ok=True)
        (root / where / "garbage").write_bytes(b"\0\xff garbage")
        (root / where / ("x" * 200)).write_bytes(b"")
        (root / where / f"directory in {where}").mkdir()
        os.mkfifo(root / where / f"pipe in {where}")
    summary = box.processor().run(forever=False)
    assert names_of(server) == ["1700000000", "1700000001", "by", "ours"]
    assert summary.accepted == 4
    held = [entry for entry in box.spool.scan() if entry.state is State.HELD]
    assert len(held) == len(list(box.spool.scan())) == 8
    send(box, "next")
    assert box.processor().run(forever=False).accepted == 1
    assert [account.mailbox for account in box.accounts.list()] == ["*"]


# Links


PARTS = ["tmp", "new", "cur", "outcomes", "keys", "lanes", "accounts", "presence"]


@pytest.mark.parametrize("name", [*PARTS, "journal.sqlite"])
@pytest.mark.parametrize("there", [True, False])
def test_a_part_that_is_a_link_is_refused(tmp_path: Path, name: str, there: bool) -> None:
    site = Site(tmp_path)
    site.account()
    elsewhere = tmp_path / "elsewhere"
    part = site.path / name
    if part.is_dir():
        part.rename(tmp_path / "before")
    else:
        part.unlink(missing_ok=True)
    if there:
        elsewhere.mkdir()
    part.symlink_to(elsewhere)
    files = open_files()
    with pytest.raises(SpoolError, match=f"{name}.*symbolic link"):
        Outbox(site.path)
    assert open_files() <= files
    answer = site.json("doctor", code=1)
    (finding,) = (each for each in answer["findings"] if each["level"] == "fail")
    assert str(part) in finding["text"]
    assert "symbolic link" in finding["text"]
    for command in (("queue",), ("drain",), ("accounts", "list")):
        assert "symbolic link" in site.run(*command, code=None).output
    assert not there or list(elsewhere.iterdir()) == []
    assert there or not elsewhere.exists()


@pytest.mark.parametrize("name", ["lanes", "accounts", "presence"])
def test_a_part_that_becomes_a_link_is_not_followed(box: Outbox, tmp_path: Path, name: str) -> None:
    """While the outbox is open: what is behind it is neither read nor changed."""
    root = Path(box.location)
    note = LaneNote("r", "relay", "down", 1.0, 2.0)
    box.spool.note_lane("0" * 16, note)
    elsewhere = tmp_path / "elsewhere"
    (root / name).rename(elsewhere)
    (root / name).symlink_to(elsewhere)
    before = sorted(elsewhere.iterdir())
    if name == "lanes":
        assert box.spool.lane_note("0" * 16) is None
        assert box.spool.lane_notes() == {}
        with pytest.raises(SpoolError, match="symbolic link"):
            box.spool.note_lane("0" * 16, note)
    elif name == "accounts":
        for call in (
            lambda: box.vault.get("*"),
            lambda: [each.mailbox for each in box.vault.accounts()],
            lambda: put(box, SMTPServer(port=25)),
            lambda: box.vault.stage("*", Account(mailbox="*", host="relay.example.org")),
            lambda: send(box),
        ):
            with pytest.raises((VaultError, OutboxError), match="symbolic link"):
                call()
            transaction.abort()
    else:
        with pytest.raises(SpoolError, match="symbolic link"):
            box.presence.is_alive("0" * 16)
    assert sorted(elsewhere.iterdir()) == before


def test_a_lock_or_register_that_is_a_link_is_not_followed(box: Outbox, tmp_path: Path) -> None:
    accounts, elsewhere = Path(box.location, "accounts"), tmp_path / "elsewhere"
    account = Account(mailbox="*", host="relay.example.org")
    with transaction.manager:
        box.accounts.put(account)
    lock = accounts / "lock"
    lock.unlink()
    lock.symlink_to(elsewhere)
    with pytest.raises(VaultError, match="symbolic link"):
        box.vault.stage("*", account)
    assert not elsewhere.exists()
    lock.unlink()
    (register,) = accounts.glob("register-*")
    register.rename(elsewhere)
    register.symlink_to(elsewhere)
    with Outbox(box.location) as again, pytest.raises(VaultError, match="symbolic link"):
        again.vault.get("*")


def test_a_staged_mail_that_becomes_a_link_is_not_followed(
    box: Outbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it points to would get the mode of a mail."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    victim.chmod(0o644)
    monkeypatch.setattr(staging, "_MAX_OPEN", 0)
    box.delivery.send(ALICE, ["bob@example.net"], b"Subject: x\n\nx")
    (path,) = Path(box.location, "tmp").iterdir()
    path.unlink()
    path.symlink_to(victim)
    with pytest.raises(OutboxError, match="symbolic link"):
        transaction.commit()
    transaction.abort()
    assert victim.stat().st_mode & 0o777 == 0o644
    assert victim.read_bytes() == b"precious"


def test_a_mail_or_its_outcomes_that_are_a_link_are_not_followed(
    box: Outbox, tmp_path: Path
) -> None:
    send(box)
    (entry,) = box.spool.scan()
    lease = box.spool.claim(entry)
    after = lease.settle(Settlement(State.DEFERRED, reason="later", attempts=1, due=9e9))
    side = Path(box.location, "outcomes", entry.id)
    side.rename(tmp_path / "side")
    side.symlink_to(tmp_path / "side")
    with pytest.raises(SpoolError, match="symbolic link"):
        box.spool.load(after)
    side.unlink()
    (mail,) = Path(box.location, "cur").iterdir()
    mail.rename(tmp_path / "mail")
    mail.symlink_to(tmp_path / "mail")
    assert box.spool.claim(after) is None
    (held,) = box.spool.scan()
    assert held.state is State.HELD
    with pytest.raises(InvalidEnvelope, match="symbolic links"):
        box.spool.load(held)


def test_links_among_the_files_are_not_followed(
    box: Outbox, server: SMTPServer, tmp_path: Path
) -> None:
    root = Path(box.location)
    secret = tmp_path / "secret"
    secret.write_bytes(ZOPE_SENDMAIL % b"secret")
    send(box, "keyed", idempotency_key="k")
    (key,) = (root / "keys").glob("?" * 32)
    box.spool.sweep()
    for where in PARTS:
        (root / where).mkdir(exist_ok=True)
        (root / where / "link").symlink_to(secret)
        (root / where / "0000000000000000").symlink_to(secret)
        (root / where / "dangling").symlink_to(tmp_path / "nowhere")
    (root / "keys" / ".pruned").unlink()
    (root / "keys" / ".pruned").symlink_to(secret)
    before = secret.stat()
    summary = box.processor().run(forever=False)
    assert summary.accepted == 1
    for _ in range(2):
        box.spool.sweep()
        box.vault.sweep()
    assert names_of(server) == ["keyed"]
    key.unlink()
    key.symlink_to(secret)
    with pytest.raises(OutboxError, match="symbolic link"):
        send(box, "again", idempotency_key="k")
    transaction.abort()
    assert secret.read_bytes() == ZOPE_SENDMAIL % b"secret"
    assert secret.stat().st_mtime_ns == before.st_mtime_ns
    assert secret.stat().st_mode == before.st_mode
    assert not (tmp_path / "nowhere").exists()


def test_the_doctor_names_links(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.account()
    for where in ("new", "accounts", "presence"):
        (site.path / where / "link").symlink_to("/etc/passwd")
    texts = [f["text"] for f in site.json("doctor", code=1)["findings"] if f["check"] == "access"]
    for where in ("new", "accounts", "presence"):
        assert f"{site.path}/{where}/link is a symbolic link" in texts


def test_a_link_to_the_outbox_is_the_outbox(tmp_path: Path, server: SMTPServer) -> None:
    """Only its parts may be none: where it lies is its administrator's affair."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "box").symlink_to(tmp_path / "disk")
    with Outbox(tmp_path / "box", helo_name="c.test") as outbox:
        put(outbox, server)
        send(outbox)
        assert outbox.processor().run(forever=False).accepted == 1


# Owners and modes

NOBODY = 65_534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


@pytest.fixture
def site() -> Iterator[Site]:
    """An outbox of nobody, with one mail; everything that `cpsmail` imports is imported."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own are below one that is root's alone
        home = Path(name)
        site = Site(home)
        site.account()
        site.send()
        site.run("doctor", code=None)
        codecs.lookup("ascii")  # nobody may be unable to read the interpreter's own modules
        for path in (home, *home.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        yield site


def as_nobody(site: Site, *command: str) -> tuple[int, str]:
    """Run ``cpsmail`` as nobody; return exit code and output."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 99
        try:
            os.chdir("/")
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            result = CliRunner().invoke(cli, list(command), env=site.environ)
            os.write(writer, result.output.encode())
            status = result.exit_code
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, encoding="utf-8") as stream:
        output = stream.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), output


@only_root
@pytest.mark.parametrize("part", ["", "tmp", "new", "accounts", "presence"])
def test_a_part_of_another_user(site: Site, part: str) -> None:
    """One line that says so and no traceback; nothing is lost."""
    os.chown(site.path / part, 0, 0)
    for command in ("doctor", "drain"):
        code, output = as_nobody(site, command)
        assert code not in (0, 99), output
        assert "Traceback" not in output
        assert "ermission" in output or "belongs to user" in output
    assert len(list((site.path / "new").iterdir())) == 1


@only_root
def test_a_mail_of_another_user_is_held_and_named(site: Site) -> None:
    (mail,) = (site.path / "new").iterdir()
    os.chown(mail, 0, 0)
    code, output = as_nobody(site, "drain")
    assert "1 held" in output, output
    code, output = as_nobody(site, "doctor")
    assert (code, "1 files belong to other users" in output) == (1, True), output
    assert len(list((site.path / "cur").iterdir())) == 1


@only_root
def test_modes_that_others_may_use_are_named(site: Site) -> None:
    (site.path / "new").chmod(0o777)
    code, output = as_nobody(site, "doctor")
    assert code == 1
    assert f"others may use {site.path}/new (777)" in output
