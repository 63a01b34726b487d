"""Leases on PostgreSQL: fenced, renewed, lost; what others may do with a mail meanwhile."""

from __future__ import annotations

import gc
import hashlib
import logging
import math
import os
import resource
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import psycopg
import pytest
from zope.interface.verify import verifyObject

pytest.importorskip("psycopg", reason="needs the extra [postgres]")

from conftest import open_files
from cpsmailaccess_delivery.envelope import Route
from cpsmailaccess_delivery.errors import SpoolError
from cpsmailaccess_delivery.interfaces import Entry, ISettlesTogether, LaneNote, Settlement, State
from cpsmailaccess_delivery.pg import feed as feed_module
from cpsmailaccess_delivery.pg import feed_watch, lane_sharing
from cpsmailaccess_delivery.pg import lease as lease_module
from cpsmailaccess_delivery.pg.connections import (
    Connection,
    Connections,
    notes_of,
    wait_for_any,
)
from cpsmailaccess_delivery.pg.engine import JOBS
from cpsmailaccess_delivery.pg.feed import Feed
from cpsmailaccess_delivery.pg.feed_watch import FeedWatch
from cpsmailaccess_delivery.pg.lane_sharing import TAKE, LaneSharing
from cpsmailaccess_delivery.pg.mails import MAILS, SLICE, Mails
from cpsmailaccess_delivery.spool.outcomes import Side
from cpsmailaccess_delivery.spool.postgres import PostgresSpool
from postgres_helpers import DEADLINE, wait_for
from spool_contract import ACCEPTED, DEFERRED, MESSAGE, envelope, queue, settle, told

Make = Callable[..., PostgresSpool]


@pytest.fixture
def make(database: str) -> Iterator[Make]:
    made = []

    def make(lease: float = 30.0) -> PostgresSpool:
        made.append(PostgresSpool(Connections(database), lease=lease))
        return made[-1]

    yield make
    while _watches:
        _watches.pop().close()  # also of a test that has failed: it would take lanes from the next
    for spool in made:
        spool.close()


_watches: list[Any] = []


def jobs(spool: PostgresSpool) -> list[tuple[str, str]]:
    with spool.connections.use("look") as connection:
        rows = connection.execute(f"SELECT dedupe_key, status::text FROM {JOBS} ORDER BY id")
        return rows.fetchall()


def expire(spool: PostgresSpool) -> None:
    """As if every holder had been silent for longer than its lease."""
    with spool.connections.use("expire") as connection:
        connection.execute(f"UPDATE {MAILS} SET leased_until = clock_timestamp() - interval '1 s'")
        connection.execute(f"UPDATE {JOBS} SET heartbeat = now() - interval '1 day'")
        connection.execute("UPDATE cpsmail.lanes SET until = clock_timestamp() - interval '1 s'")


@pytest.mark.parametrize("state", [State.ACCEPTED, State.DEFERRED, State.REFUSED, State.CANCELLED])
def test_who_lost_his_lease_changes_nothing(make, state, caplog):
    stale, living = make(), make()
    entry = queue(stale)
    lost = stale.claim(entry)
    expire(stale)
    lease = living.claim(entry)
    assert lease is not None
    before = living.load(entry)
    settlement = Settlement(state, outcomes={"bob@example.net": ACCEPTED}, due=5.0, attempts=1)
    with caplog.at_level(logging.ERROR):
        assert lost.settle(settlement) is None
    assert "may be sent twice" in caplog.text
    lost.release()
    assert living.load(entry) == before
    assert living.leased(entry)
    assert lease.settle(Settlement(State.DEFERRED, due=9.0, attempts=1)).attempts == 1
    assert jobs(living) == [(entry.id, "queued")]


def test_who_lost_his_lease_cannot_set_aside(make):
    spool = make()
    entry = queue(spool)
    lost = spool.claim(entry)
    expire(spool)
    lease = make().claim(entry)
    with pytest.raises(SpoolError, match="lost"):
        lost.set_aside("why")
    lost.release()
    assert spool.leased(entry)
    lease.release()
    assert not spool.leased(entry)


def test_his_own_claim_is_another_one(make):
    """A worker that lost a mail and claims it again is fenced from its former self."""
    spool = make()
    entry = queue(spool)
    lost = spool.claim(entry)
    expire(spool)
    again = spool.claim(entry)
    assert lost.settle(Settlement(State.ACCEPTED)) is None
    assert spool.leased(entry)
    assert again.settle(Settlement(State.ACCEPTED)) is None
    assert list(spool.scan()) == []


def test_a_lease_is_renewed_while_its_holder_lives(make):
    spool = make(lease=1.0)
    entry = queue(spool)
    lease = spool.claim(entry)
    first = lease.taken_at
    wait_for(lambda: lease.taken_at > first + 1.5)
    assert make().claim(entry) is None
    lease.settle(Settlement(State.ACCEPTED))
    assert list(spool.scan()) == []


def test_a_lease_that_nobody_has_any_more_ends(make):
    """A fault between the claim and what was meant to be done: as in a directory."""
    spool = make(lease=1)
    entry = queue(spool)
    assert spool.claim(entry) is not None  # and lost
    gc.collect()
    assert spool.leases.held() == []
    wait_for(lambda: not spool.leased(entry))
    lease = spool.claim(entry)
    assert spool.leases.held() == [lease]
    lease.release()


