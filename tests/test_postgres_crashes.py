"""Crashes on PostgreSQL: of who commits, of workers, of the server, of connections."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import transaction

pytest.importorskip("psycopg", reason="needs the extra [postgres]")

from conftest import KEY
from cpsmailaccess_delivery import Account, Outbox, State
from cpsmailaccess_delivery.envelope import parse_block
from cpsmailaccess_delivery.errors import NoSuchEntry, OutboxError, VaultUnreachable
from cpsmailaccess_delivery.interfaces import Settlement, Verdict
from cpsmailaccess_delivery.metrics import Collector
from cpsmailaccess_delivery.pg import staging
from cpsmailaccess_delivery.smtp.machine import WINDOW
from cpsmailaccess_delivery.terms import Terms
from cpsmailaccess_delivery.testing import SMTPServer
from postgres_helpers import (
    ALICE,
    BOB,
    DEADLINE,
    MESSAGE,
    Server,
    open_outbox,
    put,
    send,
    start_server,
    wait_for,
)
from postgres_server import Standby

LEASE = 2.0  # seconds
HERE = Path(__file__).parent


@pytest.fixture
def relay() -> Iterator[SMTPServer]:
    with SMTPServer() as server:
        yield server


@pytest.fixture
def outbox(database: str, relay: SMTPServer) -> Iterator[Outbox]:
    with open_outbox(database) as made:
        put(made, relay, ALICE)
        yield made


def script(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "postgres_scenes.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=HERE,
    )


@pytest.fixture
def worker(database: str) -> Iterator[Any]:
    """Starts `cpsmail run`; what still runs at the end is killed."""
    started = []
    environ = {
        **os.environ,
        "CPSMAIL_OUTBOX": f"{database}?lease={LEASE}",
        "CPSMAIL_KEY": KEY.hex(),
        "CPSMAIL_HELO_NAME": "client.example.org",
    }

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "cpsmailaccess_delivery", "run", *arguments],
                env=environ,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


# Who commits dies


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("before the vote", "nothing"),
        ("inside the vote", "nothing"),
        ("after the vote", "in doubt"),
        ("inside the finish", "in doubt"),
        ("after the finish", "queued"),
    ],
)
def test_who_commits_dies(database, outbox, relay, monkeypatch, moment, left):
    dying = script("commit", database, moment)
    message_id = dying.communicate(timeout=60)[0].strip()
    assert message_id
    assert dying.returncode == -signal.SIGKILL
    if left == "queued":
        assert outbox.status(message_id).state is State.QUEUED
        assert outbox.processor().run(forever=False).accepted == 1
        assert len(relay.mails) == 1
        return
    with pytest.raises(NoSuchEntry):
        outbox.status(message_id)
    assert outbox.spool.sweep().held == ()  # it may be about to finish
    monkeypatch.setattr(staging, "DOUBT_AFTER", 0.0)
    if left == "nothing":
        assert list(outbox.spool.left_overs()) == []
        assert outbox.spool.sweep().held == ()
        return
    (entry_id,) = outbox.spool.left_overs()
    assert outbox.spool.sweep().held == (entry_id,)
    status = outbox.status(message_id)
    assert status.state is State.HELD
    assert "in doubt" in status.reason
    assert outbox.processor().run(forever=False).accepted == 0
    outbox.queue.release(message_id)
    assert outbox.processor().run(forever=False).accepted == 1
    assert len(relay.mails) == 1


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_witness_decides(outbox, relay, monkeypatch, verdict):
    entry = staged(outbox, witnessed=True)
    monkeypatch.setattr(staging, "DOUBT_AFTER", 0.0)
    assert outbox.spool.sweep().held == (entry.id,)
    (doubt,) = outbox.spool.doubts()
    held, token, cancels = doubt
    assert (held.id, held.state, token, cancels) == (entry.id, State.HELD, "T0k3n", False)
    record = outbox.spool.resolve(doubt, verdict)
    assert record.envelope.message_id == "1@x"
    assert outbox.spool.doubts() == []
    assert outbox.spool.resolve(doubt, verdict) is None
    found = [entry.state for entry in outbox.spool.scan()]
    assert (
        found
        == {
            Verdict.COMMITTED: [State.QUEUED],
            Verdict.ABORTED: [],
            Verdict.UNKNOWN: [State.HELD],
        }[verdict]
    )
    accepted = outbox.processor().run(forever=False).accepted
    assert accepted == (verdict is Verdict.COMMITTED)


@pytest.mark.parametrize("meanwhile", ["nothing", "held", "aborted"])
def test_who_stood_still_finishes_after_all(outbox, monkeypatch, meanwhile):
    """Not dead, only stopped between vote and finish: what it commits is not lost."""
    entry = staged(outbox, witnessed=True)
    if meanwhile != "nothing":
        monkeypatch.setattr(staging, "DOUBT_AFTER", 0.0)
        outbox.spool.sweep()
    if meanwhile == "aborted":
        (doubt,) = outbox.spool.doubts()
        outbox.spool.resolve(doubt, Verdict.ABORTED)
        assert list(outbox.spool.scan()) == []
    outbox.spool.publish([entry])
    assert list(outbox.spool.scan()) == [entry]
    assert outbox.processor().run(forever=False).accepted == 1


@pytest.mark.parametrize(
    ("moment", "left"),
    [
        ("before it is set aside", State.QUEUED),
        ("after the vote", State.HELD),
        ("after the finish", None),
    ],
)
def test_who_cancels_dies(database, outbox, relay, moment, left):
    (message_id,) = send(outbox)
    dying = script("cancel", f"{database}?lease=1", message_id, moment)
    assert dying.communicate(timeout=60)[0].strip() == message_id
    assert dying.returncode == -signal.SIGKILL
    wait_for(lambda: not any(map(outbox.spool.leased, outbox.spool.scan())))
    assert [entry.state for entry in outbox.spool.scan()] == ([left] if left else [])
    if left is State.HELD:
        assert "transaction that cancels it" in outbox.status(message_id).reason
        assert outbox.processor().run(forever=False).accepted == 0
        outbox.queue.release(message_id)  # it had not committed
    assert outbox.processor().run(forever=False).accepted == (left is not None)
    assert len(relay.mails) == (left is not None)


@pytest.mark.parametrize("meanwhile", ["nothing", "delivered"])
def test_who_stood_still_cancels_after_all(outbox, database, meanwhile):
    """Taken for dead, so the mail is what it was before: gone all the same, if nobody has it."""
    send(outbox)
    (entry,) = outbox.spool.scan()
    lease = outbox.spool.claim(entry)
    lease.set_aside("in doubt: and so on", "T0k3n")
    silent = "UPDATE cpsmail.mails SET leased_until = clock_timestamp() - make_interval(secs => %s)"
    with psycopg.connect(database) as connection:
        connection.execute(silent, [staging.DOUBT_AFTER - 60.0])
    assert outbox.spool.doubts() == []
    with psycopg.connect(database) as connection:
        connection.execute(silent, [staging.DOUBT_AFTER + 1.0])
    (doubt,) = outbox.spool.doubts()
    outbox.spool.resolve(doubt, Verdict.ABORTED)
    assert list(outbox.spool.scan()) == [entry]
    delivered = meanwhile == "delivered"
    if delivered:
        assert outbox.processor().run(forever=False).accepted == 1
    assert lease.settle(Settlement(State.CANCELLED)) is None
    assert list(outbox.spool.scan()) == []
    assert outbox.processor().run(forever=False).accepted == 0


def test_a_late_cancel_leaves_the_key_of_what_another_has(outbox, database):
    with transaction.manager:
        outbox.delivery.send(ALICE, [BOB], MESSAGE, idempotency_key="k")
    (entry,) = outbox.spool.scan()
    lease = outbox.spool.claim(entry)
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE cpsmail.mails SET leased_until = clock_timestamp()")
    other = outbox.spool.claim(entry)
    assert lease.settle(Settlement(State.CANCELLED)) is None
    assert outbox.spool.key_holder("k") is not None
    assert other.settle(Settlement(State.CANCELLED)) is None
    assert outbox.spool.key_holder("k") is None


def test_what_belongs_to_no_transaction_is_never_in_doubt(outbox, monkeypatch):
    """A notice: after a crash it is made again.  While its process lives, it is published."""
    entry = staged(outbox, alone=True)
    monkeypatch.setattr(staging, "DOUBT_AFTER", 0.0)
    assert outbox.spool.left_overs() == []
    assert outbox.spool.sweep().held == ()
    assert list(outbox.spool.scan()) == []
    outbox.spool.publish([entry])
    assert list(outbox.spool.scan()) == [entry]


@pytest.mark.parametrize("left", [[], [State.HELD]], ids=["cancelled", "held"])
def test_what_a_person_has_decided_stays(outbox, monkeypatch, caplog, left):
    entry = staged(outbox)
    monkeypatch.setattr(staging, "DOUBT_AFTER", 0.0)
    outbox.spool.sweep()
    if left:
        outbox.queue.hold(entry.id, "not before Monday")
    else:
        outbox.queue.cancel(entry.id)
    outbox.spool.publish([entry])
    assert [each.state for each in outbox.spool.scan()] == left
    assert "cancelled by somebody while in doubt" in caplog.text


def test_what_a_person_decides_while_it_is_published_stays(outbox, database, monkeypatch):
    entry = staged(outbox)
    monkeypatch.setattr(staging, "DOUBT_AFTER", 0.0)
    outbox.spool.sweep()
    late = threading.Thread(target=outbox.spool.publish, args=[[entry]], daemon=True)
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s"
    with psycopg.connect(database) as person, psycopg.connect(database, autocommit=True) as other:
        person.execute("UPDATE cpsmail.mails SET doubt = false")
        late.start()
        wait_for(lambda: other.execute(waits, ["%cpsmail.publish%"]).fetchone())
    late.join(DEADLINE)
    assert [each.state for each in outbox.spool.scan()] == [State.HELD]


def test_what_is_published_is_in_doubt_no_more(outbox, database):
    outbox.spool.publish([staged(outbox)])
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT doubt FROM cpsmail.mails").fetchall() == [(False,)]


def staged(outbox: Outbox, **how: bool) -> Any:
    from cpsmailaccess_delivery.envelope import Envelope, Route

    route = Route(mailbox=ALICE, host="127.0.0.1", port=25)
    envelope = Envelope(ALICE, (BOB,), route, "1@x", token="T0k3n")
    entry = outbox.spool.stage(envelope, MESSAGE)
    outbox.spool.prepare([entry], **how)
    return entry


def test_who_publishes_again_undoes_no_cancel(outbox):
    """The answer of the first time was lost; since then somebody cancels the mail."""
    entry = staged(outbox)
    mine = outbox.spool.staging._staged[entry.id]
    outbox.spool.publish([entry])
    lease = outbox.spool.claim(entry)
    lease.set_aside("in doubt: who knows?", "T0k3n")
    outbox.spool.staging._publish([mine])
    assert [each.state for each in outbox.spool.scan()] == [State.HELD]
    assert lease.settle(Settlement(State.CANCELLED)) is None
    assert list(outbox.spool.scan()) == []


# The server dies


@pytest.fixture
def own_server(postgres: Server) -> Iterator[Server]:
    """The server of the session, started again when a test has left it dead."""
    yield postgres
    if not postgres.is_running():
        postgres.start()


def test_the_server_dies_under_load(own_server, database, relay):
    """What `commit` has returned for is there; what it has refused is not, or in doubt."""
    with open_outbox(database) as outbox:
        put(outbox, relay, ALICE)
    processes = [script("commits", database) for _ in range(2)]
    acknowledged: list[str] = []
    readers = [
        threading.Thread(target=lambda p=p: acknowledged.extend(map(str.strip, p.stdout)))
        for p in processes
    ]
    for reader in readers:
        reader.start()
    try:
        wait_for(lambda: len(acknowledged) > 50)
        own_server.kill()
        before = len(acknowledged)
        own_server.start()
        wait_for(lambda: len(acknowledged) > before + 20)  # they go on by themselves
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for reader in readers:
            reader.join()
        for process in processes:
            process.stdout.close()
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT block, state FROM cpsmail.mails").fetchall()
    states = {parse_block(block)[0].message_id: state for block, state in rows}
    assert len(states) == len(rows)
    assert set(acknowledged) <= set(states)
    # Each process that was killed may have left one between vote and finish, or before a retry.
    assert sum(states[message_id] == "staged" for message_id in acknowledged) <= 2


def test_an_outage_is_told_once(own_server, outbox, relay, caplog, monkeypatch):
    """Not every second of a night; and when it is over."""

    def said(words: str) -> int:
        return sum(words in record.getMessage() for record in caplog.records)

    processor = outbox.processor()
    processor.start()
    wait_for(lambda: outbox.presence.deliverers())
    connect, tries = outbox.spool.connections.connect, []

    def count() -> Any:
        tries.append(1)
        return connect()

    monkeypatch.setattr(outbox.spool.connections, "connect", count)
    own_server.kill()
    wait_for(lambda: said("no mail is taken") and said("not told of changes"))
    before = len(tries)
    wait_for(lambda: len(tries) >= before + 6)  # two or three threads, each once a second
    # The end of the connection, and that there is no other one.
    assert said("no mail is taken, until") <= 2
    assert said("not told of changes, until") <= 2 * 2  # of mails and of accounts
    assert "cpsmail_queue_mails" not in {each.name for each in Collector(processor).collect()}
    own_server.start()
    wait_for(lambda: said("no mail is taken: that works again") == 1)
    assert "cpsmail_queue_mails" in {each.name for each in Collector(processor).collect()}
    wait_for(lambda: said("not told of changes: that works again") >= 1)
    send(outbox)
    relay.wait_for(1)
    assert processor.stop()
    assert not any("\t" in record.getMessage() for record in caplog.records)


def test_an_outage_is_no_trouble_of_an_account(outbox, relay, monkeypatch, caplog):
    """Whoever owns the mailbox is told of none, and nothing waits longer for it than it must."""
    load, failures = Terms.load, []

    def fail_once(self: Terms) -> Account:
        if failures:
            return load(self)
        with monkeypatch.context() as patch:
            patch.setattr(outbox.spool.connections, "_conninfo", "host=127.0.0.1 port=1")
            patch.setattr(outbox.spool.connections, "_idle", [])
            try:
                return load(self)
            except VaultUnreachable as error:
                failures.append(error)
                raise

    monkeypatch.setattr(outbox.vault, "read_ahead", lambda mailboxes: None)
    monkeypatch.setattr(Terms, "load", fail_once)
    processor = outbox.processor()
    processor.start()
    send(outbox)
    relay.wait_for(1)
    assert failures
    assert processor.stop()
    assert outbox.spool.lane_notes() == {}
    assert "next try" not in caplog.text
    assert not [event for event in outbox.journal.events(address=ALICE) if event.kind == "paused"]


def test_a_processor_stops_while_the_server_is_down(own_server, outbox, caplog):
    """Also when a lane waits, and nobody can look why."""
    with transaction.manager:
        dead = Account(mailbox=BOB, host="127.0.0.1", port=1, security="plain")
        outbox.accounts.put(dead)
        outbox.delivery.send(BOB, [ALICE], MESSAGE)
    processor = outbox.processor()
    processor.start()
    wait_for(lambda: outbox.spool.lane_notes())
    wait_for(lambda: any(lane.circuit.is_open for lane in processor.scheduler.lanes))
    own_server.kill()
    assert processor.stop(DEADLINE)
    assert "Traceback" not in caplog.text
    own_server.start()


def test_who_has_committed_publishes_when_the_server_is_back(own_server, outbox, monkeypatch):
    staging_ = outbox.spool.staging
    tried = threading.Event()
    publish = staging_._publish

    def fail(staged: Any) -> None:
        own_server.kill() if own_server.is_running() else None
        try:
            publish(staged)
        finally:
            tried.set()

    monkeypatch.setattr(staging_, "_publish", fail)
    send(outbox)  # does not raise: other participants have committed
    assert tried.is_set()
    monkeypatch.setattr(staging_, "_publish", publish)
    own_server.start()
    wait_for(lambda: [e.state for e in outbox.spool.scan()] == [State.QUEUED])
    assert outbox.processor().run(forever=False).accepted == 1


def test_a_child_publishes_its_own_when_the_server_is_back(outbox, monkeypatch):
    """Forked while the parent was trying to: its thread is not the child's, nor are its mails."""
    staging_ = outbox.spool.staging
    with monkeypatch.context() as patch:
        patch.setattr(staging_, "_try_to_publish", lambda staged: False)
        send(outbox)
        child = os.fork()
        if not child:
            status = 1
            try:
                (message_id,) = send(outbox)
                patch.undo()
                wait_for(lambda: outbox.spool.find(message_id), 30.0)
                status = len(list(outbox.spool.scan())) - 1
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
    wait_for(lambda: len(list(outbox.spool.scan())) == 2)


