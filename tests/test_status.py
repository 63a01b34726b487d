"""What is said of a mail, put together from spool, lanes and journal."""

from __future__ import annotations

from cpsmailaccess_delivery.envelope import Envelope, Route
from cpsmailaccess_delivery.interfaces import Entry, LaneNote, Outcome, Record, State
from cpsmailaccess_delivery.status import Status, status_of

A, B = "a@example.net", "b@example.net"
NOTE = LaneNote("alice@example.org", "account", "535 bad login", since=1.0, until=99.0)


def record(state=State.QUEUED, *, to=(A, B), outcomes=None, reason="", **entry) -> Record:
    envelope = Envelope("x@example.org", to, Route("*"), message_id="1@example.org")
    return Record(Entry("1.1", "lane", state, **entry), envelope, outcomes or {}, 7, reason)


def status(*records, notes=None, journal=None) -> Status | None:
    return status_of("1@example.org", records, notes or {}, journal or {})


def test_unknown():
    assert status() is None


def test_queued():
    found = status(record())
    assert found.state is State.QUEUED
    assert found.recipients == {A: Outcome(State.QUEUED), B: Outcome(State.QUEUED)}
    assert (found.attempts, found.next_try, found.reason) == (0, 0.0, "")


def test_deferred():
    outcomes = {A: Outcome(State.ACCEPTED, "250 ok", 5.0), B: Outcome(State.DEFERRED, "450", 5.0)}
    found = status(record(State.DEFERRED, outcomes=outcomes, due=66.0, attempts=2))
    assert (found.state, found.next_try, found.attempts) == (State.DEFERRED, 66.0, 2)
    assert found.recipients == outcomes
    assert str(found).splitlines() == [
        "1@example.org: deferred",
        "  a@example.net: accepted: 250 ok",
        "  b@example.net: deferred: 450",
    ]


def test_the_relay_is_in_trouble():
    found = status(record(), notes={"lane": NOTE})
    assert (found.state, found.reason, found.next_try) == (State.DEFERRED, "535 bad login", 99.0)
    assert str(found).startswith("1@example.org: deferred (535 bad login)")
    assert status(record(), notes={"other": NOTE}).state is State.QUEUED


def test_held():
    found = status(record(State.HELD, reason="by hand"), notes={"lane": NOTE})
    assert (found.state, found.reason) == (State.HELD, "by hand")


def test_one_of_several_is_held():
    """The same Message-Id, sent twice."""
    held, queued = record(State.HELD, to=(A,), reason="by hand"), record(to=(B,))
    for order in ((held, queued), (queued, held)):
        for notes in ({}, {"lane": NOTE}):
            found = status(*order, notes=notes)
            assert (found.state, found.reason) == (State.HELD, "by hand")
            assert set(found.recipients) == {A, B}


def test_gone_from_the_spool():
    journal = {A: Outcome(State.ACCEPTED, "250", 1.0), B: Outcome(State.ACCEPTED, "250", 2.0)}
    assert status(journal=journal).state is State.ACCEPTED
    journal[B] = Outcome(State.REFUSED, "550", 2.0)
    assert status(journal=journal).state is State.REFUSED
    assert status(journal={A: Outcome(State.CANCELLED)}).state is State.CANCELLED


def test_held_in_the_journal_alone():
    """Somebody removed the file by hand."""
    assert status(journal={A: Outcome(State.HELD, "by hand", 1.0)}).state is State.HELD


def test_the_spool_knows_better_than_the_journal():
    found = status(record(to=(A,)), journal={A: Outcome(State.DEFERRED, "450", 1.0)})
    assert found.recipients == {A: Outcome(State.QUEUED)}


def test_unclear_and_refused_stay_for_a_person():
    outcomes = {A: Outcome(State.UNCLEAR, "connection lost", 1.0)}
    found = status(record(State.UNCLEAR, to=(A,), outcomes=outcomes, reason="unclear twice"))
    assert (found.state, found.reason) == (State.UNCLEAR, "unclear twice")
    outcomes = {A: Outcome(State.REFUSED, "550", 1.0), B: Outcome(State.ACCEPTED, "250", 1.0)}
    assert status(record(State.REFUSED, outcomes=outcomes)).state is State.REFUSED
