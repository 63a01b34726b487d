"""What a processor has in memory of the mails that are in flight: bounded, and nobody starves."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import transaction

from conftest import KEY
from cpsmailaccess_delivery import Account, Outbox, State, lanes, room
from cpsmailaccess_delivery.testing import SMTPServer

DEADLINE = 30.0
MIB = 1024 * 1024
HEAD = b"From: x@example.org\r\nSubject: large\r\n\r\n"


def mail(size: int) -> bytes:
    line = b"0123456789" * 7 + b"\n"  # LF: the wire form is another copy
    return HEAD + line * (size // len(line))


def put(outbox: Outbox, server: SMTPServer, mailbox: str, connections: int = 3) -> None:
    account = Account(
        mailbox=mailbox,
        host=server.host,
        port=server.port,
        security="plain",
        connections=connections,
    )
    with transaction.manager:
        outbox.accounts.put(account)


def send(outbox: Outbox, mailbox: str, message: bytes) -> str:
    with transaction.manager:
        return outbox.delivery.send(mailbox, ["bob@example.net"], message)


def wait_for(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not seen():
        assert time.monotonic() < end, "the deadline has passed"
        threading.Event().wait(0.01)


PROCESSOR = r"""
import re, sys, time
from cpsmailaccess_delivery import Outbox, sessions
sessions._BACKLOG = 0  # as if many more mails waited
outbox = Outbox(sys.argv[1], helo_name="client.example.org", connections_per_relay=100)
with outbox:
    processor = outbox.processor()
    processor.start()  # on PostgreSQL it leases ahead, which one that drains does not
    while list(outbox.spool.scan()):
        time.sleep(0.1)
    processor.stop()
    done = processor.summary
# Not ru_maxrss: a child begins with what its parent had.
peak = re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]
print(done.accepted, int(peak) // 1024)
"""


@pytest.mark.parametrize("back_end", ["directory", "PostgreSQL"])
def test_many_large_mails_to_slow_relays(
    tmp_path: Path,
    back_end: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Without a bound: all sixty in two forms, over 600 MiB."""
    monkeypatch.setenv("CPSMAIL_KEY", KEY.hex())
    boxes = [f"box{number}@example.org" for number in range(20)]
    there = request.getfixturevalue("database") if back_end == "PostgreSQL" else tmp_path / "outbox"
    with SMTPServer() as server, Outbox(there) as outbox:
        server.on("TAKEN", delay=0.5)
        for box in boxes:
            put(outbox, server, box)
        message = mail(5 * MIB)
        for box in boxes:
            for _ in range(3):
                send(outbox, box, message)
        command = [sys.executable, "-c", PROCESSOR, str(there)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    accepted, peak = map(int, done.stdout.split())
    assert accepted == 60
    print(peak)
    # The driver and the engine are 25 MiB of modules, and what is read comes in slices of 1 MiB.
    assert peak < {"directory": 260, "PostgreSQL": 330}[back_end], "MiB"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (room, lanes):
        monkeypatch.setattr(module, "MOST", 400_000)


def test_lanes_that_waited_for_room_are_woken(tmp_path: Path, small: None) -> None:
    with SMTPServer() as silent, SMTPServer() as other, Outbox(tmp_path / "outbox") as outbox:
        for server in (silent, other):
            server.on("BODY", silence=True)
        put(outbox, silent, "a@example.org")
        put(outbox, other, "b@example.org")
        send(outbox, "a@example.org", mail(300_000))
        processor = outbox.processor()
        processor.start()
        wait_for(lambda: processor.scheduler is not None and len(processor.scheduler.lanes) == 1)
        scheduler = processor.scheduler
        assert scheduler is not None
        first = scheduler.lanes[0]
        wait_for(lambda: first.in_flight == 1)
        for _ in range(2):
            send(outbox, "b@example.org", mail(150_000))
        wait_for(lambda: len(scheduler.lanes) == 2 and scheduler.lanes[1].in_flight == 1)
        second = scheduler.lanes[1]
        wait_for(lambda: second.cramped and len(second.ready) == 1)
        silent.drop_sessions()
        wait_for(lambda: second.in_flight == 2)
        processor.abort()
        assert processor.stop(timeout=DEADLINE)


def test_each_lane_has_a_mail_in_flight_however_little_room_there_is(
    tmp_path: Path, small: None
) -> None:
    """And a window of small ones: a silent relay does not slow its neighbours."""
    with SMTPServer() as silent, SMTPServer() as other, Outbox(tmp_path / "outbox") as outbox:
        silent.on("BODY", silence=True)
        put(outbox, silent, "a@example.org")
        put(outbox, other, "b@example.org")
        put(outbox, other, "c@example.org")
        kept = send(outbox, "a@example.org", mail(500_000))
        processor = outbox.processor()
        processor.start()
        wait_for(lambda: processor.scheduler is not None and bool(processor.scheduler.lanes))
        for _ in range(3):
            send(outbox, "b@example.org", mail(500_000))
        for _ in range(30):
            send(outbox, "c@example.org", mail(1000))
        other.wait_for(33, DEADLINE)
        assert outbox.status(kept).state is State.QUEUED
        processor.abort()
        assert processor.stop(timeout=DEADLINE)


def test_a_notice_of_a_large_mail_has_its_header(tmp_path: Path) -> None:
    with SMTPServer() as server, Outbox(tmp_path / "outbox") as outbox:
        server.on("BODY", reply="550 5.7.1 no", times=1)
        put(outbox, server, "a@example.org")
        message = HEAD.replace(b"large", b"a large one") + b"x\n" * 100_000
        send(outbox, "a@example.org", message)
        outbox.processor().run(forever=False)
        (notice,) = server.wait_for(1, DEADLINE)
    assert b"Subject: a large one" in notice.data
    assert len(notice.data) < 20_000