def test_the_server_restarts_while_a_worker_delivers(own_server, database, relay):
    with open_outbox(database) as outbox:
        put(outbox, relay, ALICE, connections=2)
        send(outbox, 150)
        processor = outbox.processor()
        processor.start()
        wait_for(lambda: len(relay.mails) > 20)
        own_server.kill()
        own_server.start()
        send(outbox, 10)
        wait_for(lambda: not list(outbox.spool.scan()), 90.0)
        assert processor.stop()
    ids = [mail.message_id for mail in relay.mails]
    assert len(set(ids)) == 160
    # Removals that the server had not synced came back: see the module `spool.postgres`.
    assert max(Counter(ids).values()) <= 2


@pytest.fixture
def pair() -> Iterator[tuple[Server, Standby]]:
    """A server of this test, and one that takes its place."""
    primary = start_server()
    try:
        standby = primary.standby()
        try:
            yield primary, standby
        finally:
            standby.remove()
    finally:
        if primary.is_running():
            primary.remove()
        else:
            shutil.rmtree(primary.directory)


def test_a_standby_takes_over_under_load(pair, relay):
    """Who has both in his URL goes on with what has committed, and with nothing else."""
    primary, standby = pair
    name = primary.new_database().rpartition("/")[2]
    hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
    url = f"postgresql://cpsmail@{hosts}/{name}?target_session_attrs=read-write&lease=1"
    committed, refused, stop = [], [], threading.Event()

    def commit() -> None:
        while not stop.is_set():
            try:
                committed.extend(send(outbox))
            except OutboxError as error:
                refused.append(error)

    with open_outbox(url) as outbox:
        assert hosts in outbox.location
        put(outbox, relay, ALICE)
        processor = outbox.processor()
        processor.start()
        thread = threading.Thread(target=commit)
        thread.start()
        try:
            wait_for(lambda: len(relay.mails) > 50)
            primary.kill()
            wait_for(lambda: refused)
            standby.promote()
            before = len(committed)
            wait_for(lambda: len(committed) > before + 50)
        finally:
            stop.set()
            thread.join()
        wait_for(lambda: {mail.message_id for mail in relay.mails} >= set(committed))
        assert processor.stop()
    counts = Counter(mail.message_id for mail in relay.mails)
    assert set(counts) == set(committed)
    # What was on its way, and what was recorded without waiting for the standby.
    assert sum(count - 1 for count in counts.values()) <= 2 * WINDOW


