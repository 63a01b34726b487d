"""What is wrong around a PostgreSQL that works: its disk is full, clocks and time zones differ."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import transaction

pytest.importorskip("psycopg", reason="needs the extra [postgres]")

import psycopg

from cpsmailaccess_delivery.errors import OutboxError
from cpsmailaccess_delivery.testing import SMTPServer
from postgres_helpers import ALICE, BOB, MESSAGE, open_outbox, put, send, wait_for
from postgres_server import FOR_TESTS, Server, why_none

HOUR = 3600.0  # seconds


@pytest.fixture
def relay() -> Iterator[SMTPServer]:
    with SMTPServer() as server:
        yield server


@pytest.fixture
def small_disk() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="cpsmail-disk-"))  # which another user may enter
    mount = ["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        place.rmdir()
        pytest.skip(f"a small disk cannot be mounted: {done.stderr.strip()}")
    place.chmod(0o755)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True, timeout=60)
    place.rmdir()


def fill(disk: Path) -> Path:
    """Leave no room but for a moment's work."""
    filler = disk / "filler"
    free = os.statvfs(disk)
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, free.f_bavail * free.f_bsize - 256 * 1024)
    return filler


def test_the_disk_of_the_server_is_full(small_disk, relay):
    """A commit is refused, or its mail is safe; when there is room, all goes on by itself."""
    if reason := why_none():
        pytest.skip(reason)
    # Small segments: else what is set aside for the log would be room for minutes.
    server = Server({**FOR_TESTS, "max_wal_size": "32MB"}, parent=small_disk)
    try:
        with open_outbox(server.new_database()) as outbox:
            put(outbox, relay, ALICE)
            processor = outbox.processor()
            processor.start()
            committed = send(outbox, 5)
            relay.wait_for(5, 60)
            filler = fill(small_disk)
            refused = ""
            large = MESSAGE + os.urandom(512 * 1024).hex().encode()
            for _ in range(1000):
                try:
                    with transaction.manager:
                        message_id = outbox.delivery.send(ALICE, [BOB], large)
                except OutboxError as error:
                    refused = str(error)
                    break
                committed.append(message_id)
            assert refused
            assert processor.is_alive()
            filler.unlink()
            if not server.is_running():  # where it could not write its log it gives up
                server.start()
            committed += send(outbox, 5)
            wait_for(lambda: {mail.message_id for mail in relay.mails} >= set(committed))
            wait_for(lambda: not list(outbox.spool.scan()))
            assert processor.stop(timeout=60)
            assert {mail.message_id for mail in relay.mails} == set(committed)
    finally:
        server.remove()


@pytest.mark.parametrize("wrong", [-HOUR, HOUR], ids=["slow", "fast"])
@pytest.mark.parametrize("host", ["sends", "delivers"])
def test_a_host_whose_clock_is_wrong(database, relay, monkeypatch, wrong, host):
    """The clock of the database rules: what is due is sent, what is not waits."""
    right = time.time
    with open_outbox(database) as outbox:
        put(outbox, relay, ALICE)

    def now() -> float:
        return right() + wrong

    if host == "sends":
        monkeypatch.setattr(time, "time", now)
    with open_outbox(database) as outbox, transaction.manager:
        due = outbox.delivery.send(ALICE, [BOB], MESSAGE, undo=0.01)
        later = outbox.delivery.send(ALICE, [BOB], MESSAGE, undo=HOUR / 2)
    monkeypatch.setattr(time, "time", now if host == "delivers" else right)
    with open_outbox(database) as outbox:
        processor = outbox.processor()
        processor.start()
        (mail,) = relay.wait_for(1, 60)
        assert mail.message_id == due
        wait_for(lambda: len(list(outbox.spool.scan())) == 1)
        (entry,) = outbox.spool.scan()
        assert processor.stop(timeout=60)
        assert abs(entry.due - right() - HOUR / 2) < 120
        assert outbox.status(later).state == "queued"
    assert len(relay.mails) == 1


def test_time_zones_change_nothing(database, relay, monkeypatch):
    name = database.rpartition("/")[2]
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET timezone TO 'Pacific/Auckland'")
    monkeypatch.setenv("TZ", "America/Los_Angeles")
    monkeypatch.setenv("PGTZ", "Asia/Kathmandu")
    time.tzset()
    try:
        with open_outbox(database) as outbox:
            put(outbox, relay, ALICE)
            with transaction.manager:
                outbox.delivery.send(ALICE, [BOB], MESSAGE, undo=HOUR)
                due = outbox.delivery.send(ALICE, [BOB], MESSAGE, undo=0.01)
            processor = outbox.processor()
            processor.start()
            (mail,) = relay.wait_for(1, 60)
            assert processor.stop(timeout=60)
        assert mail.message_id == due
        assert len(relay.mails) == 1
    finally:
        monkeypatch.undo()
        time.tzset()
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} RESET timezone")