def test_a_lease_ends_when_its_holder_is_silent(make):
    spool = make(lease=1.0)
    entry = queue(spool)
    spool.claim(entry)
    spool.leases.close()  # renews no more: as a process that stands still
    other = make()
    lease = wait_for(lambda: other.claim(entry), 10.0)
    assert lease.message == MESSAGE


# Jobs: the engine names a mail as long as a processor may take it


@pytest.mark.parametrize(
    ("settlement", "expected"),
    [
        (Settlement(State.ACCEPTED), []),
        (Settlement(State.CANCELLED), []),
        (Settlement(State.DEFERRED, due=5.0, attempts=1), ["queued"]),
        (Settlement(State.UNCLEAR, due=5.0, attempts=1), ["queued"]),
        (Settlement(State.UNCLEAR, attempts=1), []),
        (Settlement(State.HELD, attempts=1), []),
        (Settlement(State.REFUSED, attempts=1), []),
    ],
)
def test_a_job_goes_with_its_mail(make, settlement, expected):
    spool = make()
    entry = queue(spool)
    assert jobs(spool) == [(entry.id, "queued")]
    spool.claim(entry).settle(settlement)
    assert [status for _, status in jobs(spool)] == expected


def test_hold_takes_the_job_and_requeue_gives_one(make):
    spool = make()
    entry = queue(spool)
    held = spool.hold(entry, "why")
    assert jobs(spool) == []
    spool.requeue(held)
    assert jobs(spool) == [(entry.id, "queued")]
    spool.cancel(entry)
    assert jobs(spool) == []


# The feed of a worker


def watch_of(spool: PostgresSpool):
    feed = Feed(spool)
    _watches.append(feed.watch())
    return feed, _watches[-1]


def test_the_feed_tells_what_it_has_leased(make):
    spool = make()
    entries = {queue(spool, f"{n}@x") for n in range(5)}
    feed, watch = watch_of(spool)
    assert set(told(watch, 5)) == entries
    other = make()
    assert all(other.leased(entry) for entry in entries)
    for entry in entries:
        lease = feed.claim(entry)
        assert lease.message == MESSAGE
        assert lease.settle(Settlement(State.ACCEPTED)) is None
    watch.close()
    assert jobs(spool) == []
    assert list(spool.scan()) == []


def test_what_was_leased_ahead_when_the_server_died_is_leased_anew(make):
    """A claim does not wait for the server's disk: with it the lease is gone that we remember."""
    spool = make()
    entries = {queue(spool, f"{n}@x") for n in range(5)}
    feed, watch = watch_of(spool)
    assert set(told(watch, 5)) == entries
    with spool.connections.use("forget") as connection, connection.transaction():
        connection.execute(f"UPDATE {MAILS} SET lease = NULL, leased_until = NULL")
        connection.execute(f"UPDATE {JOBS} SET status = 'queued', queue_manager_id = NULL")
    assert set(told(watch, 5)) == entries
    assert feed.held().total() == 5  # those that are no more do not make the lane look full
    assert all(feed.claim(entry).settle(Settlement(State.ACCEPTED)) is None for entry in entries)
    assert list(spool.scan()) == []
    watch.close()


def test_a_claim_does_not_wait_for_the_disk(make):
    spool = make()
    entry = queue(spool)
    values = [50, [entry.lane], uuid.uuid4(), 30.0, uuid.uuid4(), 0]
    with spool.connections.use("claim") as connection, connection.transaction():
        assert len(connection.execute(feed_module._CLAIM, values).fetchall()) == 1
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("off",)
    with spool.connections.use("look") as connection:
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)


def test_a_mail_its_job_and_its_lane_are_ours_for_as_long(make):
    spool = make(lease=17.0)
    queue(spool)
    _, watch = watch_of(spool)
    assert len(told(watch)) == 1
    with spool.connections.use("look") as connection:
        query = f"SELECT extract(epoch FROM leased_until - heartbeat) FROM {MAILS}, {JOBS}"
        assert connection.execute(query).fetchall() == [(17,)]
        query = "SELECT until <= clock_timestamp() + interval '17 s' FROM cpsmail.lanes"
        assert connection.execute(query).fetchall() == [(True,)]
    watch.close()


def test_the_feed_gives_back_what_is_not_sent(make):
    spool = make()
    entry = queue(spool)
    _, watch = watch_of(spool)
    assert told(watch) == [entry]
    watch.close()
    assert not spool.leased(entry)
    assert jobs(spool) == [(entry.id, "queued")]
    _, watch = watch_of(make())
    assert told(watch) == [entry]
    watch.close()


def test_two_feeds_share_no_lane(make):
    spool = make()
    queue(spool, "1@x")
    _, first = watch_of(spool)
    assert len(told(first)) == 1
    _, second = watch_of(make())
    with spool.connections.use("wait") as connection:
        query = "SELECT count(*) FROM cpsmail.workers"
        wait_for(lambda: connection.execute(query).fetchone() == (2,))
    more = [queue(spool, f"{n}@x") for n in range(2, 12)]
    assert set(told(first, 10)) == set(more)
    assert second.read() == []
    first.close()  # the lane is free: the other takes it
    assert len(told(second, 11)) == 11
    second.close()


def test_feeds_that_start_together_share_the_lanes(make, monkeypatch):
    monkeypatch.setattr(feed_watch, "_START", 3600.0)  # until a mail comes, here
    spool = make()
    entries = [queue(spool, f"{n}@x", route=Route(f"m{n}@example.org")) for n in range(9)]
    _, first = watch_of(make())
    _, second = watch_of(make())
    with spool.connections.use("wait") as connection:
        query = "SELECT count(*) FROM cpsmail.workers"
        wait_for(lambda: connection.execute(query).fetchone() == (2,))
    entries.append(queue(spool, "9@x", route=Route("m9@example.org")))
    told_by = [told(first, 5), told(second, 5)]
    assert {entry.id for entries in told_by for entry in entries} == {e.id for e in entries}
    first.close()
    second.close()


