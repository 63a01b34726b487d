"""What a process had recorded when it was killed: the next one writes it to the journal."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import transaction

from cpsmailaccess_delivery import Account, Outbox, State, journal_file
from cpsmailaccess_delivery import journal as journal_module
from cpsmailaccess_delivery.journal import Event, Journal
from cpsmailaccess_delivery.testing import SMTPServer

DEADLINE = 30.0
ALICE, BOB = "alice@example.org", "bob@example.net"

#: The writer comes an hour later, if nobody hurries it.
LATE = """if True:
    import os, signal, sys
    from cpsmailaccess_delivery import journal
    from cpsmailaccess_delivery.journal import Event, Journal
    journal._DELAY = 3600.0
    made = Journal(sys.argv[1], clock=lambda: 9.0)
    def record(number):
        made.record(Event(float(number), "accepted", "entry", f"{number}@x", recipient="b@x"))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    made = Journal(path, clock=lambda: 9.0)
    yield made
    made.close()


def run(code: str, path: Path) -> int:
    done = subprocess.run([sys.executable, "-c", LATE + code, str(path)], timeout=60, check=False)
    return done.returncode


def tails(path: Path) -> list[Path]:
    return sorted(path.parent.glob("journal.sqlite.*.[01]"))


def times(journal: Journal, *numbers: int) -> list[float]:
    return [e.at for number in numbers for e in journal.events(message_id=f"{number}@x")]


def event(number: int) -> Event:
    return Event(float(number), "accepted", "entry", f"{number}@x", recipient="b@x")


def test_what_a_killed_process_had_recorded(path, journal):
    code = "    for n in range(3): record(n)\n    os.kill(os.getpid(), signal.SIGKILL)"
    assert run(code, path) == -signal.SIGKILL
    assert journal.counts(0.0) == {}
    assert journal.recover() == 3
    assert times(journal, 0, 1, 2) == [0.0, 1.0, 2.0]
    assert tails(path) == []
    assert journal.recover() == 0


