"""Every call of the commit and of the settle path fails: clean ends only, and it recovers."""

from __future__ import annotations

import errno
import logging
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transaction
from faults import ERRORS, PATHS, Fault, faults, play
from recorder import Call, Recorder, in_memory

from conftest import KEY
from cpsmailaccess_delivery import Account, Outbox, arrivals, claims, recorder
from cpsmailaccess_delivery.errors import OutboxError
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.spool import durable
from cpsmailaccess_delivery.testing import SMTPServer

DEADLINE = 30.0
ALICE, BOB = "alice@example.org", "bob@example.net"
MESSAGE = b"From: alice@example.org\r\nSubject: hello\r\n\r\nhello\r\n"


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def workplace() -> Iterator[Path]:
    with in_memory() as path:
        yield path


@pytest.mark.parametrize("syncfs", [False, True])
@pytest.mark.parametrize("name", PATHS)
def test_every_end_is_a_promised_one(workplace, monkeypatch, quiet, name, syncfs):
    monkeypatch.setattr(durable, "_quiet", lambda: syncfs)
    calls, bad = play(name, workplace)
    assert bad == []
    assert calls > 3
    met = 0
    for at, error, lasting in faults(calls, full=False):
        fault = Fault(at, error, lasting=lasting)
        _, bad = play(name, workplace, fault)
        assert bad == [], f"{error} at {fault.hit[0] if fault.hit else at}, lasting: {lasting}"
        met += bool(fault.hit)
    assert met >= 2 * calls  # every call fails; ``make crash``: in every way


@pytest.fixture
def server() -> Iterator[SMTPServer]:
    with SMTPServer() as server:
        yield server


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor tries again after seconds, it tries at once."""
    for module, name in (
        (recorder, "_UNSETTLED"),
        (claims, "_BUSY"),
        (claims, "LONGEST_SLEEP"),
        (arrivals, "LONGEST_SLEEP"),
    ):
        monkeypatch.setattr(module, name, 0.05)


def outbox_of(path: Path, server: SMTPServer) -> Outbox:
    outbox = Outbox(path, key=KEY, schedule=Schedule(first=3600.0, jitter=0.0))
    account = Account(mailbox=ALICE, host=server.host, port=server.port, security="plain")
    with transaction.manager:
        outbox.accounts.put(account)
    return outbox


def send(outbox: Outbox, message: bytes = MESSAGE) -> str:
    with transaction.manager:
        return outbox.delivery.send(ALICE, [BOB], message)


#: What may fail without a word, because nothing is left undone.
_SILENT = ("close", "posix_fadvise")
_SILENT_SITES = (
    "files._make",
    "files.refuse_link",
    "files.open_inside < spool.presence.is_alive",  # tidying; a sweep tells
    "files.open_inside < vault_files.read_file",  # the version of an account: compared again
    "files.read_all < register.page",  # a lane asks once more for its account; a sweep tells
    "spool.presence._is_removed",
)


def test_a_processor_goes_on_and_says_what_is_wrong(server, fast, caplog):
    """Each call of the spool fails once while a real processor delivers."""
    server.on("RCPT", reply="450 4.2.0 later", match="carol@")
    for at in range(1000):
        error = ERRORS[at % len(ERRORS)]
        once = Fault(at, error, lasting=False)

        def of_the_spool(call: Call, once: Fault = once) -> OSError | None:
            return once(call) if call.site.startswith(("spool.", "files.")) else None

        with in_memory() as path:
            calls = Recorder(path, mirror=False)
            with calls.recording(), outbox_of(path / "box", server) as outbox:
                one = send(outbox)
                with transaction.manager:
                    two = outbox.delivery.send(ALICE, [BOB, "carol@example.net"], MESSAGE)
                caplog.clear()
                raised = ""
                calls.fault = of_the_spool
                try:
                    outbox.processor().run(forever=False)
                except OutboxError as error_raised:
                    raised = str(error_raised)
                calls.fault = None
                where = f"{error} at {once.hit}"
                told = [record for record in caplog.records if record.levelno >= logging.WARNING]
                assert "held" not in [entry.state for entry in outbox.spool.scan()], where
                outbox.processor().run(forever=False)
                got = [mail.message_id for mail in server.mails]
                assert (got.count(one), got.count(two)) == (1, 1), where
                (left,) = outbox.spool.find(two)
                assert left.outcomes[BOB].state == "accepted", where
                assert outbox.status(one).state == "accepted", where
        if not once.hit:
            break
        (call,) = once.hit
        if call.name not in _SILENT and not call.site.startswith(_SILENT_SITES):
            assert told or raised, where
    assert at > 50


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=DEADLINE, check=False)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"a file system of its own needs root: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], timeout=DEADLINE, check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as stream:
        for size in (65536, 4096, 1):
            try:
                while True:
                    stream.write(b"x" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return filler


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def test_a_full_disk(small_disk, server, fast, caplog):
    """For real: what commits then fails, what was accepted is not sent again, all recovers."""
    server.on("RCPT", reply="450 4.2.0 later", match="carol@")
    with outbox_of(small_disk / "box", server) as outbox:
        with transaction.manager:
            waiting = outbox.delivery.send(ALICE, [BOB, "carol@example.net"], MESSAGE)
        filler = fill(small_disk)
        with pytest.raises(OutboxError, match="disk is full"):
            send(outbox)
        processor = outbox.processor()
        processor.start()
        server.wait_for(1, DEADLINE)
        wait_for(lambda: any("cannot record" in text for text in caplog.messages))
        assert any("disk is full: free some space" in text for text in caplog.messages)
        (record,) = outbox.spool.find(waiting)
        assert outbox.spool.leased(record.entry)
        filler.unlink()
        wait_for(lambda: outbox.spool.find(waiting)[0].entry.state == "deferred")
        outcomes = outbox.spool.find(waiting)[0].outcomes
        assert {r: str(o.state) for r, o in outcomes.items()} == {
            BOB: "accepted",
            "carol@example.net": "deferred",
        }
        later = send(outbox)
        server.wait_for(2, DEADLINE)
        assert processor.stop(DEADLINE)
        assert [mail.message_id for mail in server.mails] == [waiting, later]