def test_a_worker_that_comes_later_gets_its_share_at_once(make, monkeypatch):
    """What the first has leased ahead and not begun is the second's; the first lets it be."""
    monkeypatch.setattr(lane_sharing, "_KEPT", 3600.0)
    spool = make()
    entries = {
        entry.id: entry
        for entry in (queue(spool, f"{n}@x", route=Route(f"m{n}@example.org")) for n in range(10))
    }
    former, first = watch_of(make())
    assert len(told(first, 10)) == 10
    begun = former.claim(next(iter(entries.values())))
    _, second = watch_of(make())
    moved = told(second, 5)
    assert begun.entry.id not in {entry.id for entry in moved}
    for entry in moved[:5]:
        assert former.claim(entry) is None
    first.close()
    second.close()


def test_lanes_that_are_dry_leave_room_for_others(make, monkeypatch):
    monkeypatch.setattr(lane_sharing, "MOST_LANES", 2)
    monkeypatch.setattr(lane_sharing, "_KEPT", 3600.0)
    spool = make()
    entries = [queue(spool, f"{n}@x", route=Route(f"m{n}@example.org")) for n in range(5)]
    feed, watch = watch_of(make())
    done = []
    while len(done) < len(entries):
        for entry in told(watch):
            feed.claim(entry).settle(Settlement(State.ACCEPTED))
            done.append(entry.id)
    assert sorted(done) == sorted(entry.id for entry in entries)
    watch.close()


def test_lanes_that_wait_leave_room_for_others(make, monkeypatch):
    monkeypatch.setattr(lane_sharing, "MOST_LANES", 2)
    monkeypatch.setattr(lane_sharing, "_KEPT", 3600.0)
    spool = make()
    bad = [queue(spool, f"{n}@x", route=Route(f"m{n}@example.org")) for n in range(2)]
    _, watch = watch_of(spool)
    assert len(told(watch, 2)) == 2
    now = time.time()
    for entry in bad:
        spool.note_lane(entry.lane, LaneNote("m", "relay", "down", now, now + 3600))
    good = queue(spool, "3@x", route=Route("m3@example.org"))
    while good.id not in [entry.id for entry in told(watch)]:
        pass
    watch.close()


def test_a_feed_takes_what_a_dead_worker_had(make):
    spool = make()
    entry = queue(spool)
    dead, watch = watch_of(spool)
    assert told(watch) == [entry]
    expire(spool)
    _, living = watch_of(make())
    assert told(living) == [entry]
    lost = dead.claim(entry)  # it does not know yet; what it records is not taken
    assert lost is None or lost.settle(Settlement(State.ACCEPTED)) is None
    assert list(spool.scan()) == [entry]
    living.close()
    watch.close()


@pytest.mark.parametrize("fault", ["no room for a thread", "the second of some mails"])
def test_what_was_leased_in_vain_is_told_later(make, monkeypatch, fault):
    """And not renewed as long as the worker lives, without anybody who would send it."""
    spool = make(lease=3)
    entries = [queue(spool, f"{number}@x") for number in range(3)]
    faults = []

    def failing(real: Callable[..., Any], at: int) -> Callable[..., Any]:
        calls = iter(range(1, 100))

        def call(self: Any, *arguments: Any) -> Any:
            if getattr(self, "name", "cpsmail-leases") == "cpsmail-leases" and next(calls) == at:
                faults.append(fault)
                raise RuntimeError(fault)
            return real(self, *arguments)

        return call

    if fault == "no room for a thread":
        monkeypatch.setattr(threading.Thread, "start", failing(threading.Thread.start, 1))
    else:
        monkeypatch.setattr(PostgresSpool, "lease_of", failing(PostgresSpool.lease_of, 2))
    feed, watch = watch_of(spool)
    wait_for(lambda: faults)
    entries.append(queue(spool, "later@x"))
    seen: set[Entry] = set()
    wait_for(lambda: seen.update(watch.read() or ()) or seen == set(entries))
    assert all(feed.claim(entry) for entry in entries)
    watch.close()


def test_who_has_lost_a_lane_gives_back_its_mails(make):
    """Paused for longer than the lane was his, but not than his mails were: he goes on to renew
    these, and whoever has the lane would wait for them for ever."""
    spool = make(lease=3)
    entries = [queue(spool, f"{number}@x") for number in range(3)]
    feed, watch = watch_of(spool)
    assert told(watch) == entries
    with spool.connections.use("take") as connection:
        query = "UPDATE cpsmail.lanes SET worker = gen_random_uuid(), until = now() + '1h'"
        connection.execute(query)
    wait_for(lambda: not feed.lanes)
    wait_for(lambda: not any(map(spool.leased, entries)))
    assert jobs(spool) == [(entry.id, "queued") for entry in entries]
    watch.close()


def test_what_is_leased_ahead_for_too_long_is_not_sent(make, monkeypatch):
    """Paused between lease and claim, for longer than the lease: another one may have it."""
    spool = make()
    entry = queue(spool)
    feed, watch = watch_of(spool)
    assert told(watch) == [entry]
    expire(spool)
    other = make().claim(entry)
    assert other is not None
    for lease in spool.leases.held():
        if lease.token != other.token:
            lease.taken_at -= 31.0
    assert feed.claim(entry) is None
    assert feed.held().total() == 0
    other.release()
    watch.close()


