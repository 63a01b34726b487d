"""Each request to the server is lost in turn, or its answer, or it is refused; or all that follow.

By number, not chosen by hand: what the code asks is counted on its way, see `postgres_proxy`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import transaction

pytest.importorskip("psycopg", reason="needs the extra [postgres]")

import psycopg

from cpsmailaccess_delivery import Outbox, State, recorder
from cpsmailaccess_delivery.envelope import parse_block
from cpsmailaccess_delivery.errors import OutboxError, SpoolError
from cpsmailaccess_delivery.interfaces import Outcome, Settlement, Verdict
from cpsmailaccess_delivery.pg import feed_watch, staging
from cpsmailaccess_delivery.pg.mails import MAILS, VISIBLE
from cpsmailaccess_delivery.testing import SMTPServer
from postgres_helpers import ALICE, BOB, CAROL, MESSAGE, open_outbox, put, send, wait_for
from postgres_proxy import ANSWER, CODES, REQUEST, Proxy

HOWS = ["request", "answer", "refused", "away"]
MANY = 200  # requests that no story needs
STEP = 1 if os.environ.get("CI") == "true" else 4  # each one takes a while


@pytest.fixture
def relay() -> Iterator[SMTPServer]:
    with SMTPServer() as server:
        yield server


@pytest.fixture
def proxy(database: str) -> Iterator[Proxy]:
    made = Proxy(database)
    yield made
    made.close()


@pytest.fixture
def direct(database: str, relay: SMTPServer) -> Iterator[Outbox]:
    """The same outbox on a way where nothing is lost."""
    with open_outbox(f"{database}?lease=1") as made:
        put(made, relay, ALICE)
        yield made


@pytest.fixture
def outbox(proxy: Proxy, direct: Outbox) -> Iterator[Outbox]:
    """What is tried; it has asked before, so that no request is about the beginning."""
    with open_outbox(f"{proxy.url}&lease=1") as made:
        list(made.spool.scan())
        yield made


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "DOUBT_AFTER", 0.0)
    monkeypatch.setattr(staging, "_LATE", 0.02)
    monkeypatch.setattr(recorder, "_UNSETTLED", 0.05)
    monkeypatch.setattr(feed_watch, "_LOOK", 0.2)


@pytest.fixture(params=HOWS)
def faults(request: pytest.FixtureRequest, proxy: Proxy) -> Faults:
    return Faults(proxy, request.param)


class Faults:
    """Iterate: each turn something else goes wrong, until nothing does any more."""

    def __init__(self, proxy: Proxy, how: str) -> None:
        self.how = how
        self.proxy = proxy

    def __iter__(self) -> Iterator[int]:
        for number in range(1, MANY, STEP):
            how = {"answer": ANSWER, "refused": CODES[number % len(CODES)]}.get(self.how, REQUEST)
            self.proxy.arm(number, how, lasting=self.how == "away")
            yield number
            if not self.heal():
                assert number > 1
                return
        pytest.fail("it never ended")

    def heal(self) -> bool:
        """Let all go well from now on; return whether something had gone wrong."""
        return self.proxy.disarm()


def jobless(database: str) -> list[str]:
    """Return the mails that no engine would ever name: there are none."""
    with psycopg.connect(database) as connection:
        query = (
            "SELECT id FROM cpsmail.mails WHERE (state = 'queued' OR (state IN"
            " ('deferred', 'unclear') AND due > 0)) AND NOT EXISTS (SELECT 1 FROM"
            " cpsmail.pgqueuer jobs WHERE jobs.id = mails.job AND dedupe_key = mails.id)"
        )
        return [row[0] for row in connection.execute(query)]


def states(outbox: Outbox) -> dict[str, State]:
    """Return the states of the visible mails, by Message-Id."""
    with outbox.spool.connections.use("look") as connection:
        rows = connection.execute(f"SELECT block, state FROM {MAILS} WHERE {VISIBLE}").fetchall()
    return {parse_block(block)[0].message_id: State(state) for block, state in rows}


def deliver(outbox: Outbox, relay: SMTPServer) -> dict[str, int]:
    """Deliver what is due; return how often which mail arrived since the last time."""
    outbox.processor().run(forever=False)
    arrived = Counter(mail.message_id for mail in relay.mails)
    relay.mails.clear()
    return arrived


# Transactions


class Veto(Exception):
    pass


class Vetoer:
    """Another participant, which votes after ours was made durable, and says no."""

    transaction_manager = None

    def tpc_vote(self, txn: Any) -> None:
        raise Veto

    def sortKey(self) -> str:
        return "~~~~"

    def nothing(self, txn: Any) -> None:
        pass

    abort = tpc_begin = commit = tpc_finish = tpc_abort = nothing


def send_one(outbox: Outbox, number: int) -> list[str]:
    return [outbox.delivery.send(ALICE, [BOB], MESSAGE)]


def send_some(outbox: Outbox, number: int) -> list[str]:
    account = outbox.accounts.get(ALICE)
    outbox.accounts.put(account.replace(mailbox=CAROL, mails_per_session=number))
    return [
        outbox.delivery.send(ALICE, [BOB], MESSAGE, idempotency_key=f"{number} {n}")
        for n in range(3)
    ]


@pytest.mark.parametrize("veto", [False, True], ids=["commit", "veto"])
@pytest.mark.parametrize("work", [send_one, send_some])
def test_a_transaction(
    faults: Faults,
    outbox: Outbox,
    direct: Outbox,
    database: str,
    relay: SMTPServer,
    caplog: pytest.LogCaptureFixture,
    work: Callable[[Outbox, int], list[str]],
    veto: bool,
) -> None:
    """Where the commit returned, all arrive once; where it raised, none does."""
    for number in faults:
        caplog.clear()
        ids, committed = [], False
        try:
            ids = work(outbox, number)
            if veto:
                transaction.get().join(Vetoer())
            transaction.commit()
            committed = True
        except (OutboxError, Veto):
            transaction.abort()
        assert not (veto and committed)
        faults.heal()
        wait_for(lambda: outbox.spool.staging._thread is None)  # published late
        direct.spool.sweep()
        found = states(direct)
        if committed:
            assert found == dict.fromkeys(ids, State.QUEUED), number
        else:
            assert set(found.values()) <= {State.HELD}, number  # in doubt, for a witness
        if work is send_some:
            for n in range(3):
                holder = direct.spool.key_holder(f"{number} {n}")
                assert holder in (found if found else {None}), number
            if committed and "put them again" not in caplog.text:
                assert direct.accounts.get(CAROL).mails_per_session == number
        assert jobless(database) == []
        for message_id in found:
            if not committed:
                direct.queue.cancel(message_id)
        assert deliver(direct, relay) == dict.fromkeys(ids if committed else [], 1), number


@pytest.mark.parametrize("veto", [False, True], ids=["commit", "veto"])
def test_a_transaction_that_takes_a_mail_back(
    faults: Faults, outbox: Outbox, direct: Outbox, database: str, relay: SMTPServer, veto: bool
) -> None:
    """Committed, it is never sent; else it arrives once, if need be when a person has let it go."""
    for number in faults:
        (message_id,) = send(direct)
        committed = False
        try:
            outbox.delivery.cancel(message_id)
            if veto:
                transaction.get().join(Vetoer())
            transaction.commit()
            committed = True
        except (OutboxError, Veto):
            transaction.abort()
        faults.heal()
        wait_for(lambda: not any(map(direct.spool.leased, direct.spool.scan())))
        assert jobless(database) == []
        found = states(direct)
        assert found.get(message_id) in (
            (None, State.HELD) if committed else (State.QUEUED, State.HELD)
        ), number
        arrived = deliver(direct, relay)
        if found.get(message_id) is State.HELD:
            assert not arrived, number
            if committed:
                direct.queue.cancel(message_id)
            else:
                direct.queue.release(message_id)
                arrived = deliver(direct, relay)
        assert arrived == ({} if committed else {message_id: 1}), number
        assert states(direct) == {}


@pytest.mark.parametrize("way", ["commit", "roll back"])
def test_in_the_application_s_own_transaction(
    faults: Faults, proxy: Proxy, outbox: Outbox, direct: Outbox, relay: SMTPServer, way: str
) -> None:
    """Nothing is in doubt: the mail is there if the row of the application is."""
    with psycopg.connect(direct.spool.connections._conninfo, autocommit=True) as connection:
        connection.execute("CREATE TABLE orders (message_id text)")
    try:
        for number in faults:
            with psycopg.connect(direct.spool.connections._conninfo) as connection:
                connection.execute("DELETE FROM orders")
            try:
                with closing(psycopg.connect(proxy.url)) as connection, connection:
                    message_id = outbox.within(connection).send(ALICE, [BOB], MESSAGE)
                    connection.execute("INSERT INTO orders VALUES (%s)", [message_id])
                    if way == "roll back":
                        raise Veto
            except (OutboxError, psycopg.Error, Veto):
                pass
            faults.heal()
            with psycopg.connect(direct.spool.connections._conninfo) as connection:
                rows = [row[0] for row in connection.execute("SELECT * FROM orders")]
            assert not (rows and way == "roll back")
            assert direct.spool.sweep().held == ()
            assert deliver(direct, relay) == dict.fromkeys(rows, 1), number
    finally:
        with psycopg.connect(direct.spool.connections._conninfo, autocommit=True) as connection:
            connection.execute("DROP TABLE orders")


# What people do


@pytest.mark.parametrize("verb", ["hold", "release", "retry", "cancel"])
def test_what_people_do(
    faults: Faults, outbox: Outbox, direct: Outbox, database: str, relay: SMTPServer, verb: str
) -> None:
    """It is done, or it is not and says so; and never half."""
    for number in faults:
        (message_id,) = send(direct)
        before = State.HELD if verb == "release" else State.QUEUED
        if verb == "release":
            direct.queue.hold(message_id, "before")
        after = {"hold": State.HELD, "cancel": None}.get(verb, State.QUEUED)
        arguments = ["why"] if verb == "hold" else []
        try:
            getattr(outbox.queue, verb)(message_id, *arguments)
            allowed = [after]
        except OutboxError:
            allowed = [before, after]
        faults.heal()
        state = states(direct).get(message_id)
        assert state in allowed, number
        assert jobless(database) == []
        assert deliver(direct, relay) == ({message_id: 1} if state is State.QUEUED else {}), number
        if state is State.HELD:
            direct.queue.cancel(message_id)
        assert states(direct) == {}


# What the holder of a lease does

NOW = 1000.0  # seconds since the epoch: due
SETTLEMENTS = {
    State.ACCEPTED: Settlement(State.ACCEPTED),
    State.CANCELLED: Settlement(State.CANCELLED),
    State.DEFERRED: Settlement(
        State.DEFERRED, {BOB: Outcome(State.DEFERRED, "450 later", 5.0)}, due=NOW, attempts=1
    ),
    State.UNCLEAR: Settlement(
        State.UNCLEAR, {BOB: Outcome(State.UNCLEAR, "", 5.0)}, due=NOW, attempts=1
    ),
    State.REFUSED: Settlement(
        State.REFUSED, {BOB: Outcome(State.REFUSED, "550 no", 5.0)}, attempts=1
    ),
    State.HELD: Settlement(State.HELD, attempts=1, reason="why"),
}


@pytest.mark.parametrize("state", list(SETTLEMENTS))
def test_a_settlement(
    faults: Faults,
    outbox: Outbox,
    direct: Outbox,
    database: str,
    caplog: pytest.LogCaptureFixture,
    state: State,
) -> None:
    """Tried until it is recorded, as the processor does; once, and nobody hears of a lost lease."""
    for number in faults:
        (message_id,) = send(direct)
        lease = claimed(faults, outbox, direct, message_id)
        for _ in range(2):
            try:
                lease.settle(SETTLEMENTS[state])
                break
            except SpoolError:
                faults.heal()
        else:
            pytest.fail(f"{number}: not even the second time")
        expected = {} if state in (State.ACCEPTED, State.CANCELLED) else {message_id: state}
        assert states(direct) == expected, number
        if expected:
            (record,) = direct.queue.find(message_id)
            assert record.outcomes == SETTLEMENTS[state].outcomes
            assert record.entry.attempts == 1
        assert jobless(database) == []
        assert "may be sent twice" not in caplog.text
        cancel_all(direct)


def test_a_lease_that_is_given_back(
    faults: Faults, outbox: Outbox, direct: Outbox, database: str, relay: SMTPServer
) -> None:
    """Or set aside and then given back: the mail is as it was, at the latest after its lease."""
    for number in faults:
        ids = send(direct, 2)
        for message_id in ids:
            try:
                lease = claimed(faults, outbox, direct, message_id)
                if message_id == ids[1]:
                    lease.set_aside("why")
            except SpoolError:
                pass
            lease.release()
        faults.heal()
        wait_for(lambda: not any(map(direct.spool.leased, direct.spool.scan())))
        assert jobless(database) == []
        found = states(direct)
        assert found[ids[0]] is State.QUEUED
        if found[ids[1]] is State.HELD:  # set aside, and how it was could not be written
            direct.queue.release(ids[1])
        assert deliver(direct, relay) == dict.fromkeys(ids, 1), number


def test_a_renewal(faults: Faults, proxy: Proxy, direct: Outbox) -> None:
    """What was not renewed now is the next time; nobody has lost his mail by then."""
    with open_outbox(f"{proxy.url}&lease=300") as outbox:
        list(outbox.spool.scan())
        for number in faults:
            leases = [claimed(faults, outbox, direct, message_id) for message_id in send(direct, 3)]
            for lease in leases:
                lease.taken_at -= 200.0
            renewed = [lease.taken_at for lease in leases]
            for _ in range(2):
                try:
                    outbox.spool.leases.renew()
                    break
                except SpoolError:
                    faults.heal()
            assert all(
                lease.taken_at > before for lease, before in zip(leases, renewed, strict=True)
            )
            for lease in leases:
                wait_for(lambda lease=lease: settled(lease, faults))
            assert states(direct) == {}, number


def settled(lease: Any, faults: Faults) -> bool:
    try:
        lease.settle(SETTLEMENTS[State.ACCEPTED])
    except SpoolError:
        faults.heal()
        return False
    return True


def claimed(faults: Faults, outbox: Outbox, direct: Outbox, message_id: str) -> Any:
    """Return the lease of a mail, however often it takes."""
    (record,) = direct.queue.find(message_id)
    entry = record.entry

    def try_() -> Any:
        try:
            return outbox.spool.claim(entry)
        except SpoolError:
            faults.heal()
            with direct.spool.connections.use("expire") as connection:  # nobody knows of it
                connection.execute(
                    f"UPDATE {MAILS} SET leased_until = NULL WHERE id = %s", [entry.id]
                )
            return None

    return wait_for(try_)


def cancel_all(outbox: Outbox) -> None:
    for entry in list(outbox.spool.scan()):
        outbox.queue.cancel(entry)


# What was left behind


@pytest.mark.parametrize("verdict", list(Verdict))
def test_what_is_in_doubt(
    faults: Faults, outbox: Outbox, direct: Outbox, database: str, verdict: Verdict
) -> None:
    """Swept and resolved when it can be; until then it is held, or not seen."""
    from test_postgres_crashes import staged

    for number in faults:
        entry = staged(direct, witnessed=True)
        for _ in range(2):
            try:
                outbox.spool.sweep()
                for doubt in outbox.spool.doubts():
                    outbox.spool.resolve(doubt, verdict)
                break
            except SpoolError:
                assert set(states(direct).values()) <= {State.HELD, State.QUEUED}
                faults.heal()
        expected = {
            Verdict.COMMITTED: {"1@x": State.QUEUED},
            Verdict.ABORTED: {},
            Verdict.UNKNOWN: {"1@x": State.HELD},
        }[verdict]
        assert states(direct) == expected, number
        assert jobless(database) == []
        cancel_all(direct)
        direct.spool.publish([entry]) if verdict is Verdict.ABORTED else None
        cancel_all(direct)


# A processor that runs


def well(relay: SMTPServer) -> None:
    pass


def later(relay: SMTPServer) -> None:
    relay.on("RCPT", reply="450 4.2.1 later", times=1)


def never(relay: SMTPServer) -> None:
    relay.on("BODY", reply="550 5.7.1 no", times=1)


def hangs_up(relay: SMTPServer) -> None:
    relay.on("TAKEN", drop=True, times=1)


def down(relay: SMTPServer) -> None:
    relay.drop_sessions()
    relay.on("GREETING", reply="421 4.3.2 later", drop=True, times=2)


@pytest.mark.parametrize("relay_does", [well, later, never, hangs_up, down])
def test_a_processor(
    faults: Faults,
    proxy: Proxy,
    direct: Outbox,
    database: str,
    relay: SMTPServer,
    relay_does: Callable[[SMTPServer], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It goes on; each mail arrives, and twice only when the relay did not say that it has it.

    And nobody is told that his account is in trouble, though there is a way to tell him.
    """
    put(direct, relay, "*")
    with open_outbox(f"{proxy.url}&lease=5") as outbox:
        processor = outbox.processor()
        processor.start()
        wait_for(lambda: processor.scheduler)
        for number in faults:
            relay_does(relay)
            (message_id,) = send(direct)
            final = State.REFUSED if relay_does is never else None

            def is_done(mail: str = message_id, final: State | None = final) -> bool:
                return states(direct).get(mail) is final

            wait_for(lambda is_done=is_done: proxy.happened or is_done())
            faults.heal()
            wait_for(is_done)
            if relay_does is never:  # and the sender is told
                wait_for(lambda m=message_id: relay.mails and list(states(direct)) == [m])
                assert [mail.sender for mail in relay.mails] == [""], number
            else:
                times = 2 if relay_does is hangs_up else 1
                assert [mail.message_id for mail in relay.mails] == [message_id] * times, number
            cancel_all(direct)
            assert processor.is_alive()
            assert jobless(database) == []
            relay.forget()
            relay.mails.clear()
        assert processor.stop()
    assert "fault of ours" not in caplog.text