# Workers die, or stand still


def test_a_worker_dies_before_it_sends(database, relay, worker):
    with open_outbox(f"{database}?lease={LEASE}") as outbox:
        put(outbox, relay, ALICE)
        relay.on("GREETING", delay=60.0)
        send(outbox, 3)
        first = worker()
        wait_for(lambda: all(outbox.spool.leased(entry) for entry in outbox.spool.scan()))
        wait_for(lambda: relay.open_sessions)
        second = worker()
        wait_for(lambda: workers_of(database) == 2)
        relay.forget()
        first.kill()
        died = time.monotonic()
        wait_for(lambda: len(relay.mails) == 3)
        assert time.monotonic() - died < 30.0  # its lease and a second, on a busy machine more
        wait_for(lambda: not list(outbox.spool.scan()))
        second.terminate()
        assert second.wait(30) == 0
    assert len(relay.mails) == 3


def test_a_worker_dies_between_the_reply_and_the_record(database, relay, worker):
    """The relay has taken the mails, nobody has written it down: each is sent twice at most."""
    with open_outbox(f"{database}?lease={LEASE}") as outbox:
        put(outbox, relay, ALICE)
        ids = send(outbox, 5)
        with removals_that_hang(database):
            first = worker()
            wait_for(lambda: relay.mails)
            first.kill()
            first.wait()
        taken = len(relay.mails)
        second = worker()
        wait_for(lambda: not list(outbox.spool.scan()))
        second.terminate()
        second.wait(30)
    received = [mail.message_id for mail in relay.mails]
    assert set(received) == set(ids)
    assert len(received) <= len(ids) + taken