def test_what_is_leased_ahead_is_claimed_as_it_is(make):
    spool = make()
    entry = queue(spool)
    feed, watch = watch_of(spool)
    assert told(watch) == [entry]
    assert feed.claim(entry._replace(attempts=1)) is None
    watch.close()


def test_a_mail_for_later_is_not_fed_now(make):
    spool = make()
    times = (int(time.time()) + 3600.0, 99_999_999_999.0)
    late = [queue(spool, f"{n}@x", not_before=when) for n, when in enumerate(times)]
    other = queue(spool, "other@x")
    _, watch = watch_of(make())
    assert told(watch) == [other]
    assert jobs(spool) == [*((each.id, "queued") for each in late), (other.id, "picked")]
    watch.close()


def test_a_deferred_mail_comes_again_when_it_is_due(make):
    spool = make()
    entry = queue(spool)
    feed, watch = watch_of(spool)
    told(watch)
    due = spool.connections.now() + 1.0
    after = feed.claim(entry).settle(Settlement(State.DEFERRED, due=due, attempts=1))
    assert told(watch) == [after]
    assert spool.connections.now() >= due
    watch.close()


def test_held_mails_are_not_fed(make):
    spool = make()
    spool.hold(queue(spool, "a@x"), "why")
    settle(spool, queue(spool, "b@x"), State.REFUSED, outcomes={"bob@example.net": DEFERRED})
    entry = queue(spool, "c@x")
    _, watch = watch_of(spool)
    assert told(watch) == [entry]
    watch.close()


def test_a_large_message_does_not_come_with_its_claim(make):
    spool = make()
    message = b"A: b\n\n" + b"x" * 2_000_000
    staged = spool.stage(envelope(), message)
    spool.prepare([staged])
    spool.publish([staged])
    lease = spool.claim(staged)
    assert lease._message is None
    assert lease.message == message
    lease.release()


@pytest.mark.parametrize("size", [SLICE - 1, SLICE, SLICE + 1, 3 * SLICE])
def test_a_large_message_is_read_in_slices(make, size):
    spool = make()
    entry = queue(spool, message=os.urandom(size))
    lease = spool.claim(entry)
    assert len(lease.message) == size
    assert lease.message == spool.read_message(entry)
    with spool.connections.use("look") as connection:
        row = connection.execute(f"SELECT sha256(message) FROM {MAILS}").fetchone()
    assert row == (hashlib.sha256(lease.message).digest(),)


def test_what_is_leased_ahead_is_small(make):
    """A worker keeps a thousand mails: with each of a megabyte that would be a gigabyte."""
    spool = make()
    message = b"A: b\n\n" + b"x" * 100_000
    staged = spool.stage(envelope(), message)
    spool.prepare([staged])
    spool.publish([staged])
    feed, watch = watch_of(spool)
    assert told(watch) == [staged]
    lease = feed.claim(staged)
    assert lease._message is None
    assert lease.message == message
    watch.close()


def test_higher_priority_first(make):
    spool = make()
    low = queue(spool, "a@x", priority=2)
    high = queue(spool, "b@x", priority=8)
    _, watch = watch_of(spool)
    assert told(watch, 2) == [high, low]
    watch.close()


def test_who_was_silent_does_not_leave_what_is_another_s(make):
    spool, other = make(), uuid.uuid4()
    lane = queue(spool).lane
    sharing = LaneSharing(Feed(spool), spool)
    with spool.connections.use("meddle") as connection:
        values = {"worker": other, "lease": 30.0, "looked": None, "lanes": [lane]}
        connection.execute(TAKE, values)
        sharing._lanes[lane] = sharing._begun[lane] = 0.0
        sharing._leave(connection, [lane])
        query = "SELECT worker FROM cpsmail.lanes WHERE lane = %s"
        assert connection.execute(query, [lane]).fetchone() == (other,)


def test_a_mail_of_another_s_lane_is_not_claimed(make):
    spool = make()
    entry, feed = queue(spool), Feed(spool)
    assert feed.claim(entry) is None
    feed.lanes = frozenset({entry.lane})
    assert feed.claim(entry).settle(Settlement(State.ACCEPTED)) is None


def test_what_another_has_by_now_is_not_given_back(make):
    spool = make()
    entry = queue(spool)
    _, watch = watch_of(spool)
    assert told(watch) == [entry]
    expire(spool)
    other = make().claim(entry)
    assert other is not None
    watch.close()
    assert make().leased(entry)
    assert other.settle(Settlement(State.ACCEPTED)) is None


def test_what_is_leased_is_told_whatever_goes_wrong(make):
    def read_ahead(mailboxes):
        raise LookupError("a fault of ours")

    spool = make()
    entry = queue(spool)
    watch = Feed(spool, read_ahead).watch()
    _watches.append(watch)
    assert told(watch) == [entry]
    watch.close()


def test_the_pace_of_a_lane_goes_with_it(make):
    feed = Feed(make())
    feed.paces = {"left": 1.0, "kept": 2.0}
    feed.left(["left"])
    assert feed.paces == {"kept": 2.0}


