"""Things that a thread handles in batches: who waits for it, and who does not."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from cpsmailaccess_delivery.gatherer import Gatherer

DEADLINE = 20.0
NEVER = 3600.0  # seconds that no test waits


@pytest.fixture
def make():
    made = []

    def make(handle, *, delay=0.0, retry=0.0, patience=DEADLINE, limit=100):
        gatherer = Gatherer(
            handle, name="a test", delay=delay, retry=retry, patience=patience, limit=limit
        )
        made.append(weakref.ref(gatherer))
        return gatherer

    yield make
    for each in made:
        if (gatherer := each()) is not None:
            gatherer.close(wait=False)


def test_flush_and_close_wait_for_no_delay(make):
    handled = []
    gatherer = make(lambda things, last: handled.extend(things), delay=NEVER)
    gatherer.put(1)
    assert gatherer.flush()
    assert handled == [1]
    gatherer.put(2)
    gatherer.close()
    assert handled == [1, 2]


def test_flush_does_not_wait_for_the_next_try(make):
    tries = []

    def fail(things, last):
        tries.append(list(things))
        return True

    gatherer = make(fail, retry=NEVER)
    gatherer.put(1)
    assert gatherer.flush()
    number = len(tries)
    assert gatherer.flush()
    assert len(tries) > number


def test_a_handler_does_not_wait_for_itself(make, caplog):
    said = []
    over = threading.Event()

    def handle(things, last):
        list(things)
        said.append(gatherer.flush())
        gatherer.close()
        over.set()

    gatherer = make(handle, patience=NEVER)
    gatherer.put(1)
    assert over.wait(DEADLINE)
    assert said[0] is False
    assert "a fault" not in caplog.text


def test_what_is_put_while_others_are_handled_is_handled_next(make):
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def handle(things, last):
        for thing in things:
            if thing == 1:
                begun.set()
                go_on.wait(DEADLINE)
            else:
                done.set()

    gatherer = make(handle)
    gatherer.put(1)
    assert begun.wait(DEADLINE)
    gatherer.put(2)
    go_on.set()
    assert done.wait(DEADLINE)


def test_flush_waits_for_what_was_put_while_others_are_handled(make):
    begun = {1: threading.Event(), 2: threading.Event()}
    go_on = {1: threading.Event(), 2: threading.Event()}

    def handle(things, last):
        for thing in things:
            begun[thing].set()
            go_on[thing].wait(DEADLINE)

    gatherer = make(handle)
    gatherer.put(1)
    assert begun[1].wait(DEADLINE)
    gatherer.put(2)
    flushing = threading.Thread(target=gatherer.flush, daemon=True)
    flushing.start()
    while not gatherer._waiting:
        assert flushing.is_alive()
    go_on[1].set()
    assert begun[2].wait(DEADLINE)
    flushing.join(0.1)
    assert flushing.is_alive()
    go_on[2].set()
    flushing.join(DEADLINE)
    assert not flushing.is_alive()


def test_a_fault_costs_its_batch_and_no_more(make, caplog):
    """Nor is what it was to try again tried for ever."""
    calls, done = [], threading.Event()

    def handle(things, last):
        calls.extend(things)
        if calls == [1]:
            return True
        if 3 not in calls:
            raise LookupError("a fault of ours")
        done.set()
        return False

    gatherer = make(handle, retry=NEVER)
    gatherer.put(1)
    assert gatherer.flush()
    gatherer.put(2)
    assert gatherer.flush()
    gatherer.put(3)
    assert done.wait(DEADLINE)
    assert "a fault; some events are lost" in caplog.text


def test_who_is_closed_takes_nothing_and_is_kept_by_nobody(make):
    handled = []
    gatherer = make(lambda things, last: handled.append((*things, last)))
    gatherer.put(1)
    assert gatherer.flush()
    gatherer.close()
    gatherer.put(2)
    assert len(gatherer) == 0
    assert gatherer.flush()
    assert handled == [(1, False), (True,)]
    kept = weakref.ref(gatherer)
    del gatherer
    gc.collect()
    assert kept() is None


def test_without_a_thread_to_be_had_nothing_waits(make, monkeypatch, caplog):
    def start(thread):
        raise RuntimeError("can't start new thread")

    gatherer = make(lambda things, last: None)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        gatherer.put(1)
    assert len(gatherer) == 0
    assert gatherer.flush()
    assert "events are lost" in caplog.text
