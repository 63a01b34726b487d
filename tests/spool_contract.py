"""What any spool must do.  A back end's test class inherits `SpoolContract` and gives `spool`."""

from __future__ import annotations

import select
import threading
import time
from typing import Any

import pytest
from zope.interface.verify import verifyObject

from cpsmailaccess_delivery.envelope import Envelope, Route, lane_key
from cpsmailaccess_delivery.errors import (
    EntryBusy,
    InvalidEnvelope,
    KeyTaken,
    NoSuchEntry,
    SpoolError,
)
from cpsmailaccess_delivery.interfaces import (
    Doubt,
    Entry,
    ILease,
    ISpool,
    IWatch,
    LaneNote,
    Outcome,
    Settlement,
    State,
    Verdict,
)

DEADLINE = 30.0  # seconds until a test gives up waiting
ROUTE = Route("alice@example.org", "smtp.example.org", 587)
MESSAGE = b"Subject: hello\n\nX-Zope-Hostname: evil.example\n.\nbody\n"

ACCEPTED = Outcome(State.ACCEPTED, "250 2.0.0 ok", 5.0)
DEFERRED = Outcome(State.DEFERRED, "450 4.2.1 later", 5.0)
REFUSED = Outcome(State.REFUSED, "550 5.1.1 nobody", 5.0)
UNCLEAR = Outcome(State.UNCLEAR, "", 5.0)


def envelope(
    message_id: str = "1.2@example.org",
    *recipients: str,
    route: Route = ROUTE,
    **wishes: Any,
) -> Envelope:
    return Envelope(
        sender="alice@example.org",
        recipients=recipients or ("bob@example.net", "carol@example.net"),
        route=route,
        message_id=message_id,
        **wishes,
    )


def queue(
    spool: Any, message_id: str = "1.2@example.org", message: bytes = MESSAGE, **wishes: Any
) -> Entry:
    """Return an entry that went the whole way."""
    entry: Entry = spool.stage(envelope(message_id, **wishes), message)
    spool.prepare([entry])
    spool.publish([entry])
    return entry


def settle(spool: Any, entry: Entry, state: State, **fields: Any) -> Entry | None:
    lease = spool.claim(entry)
    assert lease is not None
    after: Entry | None = lease.settle(Settlement(state, **fields))
    return after


def told(watch: Any, wanted: int = 1) -> list[Entry]:
    """Return what a watch tells, once it has told this many entries."""
    entries: list[Entry] = []
    while len(entries) < wanted:
        assert select.select([watch.fileno()], [], [], DEADLINE)[0], "nothing told in time"
        entries += watch.read() or []
    return entries