def test_a_worker_stands_still_for_longer_than_its_lease(database, relay, worker):
    with open_outbox(f"{database}?lease={LEASE}") as outbox:
        put(outbox, relay, ALICE, connections=1)
        ids = send(outbox, 30)
        first = worker()
        wait_for(lambda: relay.mails)
        first.send_signal(signal.SIGSTOP)
        second = worker()
        wait_for(lambda: not list(outbox.spool.scan()))
        first.send_signal(signal.SIGCONT)
        more = send(outbox, 5)
        wait_for(lambda: set(more) <= {mail.message_id for mail in relay.mails})
        wait_for(lambda: not list(outbox.spool.scan()))
        for process in (first, second):
            process.terminate()
            assert process.wait(60) == 0
        for message_id in ids + more:
            assert outbox.status(message_id).state is State.ACCEPTED
    received = [mail.message_id for mail in relay.mails]
    assert set(received) == set(ids + more)
    # Doubled is at most what one session had on its way when it was stopped.
    assert len(received) - len(set(received)) <= WINDOW


@contextmanager
def removals_that_hang(database: str) -> Iterator[None]:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "CREATE FUNCTION cpsmail.hang() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_sleep(300); RETURN OLD; END $$"
        )
        connection.execute(
            "CREATE TRIGGER hang BEFORE DELETE ON cpsmail.mails"
            " FOR EACH ROW EXECUTE FUNCTION cpsmail.hang()"
        )
        try:
            yield
        finally:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE wait_event = 'PgSleep'"
            )
            connection.execute("DROP FUNCTION cpsmail.hang() CASCADE")