def test_of_two_that_seek_at_once_one_gets_the_lane(make):
    spool = make()
    values = {"lanes": ["0123456789abcdef"], "lease": 30.0, "looked": None}
    with spool.connections.use("take") as connection:
        first = connection.execute(TAKE, {**values, "worker": uuid.uuid4()}).fetchall()
        second = connection.execute(TAKE, {**values, "worker": uuid.uuid4()}).fetchall()
    assert (first, second) == ([("0123456789abcdef", False, None)], [])
    expire(spool)
    with spool.connections.use("take") as connection:
        third = connection.execute(TAKE, {**values, "worker": uuid.uuid4()}).fetchall()
    assert [lane for lane, *_ in third] == [lane for lane, *_ in first]


@pytest.mark.parametrize("ending", ["left", "dead"])
def test_what_a_lane_has_sent_lately_goes_with_it(make, ending):
    """Else a limit per minute would begin anew with each worker."""
    spool = make()
    entry = queue(spool)
    feed, watch = watch_of(spool)
    assert told(watch, 1) == [entry]
    feed.paces[entry.lane] = 12345.0
    if ending == "left":
        watch.close()
    else:
        watch._renew_at = math.inf  # silent from now on
        expire(spool)
    other, next_watch = watch_of(make())
    assert told(next_watch, 1) == [entry]
    assert other.paces == {entry.lane: 12345.0 if ending == "left" else math.inf}
    for each in (watch, next_watch):
        each.close()


def test_a_worker_that_was_silent_says_so_once(make, caplog):
    """Not in a line for each of a hundred lanes, by a name that nobody knows."""
    spool = make()
    for mailbox in ("alice@example.org", "carol@example.org"):
        queue_many(spool, 1, Route(mailbox))
    _, watch = watch_of(spool)
    told(watch, 2)
    expire(spool)
    watch._renew_at = 0.0
    wait_for(lambda: "2 lanes are ours no more" in caplog.text)
    assert caplog.text.count("ours no more") == 1
    watch.close()


# Fair, and not in each other's way


def deliver(feed: Feed, watch: FeedWatch, wanted: set[str], seconds: float = 30.0) -> list[str]:
    """Deliver what is told, slowly, until all wanted mails are told; return what was."""
    seen: list[str] = []
    waiting: list[Entry] = []
    deadline = time.monotonic() + seconds
    while not wanted.issubset(seen):
        assert time.monotonic() < deadline, "never told"
        if wait_for_any(watch, seconds=0.1):
            entries = watch.read()
            seen += [entry.id for entry in entries]
            waiting += [entry for entry in entries if entry.id not in wanted]
        if waiting and (lease := feed.claim(waiting.pop())) is not None:
            lease.settle(Settlement(State.ACCEPTED))
    return seen


def queue_many(spool: PostgresSpool, number: int, route: Route) -> list[Entry]:
    entries = [
        spool.stage(envelope(f"{route.mailbox}{n}@x", route=route), MESSAGE) for n in range(number)
    ]
    spool.prepare(entries)
    spool.publish(entries)
    return entries


def test_lanes_that_are_slow_leave_others_their_mail(make, monkeypatch):
    """Ten accounts with a limit and much mail: all that may be leased ahead is theirs."""
    monkeypatch.setattr(feed_watch, "_LANE_AHEAD", 10)
    monkeypatch.setattr(feed_watch, "_AHEAD", 40)
    monkeypatch.setattr(feed_module, "MOST_AT_ONCE", 10)
    monkeypatch.setattr(feed_watch, "MOST_AT_ONCE", 10)
    spool = make()
    for number in range(5):
        queue_many(spool, 40, Route(f"slow{number}@example.org"))
    feed, watch = watch_of(make())
    wait_for(lambda: feed.held().total() >= 40)
    fast = queue(spool, "fast@x", route=Route("fast@example.org"))
    deliver(feed, watch, {fast.id}, 10.0)
    assert feed.held().total() < 100
    watch.close()


def test_lanes_with_much_mail_take_turns(make, monkeypatch):
    monkeypatch.setattr(lane_sharing, "MOST_LANES", 2)
    monkeypatch.setattr(lane_sharing, "_TURN", 1.0)
    spool = make()
    for number in range(3):
        queue_many(spool, 300, Route(f"busy{number}@example.org"))
    feed, watch = watch_of(make())
    told(watch, 2)
    others = {queue(spool, f"{n}@x", route=Route(f"o{n}@example.org")).id for n in range(3)}
    deliver(feed, watch, others)
    assert len(feed.lanes) <= 2
    watch.close()


def test_lanes_that_get_mail_again_and_again_take_turns(make, monkeypatch):
    monkeypatch.setattr(lane_sharing, "MOST_LANES", 2)
    spool = make()
    routes = {Route(f"m{n}@example.org") for n in range(6)}
    for route in routes:
        queue(spool, f"{route.mailbox}@x", route=route)
    feed, watch = watch_of(make())
    served: set[Route] = set()

    def serve() -> bool:
        for entry in watch.read():
            lease = feed.claim(entry)
            if lease is not None:
                route = lease.envelope.route
                served.add(route)
                lease.settle(Settlement(State.ACCEPTED))
                queue(spool, f"{uuid.uuid4()}@x", route=route)
        return served == routes

    wait_for(serve)
    watch.close()


def test_a_lane_that_was_taken_when_the_answer_was_lost_is_fed(make, monkeypatch):
    real = psycopg.Connection.execute
    lost: list[object] = []

    def execute(self: Connection, query: object, *values: object, **more: object) -> object:
        result = real(self, query, *values, **more)
        if query is TAKE and not lost:
            lost.append(result)
            raise psycopg.OperationalError("the answer is lost")
        return result

    monkeypatch.setattr(psycopg.Connection, "execute", execute)
    entry = queue(make())
    _, watch = watch_of(make(lease=3.0))
    wait_for(lambda: lost)
    assert told(watch) == [entry]
    watch.close()