def test_what_it_had_written_is_not_written_again(path, journal):
    code = (
        "    os.ftruncate = lambda *args: None  # nothing is forgotten\n"
        "    record(1); made.flush(); record(2); made.flush(); record(3)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run(code, path) == -signal.SIGKILL
    assert journal.recover() == 1
    assert times(journal, 1, 2, 3) == [1.0, 2.0, 3.0]


def test_of_one_that_lives_nothing_is_taken(path, journal, monkeypatch):
    monkeypatch.setattr(journal_module, "_DELAY", 3600.0)
    living = Journal(path, clock=lambda: 9.0)
    living.record(event(1))
    assert len(tails(path)) == 2
    assert journal.recover() == 0
    assert living.recover() == 0
    assert len(tails(path)) == 2
    living.close()
    assert tails(path) == []
    assert times(journal, 1) == [1.0]


def test_a_child_that_lives_keeps_nothing_from_being_taken(path, journal):
    code = (
        "    record(1)\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os.close(0); os.setsid(); signal.pause()\n"
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", LATE + code, str(path)], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    try:
        assert parent.wait(DEADLINE) == -signal.SIGKILL
        assert journal.recover() == 1
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()
    assert times(journal, 1) == [1.0]


def test_a_child_has_a_tail_of_its_own(path, journal):
    code = (
        "    record(1)\n"
        "    if not os.fork():\n"
        "        record(2)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    os.wait()\n"
        "    made.close()"
    )
    assert run(code, path) == 0
    assert journal.counts(0.0) == {"accepted": 1}
    assert journal.recover() == 1
    assert times(journal, 1, 2) == [1.0, 2.0]


def test_what_cannot_be_written_at_the_end_is_left_to_the_next(path, journal, monkeypatch):
    monkeypatch.setattr(journal_file, "_BUSY", 0.01)
    journal.record(event(0))
    journal.flush()
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        ending = Journal(path, clock=lambda: 9.0)
        ending.record(event(1))
        ending.close()
    assert journal.recover() == 1
    assert times(journal, 1) == [1.0]


def test_killed_while_the_journal_could_not_be_written(path, journal):
    code = (
        "    journal.JournalFile.write.__globals__['_BUSY'] = 0.01\n"
        "    for n in range(1, 5): record(n); made.flush()\n"
        "    assert 'locked' in made.trouble\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    journal.record(event(0))
    journal.flush()
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert run(code, path) == -signal.SIGKILL
    assert journal.recover() == 4
    assert times(journal, 1, 2, 3, 4) == [1.0, 2.0, 3.0, 4.0]


def test_nothing_is_begun_after_the_end(path, journal):
    journal.close()
    journal.record(event(1))
    assert tails(path) == []


def test_it_does_not_grow(path, journal):
    for number in range(100):
        journal.record(event(number))
        journal.flush()
        assert sum(tail.stat().st_size for tail in tails(path)) < 1000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'[1.0,"acc',
        b"[" * 100_000 + b"\n",
        b'{"at": 1}\n',
        b"\xff\xfe\n\n",
        b"17\n",
        b'[1.0,"accepted","e","x@x","","","b@x",1,"","","too many"]\n',
        b'["now","accepted","e","x@x"]\n',
    ],
)
def test_what_is_no_event_is_passed_over(path, journal, data):
    tail = path.parent / f"journal.sqlite.{'0' * 16}.0"
    tail.write_bytes(data + b"\n" + json.dumps(event(1)).encode() + b"\n")
    assert journal.recover() == 1
    assert times(journal, 1) == [1.0]
    assert not tail.exists()


def test_a_link_is_not_followed(path, journal, tmp_path, caplog):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(json.dumps(event(1)).encode() + b"\n")
    tail = path.parent / f"journal.sqlite.{'0' * 16}.0"
    tail.symlink_to(elsewhere)
    assert journal.recover() == 0
    assert elsewhere.exists()
    assert "cannot be read" in caplog.text


def test_a_journal_does_without(path, journal, monkeypatch, caplog):
    """A full disk: said once, and the journal is written all the same."""
    real = os.write

    def full(fd: int, data: bytes) -> int:
        if b"accepted" in data:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            journal.record(event(number))
    assert times(journal, 0, 1, 2) == [0.0, 1.0, 2.0]
    assert caplog.text.count("its last events are lost") == 1


def test_one_that_is_taken_over_before_it_is_locked(path, journal, monkeypatch):
    """By who looks for the dead in that moment: then it begins anew with the next event."""
    monkeypatch.setattr(journal_module, "_DELAY", 3600.0)
    real, looks = fcntl.flock, [True]

    def flock(fd: int, how: int) -> None:
        if looks:
            looks.pop()
            assert Journal(path).recover() == 0
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    journal.record(event(1))
    assert tails(path) == []
    journal.record(event(2))
    assert len(tails(path)) == 2


def test_a_line_that_was_cut_spoils_no_other(path, journal):
    code = (
        "    write, sizes = os.write, [20]\n"
        "    os.write = lambda fd, data: write(fd, data[: sizes.pop() if sizes else None])\n"
        "    record(1); record(2)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run(code, path) == -signal.SIGKILL
    assert journal.recover() == 1
    assert times(journal, 1, 2) == [2.0]


@pytest.mark.parametrize("who", ["its sender asks", "a processor starts"])
def test_the_fate_of_a_mail_whose_processor_was_killed(tmp_path, who):
    """Killed in the moment after the mail has left the spool; its sender is told all the same."""
    code = """if True:
        import os, signal, sys
        from cpsmailaccess_delivery import Outbox, journal
        from cpsmailaccess_delivery.spool.lease import Lease
        journal._DELAY = 3600.0
        settle = Lease.settle
        Lease.settle = lambda *args: (settle(*args), os.kill(os.getpid(), signal.SIGKILL))
        Outbox(sys.argv[1], key=bytes(32)).processor().run(forever=False)
    """
    with SMTPServer() as relay, Outbox(tmp_path / "box", key=bytes(32)) as outbox:
        with transaction.manager:
            account = Account(mailbox=ALICE, host=relay.host, port=relay.port, security="plain")
            outbox.accounts.put(account)
        with transaction.manager:
            message_id = outbox.delivery.send(ALICE, [BOB], b"Subject: hello\r\n\r\nhello\r\n")
        killed = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "box")], timeout=60, check=False
        )
        assert killed.returncode == -signal.SIGKILL
        assert list(outbox.spool.scan()) == []
        if who == "its sender asks":
            status = outbox.status(message_id)
            assert status.state is State.ACCEPTED
            assert status.recipients[BOB].reply.startswith("250")
        else:
            assert outbox.processor().run(forever=False).accepted == 0
        assert outbox.journal.counts(0.0) == {"accepted": 1}
