"""The journal, with real files, threads and processes: found again, and never in the way."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from zope.interface.verify import verifyObject

from cpsmailaccess_delivery import journal as journal_module
from cpsmailaccess_delivery.interfaces import IJournal, Outcome, State
from cpsmailaccess_delivery.journal import Event, Journal

DAY = 86400.0
DEADLINE = 30.0
NOW = 2000.0  # seconds since the epoch: nothing here is old


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "out box?#%" / "journal.sqlite"


@pytest.fixture
def make(path):
    made = []
    path.parent.mkdir()

    def make(**settings) -> Journal:
        made.append(Journal(path, **({"clock": lambda: NOW} | settings)))
        return made[-1]

    yield make
    for journal in made:
        journal.close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(journal_module, "_RETRY", 0.01)
    monkeypatch.setattr("cpsmailaccess_delivery.journal_file._BUSY", 0.01)


def event(n: int = 1, **values) -> Event:
    defaults = {
        "at": 1000.0 + n,
        "kind": State.ACCEPTED,
        "message_id": f"{n}@example.org",
        "sender": "alice@example.org",
        "recipient": f"bob{n}@example.net",
    }
    return Event(**(defaults | values))


@pytest.fixture
def run():
    processes = []

    def run(code: str, *arguments: object) -> subprocess.Popen[str]:
        processes.append(_run(code, *arguments))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def _run(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def until(condition: Callable[[], object]) -> None:
    """Flush until it holds; the number of rounds is the deadline."""
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("never")


def test_contract(make):
    assert verifyObject(IJournal, make())


def test_nothing_on_disk_and_no_thread_until_the_first_event(make, path):
    before = set(threading.enumerate())
    journal = make()
    assert journal.events(message_id="x") == []
    assert journal.events(address="x") == []
    assert journal.last_outcomes("x") == {}
    assert journal.counts(0) == {}
    journal.flush()
    journal.close()
    assert os.listdir(path.parent) == []
    assert set(threading.enumerate()) <= before


def test_found_by_message_id_and_address(make):
    journal = make()
    first = event(
        1,
        entry="1000.1",
        mailbox="@example.org",
        attempt=3,
        reply="250 ok",
        relay="smtp.example.org:25",
    )
    events = [first, event(2), event(3, sender="bob1@example.net"), event(4, recipient="")]
    for each in reversed(events):
        journal.record(each)
    assert journal.events(message_id="1@example.org") == [first]
    assert journal.events(address="BOB1@Example.net") == [first, events[2]]
    assert journal.events(address="alice@example.org") == [events[0], events[1], events[3]]
    assert journal.events(address="alice@example.org", limit=2) == [events[1], events[3]]
    assert journal.events(address="%") == []
    assert journal.counts(1002.0) == {"accepted": 3}


def test_sender_who_is_recipient_is_listed_once(make):
    journal = make()
    journal.record(event(recipient="alice@example.org"))
    assert len(journal.events(address="alice@example.org")) == 1


def test_many_and_in_order(make):
    journal = make()
    events = [event(n, message_id="x@y") for n in range(5003)]
    for each in events:
        journal.record(each)
    assert journal.events(message_id="x@y", limit=10_000) == events


def test_written_soon_without_a_flush(make):
    journal = make()
    journal.record(event())
    other = make()  # of another process, say: it has nothing to flush
    until(lambda: other.events(message_id="1@example.org"))


def test_last_outcomes(make):
    journal = make()
    for at, kind, recipient, reply in [
        (1, State.QUEUED, "a@x", ""),
        (2, State.DEFERRED, "a@x", "450 later"),
        (2, State.ACCEPTED, "b@x", "250 ok"),
        (3, "paused", "a@x", ""),
        (4, State.REFUSED, "a@x", "550 no"),
        (5, State.HELD, "", "of the mail as a whole"),
        (6, State.QUEUED, "b@x", "a clock that is ahead"),
    ]:
        journal.record(Event(at, kind, message_id="m", recipient=recipient, reply=reply))
    assert journal.last_outcomes("m") == {
        "a@x": Outcome(State.REFUSED, "550 no", 4),
        "b@x": Outcome(State.ACCEPTED, "250 ok", 2),
    }
    assert journal.last_outcomes("other") == {}


@pytest.mark.parametrize(
    "reply",
    ["'); DROP TABLE events; --", "a\0b", "a\r\nb\x1b[31m", "é \u202e 🎉", "x" * 1_000_000],
)
def test_hostile_text_is_kept_as_it_is(make, reply):
    journal = make()
    journal.record(event(reply=reply, sender=reply[:50]))
    assert journal.events(message_id="1@example.org")[0].reply == reply
    assert len(journal.events(address=reply[:50])) == 1


def test_what_cannot_be_stored_harms_no_other(make):
    journal = make()
    journal.record(event(1, reply="lone \udc80 surrogate"))
    journal.record(event(2, attempt=10**30))
    journal.record(event(3, at="no time"))
    journal.record(event(4, reply=b"bytes", kind=None))
    journal.record(event(5))
    found = journal.events(address="alice@example.org")
    assert [each.message_id[0] for each in found] == ["1", "2", "4", "5"]
    assert found[0].reply == r"lone \udc80 surrogate"
    assert journal.trouble == ""


def test_modes_whatever_the_umask(make, path):
    before = os.umask(0)
    try:
        journal = make()
        journal.record(event())
        journal.flush()
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert set(modes.values()) == {0o600}
    assert len([name for name in modes if name.endswith((".0", ".1"))]) == 2  # see `journal_tail`
    assert set(modes) > {"journal.sqlite" + end for end in ("", "-wal", "-shm", ".lock")}
    assert len(modes) == 6


def test_two_processes_write_one_file(make, path, run):
    code = (
        "import sys; from cpsmailaccess_delivery.journal import Event, Journal\n"
        "journal = Journal(sys.argv[1], clock=lambda: 9.0)\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for n in range(2000):\n"
        "    journal.record(Event(float(n), 'accepted', message_id=sys.argv[2]))\n"
        "journal.close(); print(journal.trouble)"
    )
    writers = [run(code, path, name) for name in "abcdef"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        assert writer.communicate(timeout=60)[0].strip() == ""
    for name in "abcdef":
        assert len(make().events(message_id=name, limit=9999)) == 2000
    assert not list(path.parent.glob("*.damaged"))


def test_process_that_ends_without_close_loses_nothing(make, path, run):
    code = (
        "import sys; from cpsmailaccess_delivery.journal import Event, Journal\n"
        "Journal(sys.argv[1], clock=lambda: 9.0).record(Event(1.0, 'accepted', message_id='m'))"
    )
    run(code, path).communicate(timeout=60)
    assert len(make().events(message_id="m")) == 1


@pytest.mark.parametrize("companions", [True, False])
def test_deleted_while_open(make, path, companions):
    journal, other = make(), make()
    for each in (journal, other):
        each.record(event(1))
        each.flush()
    for name in os.listdir(path.parent):
        if companions or name == path.name:
            (path.parent / name).unlink()
    for n, each in enumerate((journal, other, journal), 2):
        each.record(event(n))
        each.flush()
    journal.close()
    found = other.events(address="alice@example.org")
    assert [each.message_id[0] for each in found] == ["2", "3", "4"]
    other.close()
    assert len(make().events(address="alice@example.org")) == 3


GARBAGE = {
    "text": b"this is no database, whatever its name says" * 100,
    "empty": b"",
    "header": b"SQLite format 3\0" + b"\xff" * 4096,
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_damaged_is_set_aside(make, path, caplog, content):
    path.write_bytes(content)
    journal = make()
    assert journal.events(message_id="1@example.org") == []
    assert path.read_bytes() == content, "readers change nothing"
    journal.record(event())
    assert len(journal.events(message_id="1@example.org")) == 1
    assert Path(f"{path}.damaged").read_bytes() == content
    assert ".damaged" in caplog.text


def test_damaged_while_open(make, path):
    journal = make()
    for n in range(3000):
        journal.record(event(n))
    journal.close()
    with open(path, "r+b") as stream:
        stream.seek(4096)
        stream.write(b"\xff" * (path.stat().st_size - 4096))
    journal = make()
    journal.record(event(1, message_id="after"))
    assert len(journal.events(message_id="after")) == 1
    assert Path(f"{path}.damaged").exists()


def test_schema_of_another_release_or_program(make, path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
        connection.execute("PRAGMA user_version = 77")
    connection.close()
    journal = make()
    journal.record(event())
    assert len(journal.events(message_id="1@example.org")) == 1
    connection = sqlite3.connect(f"{path}.damaged")
    assert connection.execute("PRAGMA user_version").fetchone() == (77,)
    connection.close()


def test_link_is_not_followed(make, path, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path.symlink_to(victim)
    journal = make()
    journal.record(event())
    assert len(journal.events(message_id="1@example.org")) == 1
    assert victim.read_bytes() == b"precious"


def test_link_to_another_journal_is_not_followed(make, path, tmp_path):
    elsewhere = tmp_path / "elsewhere" / "journal.sqlite"
    elsewhere.parent.mkdir()
    other = Journal(elsewhere)
    other.record(event(1))
    other.close()
    before = elsewhere.read_bytes()
    path.symlink_to(elsewhere)
    journal = make()
    journal.record(event(2))
    journal.flush()
    assert not path.is_symlink()
    assert len(journal.events(message_id="2@example.org")) == 1
    assert elsewhere.read_bytes() == before


def test_lock_that_is_a_link_is_not_followed(make, path, tmp_path):
    victim = tmp_path / "victim"
    path.with_name(path.name + ".lock").symlink_to(victim)
    journal = make()
    journal.record(event())
    journal.flush()
    assert "symbolic link" in journal.trouble
    assert not victim.exists()


def test_locked_by_somebody_is_written_later(make, path, caplog, impatient):
    journal = make()
    journal.record(event(1))
    journal.flush()
    locker = sqlite3.connect(path, isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    journal.record(event(2))
    journal.flush()
    assert "locked" in journal.trouble
    assert len(journal.events(address="alice@example.org")) == 1, "readers do not wait"
    locker.execute("ROLLBACK")
    locker.close()
    until(lambda: len(journal.events(address="alice@example.org")) == 2)
    assert journal.trouble == ""
    assert caplog.text.count("trying again") == 1


def test_lock_file_held_by_somebody(make, path, impatient):
    with open(f"{path}.lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        journal = make()
        journal.record(event())
        journal.flush()
        assert journal.trouble
    until(lambda: journal.events(message_id="1@example.org"))


def test_directory_that_is_gone_drops_at_close_with_one_line(make, path, caplog, impatient):
    path.parent.rmdir()
    journal = make()
    for n in range(10):
        journal.record(event(n))
        journal.flush()
    assert journal.trouble
    journal.close()
    assert journal.events(message_id="1@example.org") == []
    assert caplog.text.count("cannot be written") == 1
    path.parent.mkdir()


def test_read_only_directory(impatient):
    """In a child that gives up root, if we have it: root may write anywhere."""
    with tempfile.TemporaryDirectory(prefix="cpsmail-") as directory:
        journal = Journal(Path(directory, "journal.sqlite"), clock=lambda: NOW)
        journal.record(event(1))
        journal.close()
        os.chmod(journal.path, 0o644)
        os.chmod(directory, 0o555)
        child = os.fork()
        if not child:
            code = 1
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                reader = Journal(journal.path, clock=lambda: NOW)
                reader.record(event(2))
                reader.flush()
                assert reader.trouble
                found = reader.events(address="alice@example.org")
                reader.close()
                assert [each.at for each in found] == [1001.0]
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        os.chmod(directory, 0o700)
        assert sorted(os.listdir(directory)) == ["journal.sqlite", "journal.sqlite.lock"]
        again = Journal(journal.path, clock=lambda: NOW)
        assert [each.at for each in again.events(address="alice@example.org")] == [1001.0]
        again.close()


def test_memory_is_bounded_and_what_is_lost_is_told(make, path, caplog, impatient, monkeypatch):
    monkeypatch.setattr(journal_module, "_LIMIT", 100)
    path.parent.rmdir()
    journal = make()
    for n in range(1000):
        journal.record(event(n))
        assert len(journal._events) <= 100
    journal.flush()
    assert len(journal._batch) <= 200
    path.parent.mkdir()
    until(lambda: journal.record(event(0, message_id="x")) or journal.events(message_id="x"))
    assert "lacks" in caplog.text


def test_gives_up_after_a_while(make, path, caplog, impatient, monkeypatch):
    monkeypatch.setattr(journal_module, "_GIVE_UP", 0.0)
    path.parent.rmdir()
    journal = make()
    journal.record(event(1))
    until(lambda: journal._events.dropped)
    path.parent.mkdir()
    journal.record(event(2))
    found = journal.events(address="alice@example.org")
    assert [each.message_id for each in found] == ["2@example.org"]
    journal.record(event(3))
    journal.flush()
    assert caplog.text.count("lacks 1 events") == 1


def test_child_starts_afresh(make, path, run):
    code = """if True:
        import os, sys, threading
        from cpsmailaccess_delivery.journal import Event, Journal
        journal = Journal(sys.argv[1], clock=lambda: 9.0)
        journal.record(Event(1.0, "accepted", message_id="parent"))
        journal.flush()
        journal.record(Event(2.0, "accepted", message_id="parent"))  # pending while we fork
        child = os.fork()
        journal.record(Event(3.0, "accepted", message_id="parent" if child else "child"))
        journal.flush()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            journal.record(Event(4.0, "accepted", message_id="parent"))
        journal.close()
        assert threading.active_count() == 1
    """
    parent = run(code, path)
    parent.communicate(timeout=60)
    assert parent.returncode == 0
    assert [each.at for each in make().events(message_id="parent")] == [1.0, 2.0, 3.0, 4.0]
    assert [each.at for each in make().events(message_id="child")] == [3.0]
    assert not list(path.parent.glob("*.damaged"))


def test_prune(make):
    now = [100 * DAY]
    journal = make(keep_days=30, clock=lambda: now[0])
    for days in (60, 69, 71, 100):
        journal.record(event(days, at=days * DAY))
    assert sorted(each.at / DAY for each in journal.events(address="alice@example.org")) == [
        71,
        100,
    ]
    now[0] += 2 * DAY
    journal.record(event(1, at=now[0]))
    assert [each.at / DAY for each in journal.events(address="alice@example.org")] == [100, 102]
    now[0] -= 100 * DAY  # the clock is put back: nothing is lost
    journal.record(event(1, at=now[0]))
    assert len(journal.events(address="alice@example.org")) == 3


def test_prune_by_slices(make, monkeypatch):
    monkeypatch.setattr(journal_module, "_PRUNE_SLICE", 10)
    journal = make(clock=lambda: 100 * DAY)
    for n in range(25):
        journal.record(event(n))
    journal.flush()
    left = []
    for _ in range(3):
        left.append(len(journal.events(address="alice@example.org")))
        journal.record(event(1, at=100 * DAY, sender="other@example.org"))
        journal.flush()
    assert left == [15, 5, 0]


class Store:
    """Keeps events in memory, or fails."""

    errors = (OSError,)

    def __init__(self) -> None:
        self.fails = ""  # in which of its methods
        self.written: list[Event] = []
        self.pruned: list[float] = []

    def write(self, events: Sequence[Event]) -> None:
        self._fail("write")
        self.written += events

    def prune(self, before: float, most: int) -> int:
        self._fail("prune")
        self.pruned.append(before)
        return 0

    def close(self) -> None:
        pass

    def _fail(self, method: str) -> None:
        if self.fails == method:
            raise OSError("No space left on device")


@pytest.fixture
def stored(monkeypatch):
    """A journal without a file, which tries again when it is flushed; and its clock."""
    monkeypatch.setattr(journal_module, "_RETRY", 3600.0)
    store, now = Store(), [100 * DAY]
    journal = Journal("a test", store=lambda: store, clock=lambda: now[0])
    yield journal, store, now
    journal.close()


def test_each_trouble_has_all_the_patience(stored, monkeypatch):
    journal, store, _ = stored
    store.fails = "write"
    journal.record(event(1))
    journal.flush()
    assert journal.trouble
    store.fails = ""
    journal.flush()
    assert store.written == [event(1)]
    monkeypatch.setattr(journal_module, "_GIVE_UP", 0.0)
    store.fails = "write"
    journal.record(event(2))
    journal.flush()
    store.fails = ""
    journal.flush()
    assert store.written == [event(1), event(2)]


def test_what_was_written_is_not_written_again(stored):
    journal, store, _ = stored
    store.fails = "prune"
    journal.record(event(1))
    journal.flush()
    assert journal.trouble
    journal.record(event(2))
    journal.flush()
    assert store.written == [event(1), event(2)]


def test_a_clock_that_is_put_back_does_not_end_the_pruning(stored):
    journal, store, now = stored
    for days in (0, 0, -1):
        now[0] += days * DAY
        journal.record(event(1))
        journal.flush()
    assert store.pruned == [70 * DAY, 69 * DAY]


def test_closed_twice_and_deaf_then(make):
    journal = make()
    journal.record(event(1))
    journal.close()
    journal.close()
    journal.record(event(2))
    journal.flush()
    assert len(journal.events(address="alice@example.org")) == 1


def test_threads(make):
    journal = make()

    def record(name: int) -> None:
        for n in range(1000):
            journal.record(event(n, message_id=f"{name}"))
            if n % 100 == 0:
                journal.flush()

    threads = [threading.Thread(target=record, args=(n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    for n in range(4):
        assert len(journal.events(message_id=f"{n}", limit=5000)) == 1000