def test_a_mail_that_somebody_has_locked_stops_no_other(make, database):
    spool = make()
    locked, other = queue(spool, "1@x"), queue(spool, "2@x")
    with psycopg.connect(database) as connection:
        connection.execute(f"SELECT 1 FROM {MAILS} WHERE id = %s FOR UPDATE", [locked.id])
        _, watch = watch_of(make())
        assert told(watch) == [other]
        assert [entry_id for entry_id, _ in jobs(spool)] == [locked.id, other.id]
    watch.close()


def test_the_feed_leaves_a_mail_that_somebody_has(make):
    """Who drains by hand asks no engine: its job is still to be had."""
    spool = make()
    entry, other = queue(spool, "1@x"), queue(spool, "2@x")
    lease = spool.claim(entry)
    _, watch = watch_of(make())
    assert told(watch) == [other]
    assert lease.settle(Settlement(State.ACCEPTED)) is None
    watch.close()


@pytest.mark.parametrize(
    "change",
    [
        f"UPDATE {MAILS} SET state = 'held'",
        f"UPDATE {MAILS} SET state = 'refused'",
        f"UPDATE {MAILS} SET state = 'unclear', due = 0",
        f"DELETE FROM {MAILS}",
    ],
    ids=["held", "refused", "a person's", "gone"],
)
def test_the_job_of_a_mail_that_nobody_may_send_goes(make, change):
    spool = make()
    stale, other = queue(spool, "1@x"), queue(spool, "2@x")
    with spool.connections.use("change") as connection:
        connection.execute(f"{change} WHERE id = %s", [stale.id])
    _, watch = watch_of(make())
    assert told(watch) == [other]
    assert jobs(spool) == [(other.id, "picked")]
    watch.close()


def test_a_mail_that_somebody_has_locked_ends_no_other_lease(make, database):
    spool = make(lease=1.0)
    locked, other = queue(spool, "1@x"), queue(spool, "2@x")
    spool.claim(locked)
    lease = spool.claim(other)
    first = lease.taken_at
    with psycopg.connect(database) as connection:
        connection.execute(f"SELECT 1 FROM {MAILS} WHERE id = %s FOR UPDATE", [locked.id])
        wait_for(lambda: lease.taken_at > first + 1.5)
    lease.release()


def test_a_mail_that_somebody_has_locked_is_settled_later(make, database):
    """The loop of a processor waits half a second for him, and then hardly any more."""
    spool = make()
    entry = queue(spool)
    lease = spool.claim(entry)
    with psycopg.connect(database) as connection:
        connection.execute(f"SELECT 1 FROM {MAILS} WHERE id = %s FOR UPDATE", [entry.id])
        for state in (State.ACCEPTED, State.DEFERRED, State.HELD):
            with pytest.raises(SpoolError, match="lock timeout"):
                lease.settle(Settlement(state, due=5.0, attempts=1))
    assert lease.settle(Settlement(State.ACCEPTED)) is None
    assert list(spool.scan()) == []
    assert jobs(spool) == []


def test_a_person_and_the_feed_do_not_wait_for_each_other(make, monkeypatch):
    """He has the mail and wants its job; the feed has the job and wants the mail."""
    monkeypatch.setattr(feed_watch, "_START", 3600.0)  # the thread does nothing here
    spool, person = make(), make()
    entry = queue(spool)
    feed, watch = watch_of(spool)
    write = Mails._write

    def write_later(self: Mails, connection: Connection, after: Entry, side: Side) -> None:
        with spool.connections.use("lease") as other:
            assert feed.lease(other, [entry.lane], 50) == []
        write(self, connection, after, side)

    monkeypatch.setattr(Mails, "_write", write_later)
    assert person.hold(entry, "why").state is State.HELD
    watch.close()


def test_leases_that_could_not_be_renewed_are_soon(make, monkeypatch):
    spool = make(lease=6.0)
    lease = spool.claim(queue(spool))
    use, failed = Connections.use, []

    def refuse(self: Connections, action: str) -> AbstractContextManager[Connection]:
        if action == "renew leases" and not failed:
            failed.append(time.monotonic())
            raise SpoolError("the server is away")
        return use(self, action)

    monkeypatch.setattr(Connections, "use", refuse)
    first = lease.taken_at
    wait_for(lambda: lease.taken_at > first)
    assert lease.taken_at - failed[0] < 1.9  # else the next of three beats
    lease.release()


@pytest.mark.parametrize("fault", ["the server is away", "no room for a thread"])
def test_a_watch_that_cannot_begin_leaves_nothing_open(make, monkeypatch, fault):
    """A processor tries again and again, for as long as that lasts."""
    spool = make()
    list(spool.scan())

    def fail(*arguments: Any) -> None:
        raise SpoolError(fault) if fault == "the server is away" else RuntimeError(fault)

    where = Connections if fault == "the server is away" else threading.Thread
    name = "connect" if fault == "the server is away" else "start"
    before = open_files()
    with monkeypatch.context() as patched:
        patched.setattr(where, name, fail)
        with pytest.raises((SpoolError, RuntimeError), match=fault):
            spool.watch()
    assert open_files() - before == set()


