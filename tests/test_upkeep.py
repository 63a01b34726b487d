"""What a processor does beside delivering: refused mails that nobody looked at go."""

from __future__ import annotations

import threading
import time

import pytest

from cpsmailaccess_delivery import scheduler as scheduler_module
from cpsmailaccess_delivery import upkeep as upkeep_module
from cpsmailaccess_delivery.processor import QueueProcessorThread
from cpsmailaccess_delivery.upkeep import Upkeep
from test_notices import ALICE, DAY, NEVER, drain, outbox, put, send, server

__all__ = ["outbox", "server"]  # fixtures

DEADLINE = 30.0  # seconds


@pytest.fixture
def refused(outbox, server):
    """Message-Ids of three mails that were refused."""
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user", match="bob@")
    found = [send(outbox, notify="never") for _ in range(3)]
    assert drain(outbox).refused == 3
    return found


def upkeep(outbox, ahead):
    clock = lambda: time.time() + ahead  # noqa: E731
    return Upkeep(outbox.spool, outbox.vault, outbox.journal, clock)


def test_some_at_a_time(outbox, refused, monkeypatch):
    monkeypatch.setattr(upkeep_module, "_STEP", 2)
    work = upkeep(outbox, 31 * DAY)
    assert work.remove_refused()
    assert len(list(outbox.spool.scan())) == 1
    assert not work.remove_refused()
    assert list(outbox.spool.scan()) == []
    removed = [e for e in outbox.journal.events(address=ALICE) if e.kind == "removed"]
    assert sorted(event.message_id for event in removed) == sorted(refused)


def test_what_a_person_is_about_to_retry_stays(outbox, refused):
    leases = [outbox.spool.claim(entry) for entry in outbox.spool.scan()]
    upkeep(outbox, 31 * DAY).remove_refused()
    for lease in leases:
        lease.release()
    assert len(list(outbox.spool.scan())) == 3


def test_a_running_processor_does_it(outbox, refused, monkeypatch):
    monkeypatch.setattr(scheduler_module, "_SWEEP_EVERY", 0.01)
    processor = QueueProcessorThread(
        outbox.spool,
        outbox.vault,
        outbox.journal,
        schedule=NEVER,
        helo_name="client.example.org",
        clock=lambda: time.time() + 31 * DAY,
    )
    real, synced = outbox.spool.sync, threading.Event()

    def sync():
        real()
        synced.set()

    monkeypatch.setattr(outbox.spool, "sync", sync)
    processor.start()
    assert synced.wait(DEADLINE)
    assert list(outbox.spool.scan()) == []
    assert processor.stop()


def test_nothing_stops_it_for_ever(outbox, refused, monkeypatch, caplog):
    """A disk that fails is logged, and asked again later."""
    monkeypatch.setattr(upkeep_module, "_LOOK", 0.0)
    work = upkeep(outbox, 31 * DAY)
    with monkeypatch.context() as patch:
        patch.setattr(outbox.spool, "refused_before", fail)
        work.run()
    assert "cannot remove old refused mails" in caplog.text
    work.run()
    assert list(outbox.spool.scan()) == []


def fail(when):
    raise OSError(5, "Input/output error")