def workers_of(database: str) -> int:
    with psycopg.connect(database) as connection:
        query = "SELECT count(*) FROM cpsmail.workers WHERE until > clock_timestamp()"
        return connection.execute(query).fetchone()[0]


# Connections are lost


@pytest.fixture(params=["before", "after"])
def cut(request, database, monkeypatch) -> Cut:
    """Ends a connection before or after a statement, or the end of a transaction."""
    cut = Cut(database, request.param)
    execute, end = psycopg.Cursor.execute, psycopg.Transaction.__exit__

    def execute_and_cut(self: Any, *arguments: Any, **more: Any) -> Any:
        return cut(self.connection, lambda: execute(self, *arguments, **more))

    def end_and_cut(self: Any, *arguments: Any) -> Any:
        return cut(self.connection, lambda: end(self, *arguments))

    monkeypatch.setattr(psycopg.Cursor, "execute", execute_and_cut)
    monkeypatch.setattr(psycopg.Transaction, "__exit__", end_and_cut)
    return cut


def test_the_connection_is_lost_at_each_statement_of_a_send(cut, outbox, relay, monkeypatch):
    """Where the commit raised, nothing is sent; where it did not, the mail arrives once."""
    monkeypatch.setattr(staging, "DOUBT_AFTER", 0.0)
    for number in range(1, 60):
        transaction.abort()
        relay.mails.clear()
        outbox.spool.connections._failed_at = -10.0
        cut.at = number
        try:
            (message_id,) = send(outbox)
        except OutboxError:
            message_id = ""
        reached = not cut.at
        cut.at = 0
        outbox.spool.sweep()
        held = [e for e in outbox.spool.scan() if e.state is State.HELD]
        if not message_id:
            # The answer to the database's own commit was lost: discarded again, or in doubt.
            assert [e for e in outbox.spool.scan() if e not in held] == []
        for entry in held:
            outbox.queue.release(entry.id) if message_id else outbox.queue.cancel(entry.id)
        outbox.processor().run(forever=False)
        assert len(relay.mails) == bool(message_id), number
        if not reached:
            break
    else:
        pytest.fail("it never ended")
    assert number >= 4, "account, vote, finish, and one that nothing stopped"