def test_a_child_that_closes_leaves_its_parent_s_watch_alone(make):
    spool = make()
    watch = spool.watch()
    child = os.fork()
    if child == 0:
        spool.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert wait_for_any(watch._ended, seconds=0) == []  # else its thread would spin
    entry = queue(spool)
    assert told(watch) == [entry]


def test_a_notification_that_comes_with_an_answer_is_told(database):
    with (
        psycopg.connect(database, autocommit=True) as connection,
        psycopg.connect(database, autocommit=True) as other,
    ):
        connection.execute("LISTEN c")
        other.execute("NOTIFY c, 'first'")
        other.execute("NOTIFY c, 'second'")
        connection.execute("SELECT 1")  # reads both from its socket
        reader, writer = os.pipe()
        assert notes_of(connection, reader, seconds=DEADLINE) == ["first", "second"]
        os.close(reader)
        os.close(writer)


def test_watches_in_a_process_with_many_files(make):
    """`select` counts to 1024; an application with many sockets has more."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        spool = make()
        watch = spool.watch()
        _, feed_watch = watch_of(make())
        queue(spool)
        assert wait_for_any(watch, seconds=DEADLINE)
        assert wait_for_any(feed_watch, seconds=DEADLINE)
        feed_watch.close()
        watch.close()
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# Many at once


def test_many_are_settled_at_once_and_each_is_fenced(make, caplog):
    spool = make()
    assert verifyObject(ISettlesTogether, spool)
    entries = [queue(spool, f"{n}@x") for n in range(3)]
    leases = [spool.claim(entry) for entry in entries]
    expire(spool)
    another = make().claim(entries[1])
    (lost,) = spool.settle_accepted(leases)
    with caplog.at_level(logging.ERROR):
        assert lost.settle(Settlement(State.ACCEPTED)) is None
    assert caplog.text.count("may be sent twice") == 1
    assert list(spool.scan()) == [entries[1]]
    assert [mail for mail, _ in jobs(spool)] == [entries[1].id]
    assert spool.leases.held() == []
    assert another.settle(Settlement(State.ACCEPTED)) is None
    assert list(spool.scan()) == []


def test_what_cannot_be_settled_at_once_is_held_still(make, monkeypatch):
    spool = make()
    entries = [queue(spool, f"{n}@x") for n in range(3)]
    leases = [spool.claim(entry) for entry in entries]
    with monkeypatch.context() as patch:
        patch.setattr(Mails, "remove_all", fail)
        with pytest.raises(SpoolError):
            spool.settle_accepted(leases)
    assert spool.leases.held() == leases
    assert all(make().leased(entry) for entry in entries)
    spool.settle_accepted(leases)
    assert list(spool.scan()) == []


def fail(*arguments: object) -> None:
    raise SpoolError("no way to the server")


def test_many_are_settled_beside_one_that_is_locked(make, database):
    """It is waited for by nobody; who settles it singly may try again."""
    spool = make()
    leases = [spool.claim(queue(spool, f"{n}@x")) for n in range(3)]
    with psycopg.connect(database) as person:
        person.execute("SELECT 1 FROM cpsmail.mails WHERE id = %s FOR UPDATE", [leases[1].entry.id])
        assert spool.settle_accepted(leases) == [leases[1]]
        assert spool.leases.held() == [leases[1]]
    assert spool.settle_accepted([leases[1]]) == []
    assert list(spool.scan()) == []


def test_many_are_not_settled_while_leases_are_renewed(make, monkeypatch):
    """Both change many jobs, in whatever order the server likes: they would wait for each other."""
    spool = make()
    leases = [spool.claim(queue(spool, f"{n}@x")) for n in range(3)]
    for lease in leases:
        lease.taken_at -= 20.0
    locked = []
    for module, name in ((lease_module, "beat"), (Mails, "remove_all")):
        real = getattr(module, name)

        def change(*values: object, real: Callable[..., object] = real) -> object:
            locked.append(spool.leases._jobs.locked())
            return real(*values)

        monkeypatch.setattr(module, name, change)
    spool.leases.renew()
    spool.settle_accepted(leases)
    assert locked == [True, True]
    assert list(spool.scan()) == []


# What is known without a question


def test_what_is_leased_ahead_is_read_without_a_question(make, monkeypatch):
    spool = make()
    new, tried = queue(spool, "1@x"), queue(spool, "2@x")
    settlement = Settlement(
        State.DEFERRED, {"bob@example.net": DEFERRED}, due=1.0, attempts=1, reason="try again"
    )
    tried = spool.claim(tried).settle(settlement)
    large = queue(spool, "3@x", b"Subject: large\r\n\r\n" + b"x" * 70_000)
    feed, watch = watch_of(make())
    assert set(told(watch, 3)) == {new, tried, large}
    expected = [spool.load(entry) for entry in (new, tried)]
    assert feed.load(large) == spool.load(large)
    monkeypatch.setattr(PostgresSpool, "load", fail)
    assert [feed.load(entry) for entry in (new, tried)] == expected
    assert expected[1].reason == "try again"
    watch.close()


def test_a_lane_without_a_note_is_not_asked_for_it(make, monkeypatch):
    spool = make()
    entry = queue(spool)
    feed, watch = watch_of(make())
    assert told(watch) == [entry]
    with monkeypatch.context() as patch:
        patch.setattr(PostgresSpool, "lane_note", fail)
        assert feed.lane_note(entry.lane) is None
    now = time.time()
    note = LaneNote("m", "relay", "down", now, now + 60.0)
    feed.note_lane(entry.lane, note)  # ours are seen at once
    assert feed.lane_note(entry.lane) == note
    feed.note_lane(entry.lane, None)
    assert feed.lane_note(entry.lane) is None
    spool.note_lane(entry.lane, note)
    assert feed.lane_note(entry.lane) == note
    watch.close()


def test_what_others_note_of_a_lane_is_seen(make):
    """Somebody drains by hand, beside the worker that has the lane."""
    spool = make()
    entry = queue(spool)
    feed, watch = watch_of(make())
    assert told(watch) == [entry]
    now = time.time()
    spool.note_lane(entry.lane, LaneNote("m", "relay", "down", now, now + 60.0))
    wait_for(lambda: feed.lane_note(entry.lane))
    watch.close()


def test_a_note_from_before_is_known_when_a_lane_is_taken(make):
    spool = make()
    entry = queue(spool)
    note = LaneNote("m", "relay", "down", 1.0, 2.0)
    spool.note_lane(entry.lane, note)
    feed, watch = watch_of(make())
    assert told(watch) == [entry]
    assert feed.lane_note(entry.lane) == note
    watch.close()


def test_what_another_worker_has_is_not_waited_for(make):
    """Its lane is another's: when it is ours again, the watch tells of it again."""
    spool = make()
    entry = queue(spool)
    lease = spool.claim(entry)
    feed = Feed(make())
    assert spool.leased(entry)
    assert not feed.leased(entry)
    feed.lanes = frozenset({entry.lane})
    assert feed.leased(entry)
    lease.release()