class SpoolContract:
    # The two phases

    def test_provides_the_contract(self, spool):
        assert verifyObject(ISpool, spool)
        assert isinstance(spool.location, str)

    def test_a_mail_is_seen_when_it_is_published(self, spool):
        entry = spool.stage(envelope(), MESSAGE)
        assert entry.state is State.QUEUED
        assert entry.lane == lane_key(ROUTE)
        assert list(spool.scan()) == []
        assert spool.claim(entry) is None
        spool.prepare([entry])
        assert list(spool.scan()) == []
        assert spool.find("1.2@example.org") == []
        spool.publish([entry])
        assert list(spool.scan()) == [entry]

    @pytest.mark.parametrize("prepared", [False, True])
    def test_a_discarded_mail_leaves_nothing(self, spool, prepared):
        entry = spool.stage(envelope(), MESSAGE)
        if prepared:
            spool.prepare([entry])
        spool.discard([entry, entry])
        spool.publish([entry])  # never raises
        assert list(spool.scan()) == []

    def test_what_was_not_staged_cannot_be_prepared(self, spool):
        entry = spool.stage(envelope(), MESSAGE)
        stranger = Entry("1700000000.M000000R000000.0123456789abcdef", entry.lane)
        with pytest.raises(SpoolError):
            spool.prepare([entry, stranger])
        spool.discard([entry, stranger])
        assert list(spool.scan()) == []

    def test_nothing_is_not_an_error(self, spool):
        spool.prepare([])
        spool.publish([])
        spool.discard([])
        spool.sync()

    def test_a_published_mail_is_not_discarded(self, spool):
        entry = queue(spool)
        spool.discard([entry])
        assert list(spool.scan()) == [entry]

    def test_an_envelope_that_cannot_be_kept_is_refused(self, spool):
        with pytest.raises(InvalidEnvelope):
            spool.stage(envelope("a\nX-Zope-Port: 1"), MESSAGE)

    def test_many_at_once_keep_their_order(self, spool):
        entries = [spool.stage(envelope(f"{n}@x"), MESSAGE) for n in range(300)]
        spool.prepare(entries)
        spool.publish(entries)
        assert sorted(entries, key=lambda entry: entry.id) == list(spool.scan())

    def test_the_id_tells_the_time(self, spool, now):
        assert queue(spool).staged_at == pytest.approx(now, abs=1)

    def test_scans_do_not_disturb_each_other(self, spool):
        entries = [spool.stage(envelope(f"{n}@x"), MESSAGE) for n in range(700)]
        spool.prepare(entries)
        spool.publish(entries)
        seen: list[set[Entry]] = []
        threads = [
            threading.Thread(target=lambda: seen.extend(set(spool.scan()) for _ in range(10)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert len(seen) == 40
        assert all(each == set(entries) for each in seen)

    # Leases

    def test_a_lease_shows_the_mail(self, spool):
        entry = queue(spool)
        lease = spool.claim(entry)
        assert verifyObject(ILease, lease)
        assert lease.entry == entry
        assert lease.envelope == envelope()
        assert lease.message == MESSAGE
        assert lease.outcomes == {}
        lease.release()

    @pytest.mark.parametrize("size", [0, 1, 4096, 3 * 1024 * 1024])
    def test_messages_of_any_size(self, spool, size):
        message = b"A: b\n\n" + bytes(range(256)) * (size // 256) + b"\0" * (size % 256)
        lease = spool.claim(queue(spool, message=message))
        assert lease.message == message
        lease.release()

    def test_a_message_that_was_forgotten_is_read_again(self, spool):
        entry = queue(spool)
        lease = spool.claim(entry)
        message = lease.message
        assert lease.read_message() == message
        lease.forget_message()
        assert lease.message == b""
        assert lease.read_message() == message
        lease.set_aside("for a while")
        assert lease.read_message() == message
        lease.release()
        with pytest.raises(SpoolError, match="ended"):
            lease.read_message()

    def test_a_lease_is_exclusive(self, spool):
        entry = queue(spool)
        lease = spool.claim(entry)
        assert spool.leased(entry)
        assert spool.claim(entry) is None
        lease.release()
        lease.release()
        assert not spool.leased(entry)
        again = spool.claim(entry)
        assert again is not None
        again.release()

    def test_one_of_many_threads_gets_the_lease(self, spool):
        entries = [queue(spool, f"{n}@x") for n in range(50)]
        taken: list[Any] = []
        start = threading.Barrier(8)

        def work() -> None:
            start.wait(DEADLINE)
            for entry in entries:
                lease = spool.claim(entry)
                if lease is not None:
                    taken.append(entry)
                    lease.settle(Settlement(State.ACCEPTED))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert sorted(entry.id for entry in taken) == sorted(entry.id for entry in entries)
        assert list(spool.scan()) == []

    def test_asking_for_the_lease_does_not_take_it(self, spool):
        entry = queue(spool)
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                spool.leased(entry)

        asker = threading.Thread(target=ask)
        asker.start()
        try:
            for _ in range(200):
                lease = spool.claim(entry)
                assert lease is not None
                lease.release()
        finally:
            stop.set()
            asker.join(DEADLINE)

    # Settling

    def test_accepted_is_gone(self, spool):
        entry = queue(spool)
        assert settle(spool, entry, State.ACCEPTED) is None
        assert list(spool.scan()) == []
        assert spool.claim(entry) is None
        assert not spool.leased(entry)
        with pytest.raises(NoSuchEntry):
            spool.load(entry)
        spool.sync()

    @pytest.mark.parametrize("state", [State.DEFERRED, State.HELD, State.UNCLEAR, State.REFUSED])
    def test_every_state_keeps_what_is_known(self, spool, state):
        entry = queue(spool)
        outcomes = {"bob@example.net": ACCEPTED, "carol@example.net": DEFERRED}
        after = settle(
            spool, entry, state, outcomes=outcomes, due=17.25, attempts=1, reason="because"
        )
        assert after == Entry(entry.id, entry.lane, state, 17.25, 1)
        assert list(spool.scan()) == [after]
        record = spool.load(entry)
        assert record.entry == after
        assert record.envelope == envelope()
        assert record.outcomes == outcomes
        assert record.reason == "because"
        assert record.size == len(MESSAGE)
        assert spool.claim(entry) is None  # changed
        lease = spool.claim(after)
        assert lease.outcomes == outcomes
        assert lease.entry == after
        lease.release()

    def test_settled_again_and_again(self, spool):
        entry = queue(spool)
        for attempt in range(1, 4):
            entry = settle(spool, entry, State.DEFERRED, due=100.0 * attempt, attempts=attempt)
            assert (entry.due, entry.attempts) == (100.0 * attempt, attempt)
        assert settle(spool, entry, State.ACCEPTED) is None
        assert list(spool.scan()) == []

    def test_earlier_outcomes_are_kept(self, spool):
        entry = queue(spool)
        entry = settle(
            spool, entry, State.DEFERRED, outcomes={"bob@example.net": ACCEPTED}, attempts=1
        )
        entry = settle(
            spool, entry, State.DEFERRED, outcomes={"carol@example.net": DEFERRED}, attempts=2
        )
        assert set(spool.load(entry).outcomes) == {"bob@example.net", "carol@example.net"}

    def test_a_due_time_is_never_early(self, spool):
        after = settle(spool, queue(spool), State.DEFERRED, due=17.00049, attempts=1)
        assert 17.00049 <= after.due < 17.002

    @pytest.mark.parametrize("due", [-1.0, 0.0, 1e30, float("inf")])
    def test_due_times_out_of_this_world(self, spool, due):
        after = settle(spool, queue(spool), State.DEFERRED, due=due, attempts=1)
        assert list(spool.scan()) == [after]

    def test_cancelled_is_gone(self, spool):
        entry = settle(spool, queue(spool), State.DEFERRED, due=17.25, attempts=1)
        assert settle(spool, entry, State.CANCELLED) is None
        assert list(spool.scan()) == []
        with pytest.raises(NoSuchEntry):
            spool.load(entry)
        spool.sync()

    def test_a_refused_mail_may_leave(self, spool):
        entry = queue(spool)
        assert settle(spool, entry, State.REFUSED, keep=False) is None
        assert list(spool.scan()) == []
        spool.sync()

    def test_refused_mails_by_their_age(self, spool, now):
        queue(spool, "1@x")
        settle(spool, queue(spool, "2@x"), State.DEFERRED, outcomes={"bob@example.net": DEFERRED})
        refused = settle(
            spool, queue(spool, "3@x"), State.REFUSED, outcomes={"bob@example.net": REFUSED}
        )
        assert list(spool.refused_before(now - 60)) == []
        assert list(spool.refused_before(max(now, time.time()) + 60)) == [refused]

    @pytest.mark.parametrize("ending", ["released", "cancelled", "left"])
    @pytest.mark.parametrize("state", [State.QUEUED, State.DEFERRED, State.UNCLEAR, State.HELD])
    def test_set_aside_while_leased(self, spool, state, ending):
        entry = queue(spool)
        if state is State.HELD:
            entry = spool.hold(entry, "a person wants to look")
        elif state is not State.QUEUED:
            outcomes = {"bob@example.net": DEFERRED}
            entry = settle(spool, entry, state, outcomes=outcomes, due=9e9, attempts=3)
        before = spool.load(entry)
        lease = spool.claim(entry)
        lease.set_aside("in doubt")
        held = lease.entry
        assert list(spool.scan()) == [held]
        assert (held.id, held.state, held.attempts) == (entry.id, State.HELD, entry.attempts)
        assert spool.load(held).reason == "in doubt"
        assert spool.load(held).outcomes == before.outcomes
        assert spool.claim(entry) is None
        assert spool.claim(held) is None
        if ending == "released":
            lease.release()
            assert spool.load(entry) == before
            assert list(spool.scan()) == [entry]
        elif ending == "cancelled":
            assert lease.settle(Settlement(State.CANCELLED)) is None
            assert list(spool.scan()) == []
        else:
            lease.leave()
            lease.leave()
            assert list(spool.scan()) == [held]
            assert not spool.leased(held)

    def test_what_is_no_settlement_is_refused_and_keeps_the_lease(self, spool):
        entry = queue(spool)
        lease = spool.claim(entry)
        with pytest.raises(SpoolError):
            lease.settle(Settlement(State.QUEUED))
        assert spool.leased(entry)
        lease.release()

    def test_an_ended_lease_settles_nothing(self, spool):
        lease = spool.claim(queue(spool))
        lease.release()
        with pytest.raises(SpoolError):
            lease.settle(Settlement(State.ACCEPTED))
        assert len(list(spool.scan())) == 1

    # What a sender asks for

    def test_a_listing_tells_due_time_and_priority(self, spool):
        wishes = {"not_before": 1_900_000_000.25, "expires": 2e9, "priority": 8, "key": "k"}
        wishes |= {"notify": "never", "ret": "full"}
        watch = spool.watch()
        entry = queue(spool, **wishes)
        assert (entry.state, entry.due, entry.priority) == (State.QUEUED, 1_900_000_000.25, 8)
        assert entry.expires == 2e9
        assert list(spool.scan()) == [entry]
        assert entry in told(watch)
        watch.close()
        lease = spool.claim(entry)
        assert lease.envelope == envelope(**wishes)
        lease.release()
        assert spool.look_up(entry.id) == entry

    def test_the_priority_stays(self, spool):
        entry = queue(spool, priority=2)
        after = settle(spool, entry, State.DEFERRED, due=17.25, attempts=1)
        assert after == Entry(entry.id, entry.lane, State.DEFERRED, 17.25, 1, 2)
        assert spool.hold(after, "why").priority == 2
        assert spool.requeue(after) == Entry(entry.id, entry.lane, State.QUEUED, 0.0, 1, 2)

    def test_a_scheduled_mail_may_be_sent_now(self, spool):
        entry = queue(spool, not_before=1_900_000_000.25)
        assert spool.requeue(entry).due == 0.0

    # Idempotency keys

    def test_a_key_is_held_from_publish_on(self, spool):
        entry = spool.stage(envelope("a@x", key="k"), MESSAGE)
        assert spool.key_holder("k") is None
        spool.prepare([entry])
        assert spool.key_holder("k") is None
        spool.publish([entry])
        assert spool.key_holder("k") == "a@x"
        assert spool.key_holder("other") is None
        settle(spool, entry, State.ACCEPTED)
        assert spool.key_holder("k") == "a@x"

    def test_one_mail_has_a_key(self, spool):
        first, second, third = (
            spool.stage(envelope(f"{name}@x", key="k"), MESSAGE) for name in "abc"
        )
        spool.prepare([first])
        with pytest.raises(KeyTaken):
            spool.prepare([second])
        spool.discard([second])
        spool.publish([first])
        with pytest.raises(KeyTaken):
            spool.prepare([third])
        spool.discard([third])
        assert list(spool.scan()) == [first]
        assert spool.key_holder("k") == "a@x"

    def test_a_discarded_mail_frees_its_key(self, spool):
        first = spool.stage(envelope("a@x", key="k"), MESSAGE)
        spool.prepare([first])
        spool.discard([first])
        assert spool.key_holder("k") is None
        assert queue(spool, "b@x", key="k") in list(spool.scan())
        spool.discard([first])
        assert spool.key_holder("k") == "b@x"

    def test_one_of_several_keys_is_taken(self, spool):
        queue(spool, "a@x", key="k2")
        entries = [spool.stage(envelope(f"{n}@x", key=f"k{n}"), MESSAGE) for n in range(4)]
        with pytest.raises(KeyTaken):
            spool.prepare(entries)
        spool.discard(entries)
        assert [spool.key_holder(f"k{n}") for n in range(4)] == [None, None, "a@x", None]
        assert len(list(spool.scan())) == 1

    @pytest.mark.parametrize("way", ["cancel", "settle"])
    def test_cancelled_before_its_first_attempt_the_key_is_free(self, spool, way):
        entry = queue(spool, "a@x", key="k")
        if way == "cancel":
            spool.cancel(entry)
        else:
            settle(spool, entry, State.CANCELLED)
            spool.sync()
        assert spool.key_holder("k") is None
        entry = settle(spool, queue(spool, "b@x", key="k"), State.DEFERRED, due=9.0, attempts=1)
        if way == "cancel":
            spool.cancel(entry)
        else:
            settle(spool, entry, State.CANCELLED)
            spool.sync()
        assert spool.key_holder("k") == "b@x"

    def test_one_of_many_threads_gets_the_key(self, spool):
        start = threading.Barrier(8)
        won: list[Entry] = []

        def work(number: int) -> None:
            entry = spool.stage(envelope(f"{number}@x", key="k"), MESSAGE)
            start.wait(DEADLINE)
            try:
                spool.prepare([entry])
            except KeyTaken:
                spool.discard([entry])
            else:
                spool.publish([entry])
                won.append(entry)

        threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
        assert list(spool.scan()) == won
        assert len(won) == 1

    # For people

    def test_find_by_message_id(self, spool):
        entry = queue(spool, "a@x")
        queue(spool, "b@x")
        twin = queue(spool, "a@x")
        assert {record.entry for record in spool.find("a@x")} == {entry, twin}
        assert spool.find("c@x") == []

    def test_which_message_ids_there_are(self, spool):
        queue(spool, "a@x")
        spool.hold(queue(spool, "held@x"), "why")
        staged = spool.stage(envelope(message_id="staged@x"), MESSAGE)
        gone = queue(spool, "gone@x")
        spool.claim(gone).settle(Settlement(State.ACCEPTED))
        assert spool.holding(["a@x", "held@x", "staged@x", "gone@x", "x@x"]) == {"a@x", "held@x"}
        assert spool.holding([]) == set()
        spool.discard([staged])

    def test_read_message(self, spool):
        entry = queue(spool)
        assert spool.read_message(entry) == MESSAGE

    @pytest.mark.parametrize("entry_id", ["", "nobody", "../new", "a/b", "\0", "\udc80", "x" * 999])
    def test_look_up_of_an_unknown_id(self, spool, entry_id):
        queue(spool)
        with pytest.raises(NoSuchEntry):
            spool.look_up(entry_id)

    def test_look_up_tells_what_the_mail_is_now(self, spool):
        entry = queue(spool)
        queue(spool, "other@x")
        assert spool.look_up(entry.id) == entry
        after = settle(spool, entry, State.DEFERRED, due=17.25, attempts=1)
        assert spool.look_up(entry.id) == after
        settle(spool, after, State.ACCEPTED)
        with pytest.raises(NoSuchEntry):
            spool.look_up(entry.id)

    @pytest.mark.parametrize("call", ["load", "read_message", "requeue", "cancel", "hold"])
    def test_of_a_mail_that_is_gone(self, spool, call):
        entry = queue(spool)
        settle(spool, entry, State.ACCEPTED)
        more = ["why"] if call == "hold" else []
        with pytest.raises(NoSuchEntry):
            getattr(spool, call)(entry, *more)

    @pytest.mark.parametrize("call", ["load", "read_message", "requeue", "cancel", "hold"])
    def test_a_stale_entry_names_the_mail_as_it_is_now(self, spool, call):
        entry = queue(spool)
        after = settle(spool, entry, State.DEFERRED, due=17.25, attempts=1)
        result = getattr(spool, call)(entry, *(["why"] if call == "hold" else []))
        if call in ("load", "cancel"):
            assert result.entry == after
        elif call == "read_message":
            assert result == MESSAGE
        else:
            state = State.HELD if call == "hold" else State.QUEUED
            assert list(spool.scan()) == [result] == [Entry(entry.id, entry.lane, state, 0.0, 1)]

    def test_hold_and_requeue(self, spool):
        entry = queue(spool)
        held = spool.hold(entry, "the boss wants to read it")
        assert held.state is State.HELD
        assert spool.load(entry).reason == "the boss wants to read it"
        assert spool.claim(entry) is None
        again = spool.requeue(entry)
        assert again == entry
        assert spool.load(entry).reason == ""

    def test_requeue_keeps_outcomes_and_attempts(self, spool):
        entry = queue(spool)
        outcomes = {"bob@example.net": ACCEPTED, "carol@example.net": UNCLEAR}
        settle(spool, entry, State.UNCLEAR, outcomes=outcomes, attempts=3)
        again = spool.requeue(entry)
        assert (again.state, again.attempts, again.due) == (State.QUEUED, 3, 0.0)
        assert list(spool.scan()) == [again]
        lease = spool.claim(again)
        assert lease.outcomes == outcomes
        assert lease.entry.attempts == 3
        lease.release()

    @pytest.mark.parametrize("unclear", [False, True])
    def test_who_waits_for_a_person_is_let_go_on_request_only(self, spool, unclear):
        entry = queue(spool)
        held = UNCLEAR._replace(doubts=2, held=True)
        outcomes = {"bob@example.net": ACCEPTED, "carol@example.net": held}
        settle(spool, entry, State.UNCLEAR, outcomes=outcomes, attempts=3)
        assert spool.load(entry).outcomes == outcomes
        lease = spool.claim(spool.requeue(entry, unclear=unclear))
        now = {**outcomes, "carol@example.net": held._replace(held=not unclear)}
        assert lease.outcomes == now
        lease.release()

    def test_hold_keeps_outcomes(self, spool):
        entry = queue(spool)
        settle(spool, entry, State.DEFERRED, outcomes={"bob@example.net": ACCEPTED}, attempts=1)
        spool.hold(entry, "why")
        record = spool.load(entry)
        assert record.outcomes == {"bob@example.net": ACCEPTED}
        assert (record.entry.attempts, record.reason) == (1, "why")

    def test_cancel(self, spool):
        entry = queue(spool)
        settle(spool, entry, State.DEFERRED, outcomes={"bob@example.net": REFUSED}, attempts=1)
        record = spool.cancel(entry)
        assert record.outcomes == {"bob@example.net": REFUSED}
        assert list(spool.scan()) == []
        with pytest.raises(NoSuchEntry):
            spool.cancel(entry)

    @pytest.mark.parametrize("call", ["requeue", "cancel", "hold"])
    def test_what_is_being_delivered_is_left_alone(self, spool, call):
        entry = queue(spool)
        lease = spool.claim(entry)
        more = ["why"] if call == "hold" else []
        with pytest.raises(EntryBusy):
            getattr(spool, call)(entry, *more)
        assert spool.load(entry).entry == entry
        lease.release()
        getattr(spool, call)(entry, *more)

    def test_lane_notes(self, spool):
        note = LaneNote("alice@example.org", "account", "535", since=1.0, until=2.0)
        key = lane_key(ROUTE)
        assert spool.lane_note(key) is None
        spool.note_lane(key, note)
        assert spool.lane_note(key) == note
        assert spool.lane_notes() == {key: note}
        spool.note_lane(key, None)
        assert spool.lane_notes() == {}

    # Watching

    def test_a_watch_tells_of_commits(self, spool):
        watch = spool.watch()
        assert verifyObject(IWatch, watch)
        assert not select.select([watch.fileno()], [], [], 0)[0]
        entry = queue(spool)
        assert entry in told(watch)
        assert list(watch.read()) == []
        watch.close()
        watch.close()

    def test_a_watch_tells_of_released_mails(self, spool):
        entry = queue(spool)
        spool.hold(entry, "why")
        watch = spool.watch()
        again = spool.requeue(entry)
        assert again in told(watch)
        watch.close()

    def test_every_watch_is_told(self, spool):
        watches = [spool.watch(), spool.watch()]
        entry = queue(spool)
        for watch in watches:
            assert entry in told(watch)
            watch.close()

    # The end

    def test_sweep_touches_nothing_of_the_living(self, spool):
        staged = spool.stage(envelope("a@x"), MESSAGE)
        prepared = spool.stage(envelope("b@x"), MESSAGE)
        spool.prepare([prepared])
        queued = queue(spool, "c@x")
        assert list(spool.left_overs()) == []
        report = spool.sweep()
        assert (report.removed, report.held) == ((), ())
        spool.prepare([staged])
        spool.publish([staged, prepared])
        assert set(spool.scan()) == {staged, prepared, queued}

    def test_close_twice(self, spool):
        spool.close()
        spool.close()


STATES = (State.QUEUED, State.DEFERRED, State.UNCLEAR, State.REFUSED, State.HELD)


def bring(spool: Any, state: State, message_id: str = "1.2@example.org", **wishes: Any) -> Entry:
    """Return a mail in a state, with all that may be known of it."""
    entry = queue(spool, message_id, **wishes)
    if state is State.HELD:
        held: Entry = spool.hold(entry, "a person wants to look")
        return held
    if state is State.QUEUED:
        return entry
    outcomes = {"bob@example.net": ACCEPTED, "carol@example.net": DEFERRED}
    due = 0.0 if state is State.REFUSED else 9e9
    after = settle(spool, entry, state, outcomes=outcomes, due=due, attempts=3, reason="as it was")
    assert after is not None
    return after


class DoubtContract:
    """Of a spool that outlives its processes: whoever cancels a mail dies before he is done."""

    def leave(self, spool: Any, entry: Entry, token: str = "T0k3n") -> Doubt:
        lease = spool.claim(entry)
        lease.set_aside("in doubt: who knows?", token)
        assert spool.doubts() == []  # its transaction has not ended
        lease.leave()
        (doubt,) = spool.doubts()
        assert doubt == Doubt(lease.entry, token, cancels=True)
        return doubt

    @pytest.mark.parametrize("verdict", Verdict)
    @pytest.mark.parametrize("state", STATES)
    def test_a_cancel_in_doubt(self, spool, state, verdict):
        entry = bring(spool, state)
        before, message = spool.load(entry), spool.read_message(entry)
        doubt = self.leave(spool, entry)
        record = spool.resolve(doubt, verdict)
        assert record.envelope == before.envelope
        assert (record.entry, record.outcomes) == (doubt.entry, before.outcomes)
        assert spool.doubts() == []
        assert spool.resolve(doubt, verdict) is None
        if verdict is Verdict.COMMITTED:
            assert list(spool.scan()) == []
            return
        (there,) = spool.scan()
        assert spool.read_message(there) == message
        if verdict is Verdict.ABORTED:
            assert there == entry
            assert spool.load(there) == before
            assert settle(spool, there, State.ACCEPTED) is None
        else:
            assert there == doubt.entry
            after = spool.load(there)
            assert after.reason.startswith("in doubt: ")
            assert "nobody can tell" in after.reason
            assert after.outcomes == before.outcomes

    @pytest.mark.parametrize("verdict", [Verdict.COMMITTED, Verdict.ABORTED])
    @pytest.mark.parametrize("state", [State.QUEUED, State.DEFERRED])
    def test_the_key_of_a_cancel_in_doubt(self, spool, state, verdict):
        entry = bring(spool, state, key="k")
        spool.resolve(self.leave(spool, entry), verdict)
        free = verdict is Verdict.COMMITTED and state is State.QUEUED  # never tried
        assert spool.key_holder("k") == (None if free else "1.2@example.org")

    @pytest.mark.parametrize("verdict", Verdict)
    def test_nobody_relies_on_a_key_before_the_witness_has_told(self, spool, verdict):
        """Who did would commit without a mail, and then the one with the key is gone."""
        doubt = self.leave(spool, bring(spool, State.QUEUED, key="k"))
        with pytest.raises(KeyTaken, match="in doubt, and the witness"):
            spool.key_holder("k")
        spool.resolve(doubt, verdict)
        gone = verdict is Verdict.COMMITTED
        assert spool.key_holder("k") == (None if gone else "1.2@example.org")

    @pytest.mark.parametrize("decision", ["release", "hold", "cancel"])
    def test_a_person_decides_on_a_cancel_in_doubt(self, spool, decision):
        doubt = self.leave(spool, bring(spool, State.DEFERRED))
        if decision == "release":
            spool.requeue(doubt.entry, unclear=True)
        elif decision == "hold":
            spool.hold(doubt.entry, "not before I have looked")
        else:
            spool.cancel(doubt.entry)
        assert spool.doubts() == []
        before = list(spool.scan())
        for verdict in Verdict:
            assert spool.resolve(doubt, verdict) is None
        assert list(spool.scan()) == before
        if decision == "release":
            assert spool.load(spool.hold(before[0], "why")).cancel is None
            assert spool.doubts() == []

    def test_a_cancel_after_one_in_doubt(self, spool):
        """Each is asked about by itself, and the answer to one is none to the other."""
        entry = bring(spool, State.DEFERRED)
        before = spool.load(entry)
        first = self.leave(spool, entry)
        second = self.leave(spool, first.entry, "another")
        for verdict in Verdict:
            assert spool.resolve(first, verdict) is None
        spool.resolve(second, Verdict.ABORTED)
        assert spool.doubts() == [first]
        lease = spool.claim(first.entry)
        lease.set_aside("a third one", "a third")
        lease.release()
        assert spool.doubts() == [first]
        spool.resolve(first, Verdict.ABORTED)
        assert spool.load(entry) == before

    def test_set_aside_again_without_a_token(self, spool):
        """As who moves it does: nobody asks meanwhile, nor when he dies."""
        doubt = self.leave(spool, bring(spool, State.QUEUED))
        lease = spool.claim(doubt.entry)
        lease.set_aside("being moved")
        assert spool.doubts() == []
        lease.leave()
        assert spool.doubts() == []
        assert spool.resolve(doubt, Verdict.COMMITTED) is None