def test_the_connection_is_lost_at_each_statement_of_a_delivery(cut, database, relay):
    """The mail arrives, and twice at most: where the relay's reply could not be recorded."""
    with open_outbox(f"{database}?lease=1") as outbox:
        put(outbox, relay, ALICE)
        for number in range(1, 60):
            relay.mails.clear()
            (message_id,) = send(outbox)
            cut.at = number
            drain(outbox)
            reached = not cut.at
            cut.at = 0
            wait_for(lambda: drain(outbox) and not list(outbox.spool.scan()))
            assert {mail.message_id for mail in relay.mails} == {message_id}, number
            assert len(relay.mails) <= 2, number
            assert outbox.status(message_id).state is State.ACCEPTED
            if not reached:
                break
        else:
            pytest.fail("it never ended")
        assert number > 5


def drain(outbox: Outbox) -> bool:
    """Return whether the server was there all the time."""
    outbox.spool.connections._failed_at = -10.0
    try:
        outbox.processor().run(forever=False)
    except OutboxError:
        return False
    return True


class Cut:
    """Ends the connection before or after one statement: the `at`-th from when that is set."""

    def __init__(self, database: str, when: str) -> None:
        self.at = 0
        self._database = database
        self._when = when

    def __call__(self, connection: Any, execute: Any) -> Any:
        if not self.at or connection.info.dbname == "":
            return execute()
        self.at -= 1
        if self.at:
            return execute()
        self.at = 0
        if self._when == "before":
            self._end(connection)
            return execute()
        result = execute()
        self._end(connection)
        return result

    def _end(self, connection: Any) -> None:
        process = connection.info.backend_pid
        with psycopg.connect(self._database, autocommit=True) as other:
            other.execute("SELECT pg_terminate_backend(%s, 5000)", [process])


@pytest.mark.parametrize("how", ["terminated", "idle for too long"])
def test_a_connection_that_the_server_has_ended_is_not_used(database, outbox, how):
    """It said why before it ended it; the next commit is not the one to read that."""
    with psycopg.connect(database, autocommit=True) as connection:
        if how == "terminated":
            send(outbox)
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'cpsmail' AND datname = current_database()"
            )
        else:
            with outbox.spool.connections.use("be idle") as idle:
                idle.execute("SET idle_session_timeout = 1")
        wait_for(
            lambda: (
                not connection.execute(
                    "SELECT 1 FROM pg_stat_activity"
                    " WHERE application_name = 'cpsmail' AND datname = current_database()"
                ).fetchone()
            )
        )
    send(outbox, 2)