def test_a_server_that_dies_may_forget_who_has_a_mail(make, database, monkeypatch):
    """Claims do not wait for its disk; what is leased ahead is not sent on the strength of them."""
    spool = make()
    entries = [queue(spool, f"{n}@x") for n in range(3)]
    feed, watch = watch_of(make())
    assert set(told(watch, 3)) == set(entries)
    ahead: dict[int, list[str]] = {}  # by connection: what there was at its first question
    real = Feed.lease

    def lease(self: Feed, connection: Connection, *values: object) -> list[Entry]:
        ahead.setdefault(connection.info.backend_pid, list(self._ahead))
        return real(self, connection, *values)

    monkeypatch.setattr(Feed, "lease", lease)
    wait_for(lambda: ahead)
    with psycopg.connect(database) as connection:
        connection.execute(f"UPDATE {MAILS} SET lease = NULL, leased_until = NULL")
        connection.execute(f"UPDATE {JOBS} SET status = 'queued', queue_manager_id = NULL")
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    wait_for(lambda: len(ahead) == 2)
    assert [len(each) for each in ahead.values()] == [3, 0]
    wait_for(lambda: feed.held().total() == 3)
    for entry in entries:
        feed.claim(entry).settle(Settlement(State.ACCEPTED))
    assert list(spool.scan()) == []
    watch.close()


# Which lanes are asked for, and taken


def test_few_lanes_are_asked_for_while_there_is_much(make, monkeypatch):
    monkeypatch.setattr(feed_module, "MOST_AT_ONCE", 10)
    monkeypatch.setattr(feed_watch, "MOST_AT_ONCE", 10)
    spool = make()
    routes = [Route(f"m{n}@example.org") for n in range(20)]
    lanes = [queue_many(spool, 12, route)[0].lane for route in routes]
    feed = Feed(spool)
    with spool.connections.use("lease") as connection:
        sizes, asked = [], Counter()
        while feed.held().total() < 200:
            part = feed.next_of(lanes)
            sizes.append(len(part))
            asked.update(part)
            assert feed.lease(connection, part, 10)
        assert sizes[0] == 20
        assert min(sizes) == sizes[5] == 5
        assert asked.keys() == set(lanes)
        for _ in range(20):
            part = feed.next_of(lanes)
            feed.lease(connection, part, 10)
    assert len(part) == 20
    assert feed.held().total() == 240


def test_lanes_that_are_dry_leave_room_between_two_looks(make, monkeypatch):
    monkeypatch.setattr(lane_sharing, "MOST_LANES", 2)
    monkeypatch.setattr(feed_watch, "_LOOK", 3600.0)
    spool = make()
    entries = [queue(spool, f"{n}@x", route=Route(f"m{n}@example.org")) for n in range(9)]
    feed, watch = watch_of(make())
    done = []
    while len(done) < len(entries):
        for entry in told(watch):
            feed.claim(entry).settle(Settlement(State.ACCEPTED))
            done.append(entry.id)
        assert len(feed.lanes) <= 2
    assert sorted(done) == sorted(entry.id for entry in entries)
    watch.close()


def test_a_lane_that_was_left_since_we_looked_is_not_taken(make):
    spool = make()
    with spool.connections.use("take") as connection:
        connection.execute(
            "INSERT INTO cpsmail.lanes (lane, worker, until) VALUES ('left', NULL, now()),"
            " ('noted', NULL, NULL), ('dead', gen_random_uuid(), now()),"
            " ('fed', gen_random_uuid(), now() + interval '1 h')"
        )
        lanes = ["left", "noted", "dead", "fed", "new"]
        for seconds, expected in ((-60, {"noted", "dead", "new"}), (60, {"left"})):
            (looked,) = connection.execute(
                "SELECT now() + make_interval(secs => %s)", [seconds]
            ).fetchone()
            values = {"lanes": lanes, "lease": 30.0, "looked": looked, "worker": uuid.uuid4()}
            assert {lane for lane, *_ in connection.execute(TAKE, values)} == expected
