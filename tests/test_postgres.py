"""An outbox on PostgreSQL: the whole way of a mail, on a real server."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
import sqlalchemy.orm
import transaction
from zope.component import getGlobalSiteManager
from zope.interface.verify import verifyObject

pytest.importorskip("psycopg", reason="needs the extra [postgres]")

from cli_helpers import Site
from conftest import KEY
from cpsmailaccess_delivery import Account, Outbox, State
from cpsmailaccess_delivery import claims as claims_module
from cpsmailaccess_delivery import recorder as recorder_module
from cpsmailaccess_delivery.errors import InvalidSettings, OutboxError, SpoolError, WrongKey
from cpsmailaccess_delivery.interfaces import (
    IMailDelivery,
    IOutbox,
    IPresence,
    LaneNote,
    Settlement,
    Verdict,
)
from cpsmailaccess_delivery.journal import Event
from cpsmailaccess_delivery.metrics import Collector
from cpsmailaccess_delivery.notice_queue import NoticeQueue
from cpsmailaccess_delivery.pg import schema as schema_module
from cpsmailaccess_delivery.pg import vault as vault_module
from cpsmailaccess_delivery.pg.connections import Connections
from cpsmailaccess_delivery.pg.lease import Leases
from cpsmailaccess_delivery.pg.mails import Mails
from cpsmailaccess_delivery.pg.schema import VERSION, upgrade
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.smtp.machine import WINDOW
from cpsmailaccess_delivery.testing import SMTPServer
from cpsmailaccess_delivery.testing.received import ReceivedMail
from postgres_helpers import (
    ALICE,
    BOB,
    CAROL,
    MESSAGE,
    databases,
    open_outbox,
    put,
    send,
    wait_for,
)


@pytest.fixture
def relay() -> Iterator[SMTPServer]:
    with SMTPServer() as server:
        yield server


@pytest.fixture
def outbox(database: str, relay: SMTPServer) -> Iterator[Outbox]:
    with open_outbox(database) as made:
        put(made, relay, ALICE)
        yield made


@pytest.mark.parametrize("way", ["drain", "run"])
def test_from_send_to_accepted(outbox, relay, way):
    (message_id,) = send(outbox)
    assert outbox.status(message_id).state is State.QUEUED
    processor = outbox.processor()
    if way == "drain":
        assert processor.run(forever=False).accepted == 1
    else:
        processor.start()
        wait_for(lambda: relay.mails)
        wait_for(lambda: not list(outbox.spool.scan()))
        assert processor.stop()
    assert [mail.recipients for mail in relay.mails] == [(BOB,)]
    assert outbox.status(message_id).state is State.ACCEPTED
    assert list(outbox.spool.scan()) == []


def test_more_mails_than_one_notification_holds(outbox, relay):
    """Scheduled or not, with keys or none: all of one commit."""
    watch = outbox.spool.watch()
    try:
        with transaction.manager:
            for number in range(400):
                options = {"idempotency_key": str(number)} if number % 3 else {}
                outbox.delivery.send(
                    ALICE, [BOB], MESSAGE, undo=600 * (number % 2) or None, **options
                )
        told: set[str] = set()
        wait_for(lambda: told.update(e.id for e in watch.read() or ()) or len(told) == 400)
    finally:
        watch.close()
    entries = list(outbox.spool.scan())
    assert {entry.id for entry in entries} == told
    with outbox.spool.connections.use("test") as connection:
        rows = connection.execute(
            "SELECT mails.due, extract(epoch FROM execute_after - pgqueuer.created)::float8,"
            " mails.lane = entrypoint, convert_from(payload, 'UTF8') = mails.id"
            " FROM cpsmail.mails JOIN cpsmail.pgqueuer ON job = pgqueuer.id"
        ).fetchall()
    assert len(rows) == 400
    assert all(lane and payload for _, _, lane, payload in rows)
    assert all(wait <= 0 if due == 0 else 0 < wait <= 600 for due, wait, _, _ in rows)
    assert sum(due > 0 for due, _, _, _ in rows) == 200


def test_mails_that_come_in_while_it_runs(outbox, relay):
    processor = outbox.processor()
    processor.start()
    for _ in range(5):
        send(outbox, 20)
    wait_for(lambda: len(relay.mails) == 100)
    wait_for(lambda: not list(outbox.spool.scan()))
    assert processor.stop()
    assert len({mail.message_id for mail in relay.mails}) == 100


@pytest.mark.parametrize("when", ["before the start", "while it waits"])
def test_a_mail_expires_while_its_lane_waits(database, relay, when):
    """It is refused then, not when the relay is back; that probe is an hour away."""
    with open_outbox(database, schedule=Schedule(first=3600.0, jitter=0.0)) as outbox:
        put(outbox, relay, ALICE)
        relay.stop_accepting()
        send(outbox)
        outbox.processor().run(forever=False)
        assert outbox.spool.lane_notes()
        processor = outbox.processor()
        if when == "while it waits":
            processor.start()
            wait_for(lambda: processor.scheduler is not None and processor.scheduler.lanes)
        with transaction.manager:
            expires = outbox.spool.connections.now() + 1.5
            message_id = outbox.delivery.send(ALICE, [BOB], MESSAGE, expires=expires)
        if when == "before the start":
            processor.start()
        wait_for(lambda: outbox.status(message_id).state is State.REFUSED, 30.0)
        assert outbox.status(message_id).reason == "expired"
        assert outbox.spool.connections.now() >= expires
        assert processor.stop()
        senders = [outbox.spool.load(entry).envelope.sender for entry in outbox.spool.scan()]
        assert sorted(senders) == ["", ALICE, ALICE]  # a notice waits, too
        assert relay.mails == []


def test_a_notice_is_not_made_again_after_a_crash(outbox, relay):
    """By the worker that has the mail then: it sees what no worker has leased, too."""
    relay.on("RCPT", reply="550 5.1.1 no such user", match="bob@")
    relay.on("MAIL", reply="451 4.3.0 later", match="<>")  # not before the crash
    (message_id,) = send(outbox)
    code = (
        "import os, sys, time\n"
        "from cpsmailaccess_delivery import Outbox\n"
        "from cpsmailaccess_delivery.pg.lease import Lease\n"
        "Lease.settle = lambda lease, settlement: os._exit(9)\n"
        "Outbox(sys.argv[1], key=bytes.fromhex(sys.argv[2])).processor().run(forever=False)\n"
    )
    place = f"{outbox.location}?lease=1"
    done = subprocess.run([sys.executable, "-c", code, place, KEY.hex()], timeout=60)
    assert done.returncode == 9
    notice = next(e for e in outbox.spool.scan() if not outbox.spool.load(e).envelope.sender)
    outbox.spool.hold(notice, "so that nothing happens to it, of which the journal would tell")
    with open_outbox(place) as other:
        processor = other.processor()
        processor.start()
        wait_for(lambda: outbox.status(message_id).state is State.REFUSED)
        assert processor.stop()
    senders = [outbox.spool.load(entry).envelope.sender for entry in outbox.spool.scan()]
    assert sorted(senders) == ["", ALICE]


def test_who_delivers_is_told_to_other_hosts(outbox, database):
    assert verifyObject(IPresence, outbox.presence)
    assert outbox.presence.deliverers() == []
    processor = outbox.processor()
    processor.start()
    with Outbox(database, key=KEY) as other:
        (deliverer,) = wait_for(other.presence.deliverers)
        assert (deliverer.pid, deliverer.host) == (os.getpid(), socket.gethostname())
        assert deliverer.here
        assert abs(deliverer.since - other.spool.connections.now()) < 60
        assert processor.stop()
        assert other.presence.deliverers() == []


def test_metrics_of_all_workers_add_up(outbox, relay, database):
    """What waits for a person, and what no worker has leased, is counted by one of them."""
    pytest.importorskip("prometheus_client", reason="is in the extra [metrics]")
    for state in (State.HELD, State.HELD, State.REFUSED, State.QUEUED):
        (entry,) = (outbox.spool.find(each)[0].entry for each in send(outbox))
        if state is State.HELD:
            outbox.spool.hold(entry, "why")
        elif state is State.REFUSED:
            outbox.spool.claim(entry).settle(Settlement(state, attempts=1))
        else:
            outbox.spool.note_lane(entry.lane, LaneNote(ALICE, "relay", "down", 1.0, 1e10))
    with open_outbox(database) as other:
        workers = [outbox.processor(), other.processor()]
        found: list[Counter[str]] = []
        for number, worker in enumerate(workers, 1):
            worker.start()
            wait_for(lambda n=number: len(outbox.presence.deliverers()) == n)
            wait_for(lambda w=worker: w.scheduler)
        for worker in workers:
            (family,) = (
                each for each in Collector(worker).collect() if each.name == "cpsmail_queue_mails"
            )
            found.append(Counter({s.labels["state"]: int(s.value) for s in family.samples}))
        assert all(worker.stop() for worker in workers)
    assert sum(found, Counter()) == {"held": 2, "refused": 1, "queued": 1}
    assert found[1].total() == 0


def test_what_happened_step_by_step(outbox):
    now = outbox.spool.connections.now()
    for at, kind in ((-50, "old"), (1, "accepted"), (59, "accepted"), (61, "refused")):
        outbox.journal.record(Event(now + at, kind))
    expected = [(0, "accepted", 2), (1, "refused", 1)]
    assert outbox.journal.series(now, 60) == expected


# Within the application's own transaction


@pytest.mark.parametrize("ending", ["commit", "rollback", "savepoint", "crash"])
@pytest.mark.parametrize("kind", ["psycopg", "sqlalchemy"])
def test_a_mail_commits_with_the_database(outbox, relay, database, kind, ending):
    engine = sqlalchemy.create_engine(database.replace("postgresql", "postgresql+psycopg"))
    connection = engine.connect() if kind == "sqlalchemy" else psycopg.connect(database)
    execute = connection.exec_driver_sql if kind == "sqlalchemy" else connection.execute
    message_id = outbox.within(connection).send(ALICE, [BOB], MESSAGE, idempotency_key="k")
    execute("SAVEPOINT here")
    outbox.within(connection).send(ALICE, [BOB], MESSAGE)
    if ending == "savepoint":
        execute("ROLLBACK TO SAVEPOINT here")
    assert list(outbox.spool.scan()) == []
    if ending in ("commit", "savepoint"):
        connection.commit()
    elif ending == "crash":
        with psycopg.connect(database, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE state = 'idle in transaction'"
            )
        with pytest.raises((psycopg.Error, sqlalchemy.exc.DBAPIError)):
            connection.commit()
    with contextlib.suppress(sqlalchemy.exc.DBAPIError):
        connection.close()
    engine.dispose()
    expected = {"commit": 2, "savepoint": 1}.get(ending, 0)
    assert len(list(outbox.spool.scan())) == expected
    assert outbox.spool.left_overs() == []
    assert outbox.processor().run(forever=False).accepted == expected
    assert len(relay.mails) == expected
    assert outbox.spool.key_holder("k") == (message_id if expected else None)


def test_within_a_session_of_sqlalchemy(outbox, database):
    engine = sqlalchemy.create_engine(database.replace("postgresql", "postgresql+psycopg"))
    with sqlalchemy.orm.Session(engine) as session, session.begin():
        outbox.within(session).send(ALICE, [BOB], MESSAGE)
    engine.dispose()
    assert len(list(outbox.spool.scan())) == 1


@pytest.mark.parametrize("kind", [psycopg.RawCursor, psycopg.ClientCursor, "dictionaries"])
def test_within_a_connection_set_as_the_application_likes(outbox, database, kind):
    rows = (
        {"row_factory": psycopg.rows.dict_row}
        if kind == "dictionaries"
        else {"cursor_factory": kind}
    )
    with psycopg.connect(database, **rows) as connection:
        send_within = outbox.within(connection).send
        message_id = send_within(ALICE, [BOB], MESSAGE, idempotency_key="k")
        assert send_within(ALICE, [BOB], MESSAGE, idempotency_key="k") == message_id
    assert len(list(outbox.spool.scan())) == 1


def test_within_refuses_what_would_not_follow(outbox, database, tmp_path):
    with psycopg.connect(database, autocommit=True) as connection:
        with pytest.raises(InvalidSettings, match="autocommit"):
            outbox.within(connection).send(ALICE, [BOB], MESSAGE)
        with connection.transaction():
            outbox.within(connection).send(ALICE, [BOB], MESSAGE)
    assert len(list(outbox.spool.scan())) == 1
    with pytest.raises(InvalidSettings, match="psycopg 3"):
        outbox.within(object())
    with Outbox(tmp_path / "outbox") as maildir, pytest.raises(InvalidSettings, match="no data"):
        maildir.within(object())


@pytest.mark.parametrize("key", [None, "a key"])
@pytest.mark.parametrize("empty", [False, True])
def test_within_a_connection_to_another_database(outbox, database, postgres, empty, key):
    with (
        contextlib.contextmanager(databases)(postgres, empty=empty) as other,
        psycopg.connect(other) as connection,
    ):
        with pytest.raises(InvalidSettings, match=f"{connection.info.dbname}.*not the one of"):
            outbox.within(connection).send(ALICE, [BOB], MESSAGE, idempotency_key=key)
        connection.rollback()
        if not empty:
            with open_outbox(other) as there:
                assert list(there.spool.scan()) == []
    with psycopg.connect(database.replace("127.0.0.1", "localhost")) as connection:
        outbox.within(connection).send(ALICE, [BOB], MESSAGE)
    assert len(list(outbox.spool.scan())) == 1


def test_within_goes_on_when_the_tables_were_put_back(outbox, database):
    """From a dump: they are others now, and the outbox is the same."""
    for at in ("2001-01-01", "2002-02-02"):
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("UPDATE cpsmail.version SET at = %s", [at])
            with connection.transaction():
                outbox.within(connection).send(ALICE, [BOB], MESSAGE)
    assert len(list(outbox.spool.scan())) == 2


def test_one_key_within_two_transactions(outbox, database):
    with psycopg.connect(database) as first, psycopg.connect(database) as second:
        outbox.within(first).send(ALICE, [BOB], MESSAGE, idempotency_key="k")
        first.commit()
        again = outbox.within(second).send(ALICE, [BOB], MESSAGE, idempotency_key="k")
    assert again == outbox.spool.key_holder("k")
    assert len(list(outbox.spool.scan())) == 1


# What people and hosts see


def test_two_outboxes_see_the_same(outbox, database, relay):
    (message_id,) = send(outbox)
    with open_outbox(database) as other:
        assert other.status(message_id).state is State.QUEUED
        other.queue.hold(message_id, "why")
        assert outbox.status(message_id).reason == "why"
        other.queue.retry(message_id)
        assert outbox.processor().run(forever=False).accepted == 1
        assert other.status(message_id).state is State.ACCEPTED
        kinds = [event.kind for event in other.journal.events(address=BOB.upper())]
        assert kinds == ["held", "retried", "accepted"]


def test_another_key_opens_nothing(outbox, database):
    with Outbox(database, key=bytes(32)) as other:
        assert other.accounts.get(ALICE).mailbox == ALICE
        with pytest.raises(WrongKey):
            other.vault.get(ALICE)


def test_no_key_is_made_for_one_host_alone(database):
    account = Account(mailbox="*", host="h.example", username="x", password="x")
    with Outbox(database) as keyless, pytest.raises(WrongKey, match="CPSMAIL_KEY"):
        keyless.accounts.put(account)


def test_hostile_text_is_kept(outbox, relay):
    relay.on("TAKEN", reply=b"550 \xff\x00 no\r\n")
    (message_id,) = send(outbox)
    outbox.processor().run(forever=False)
    status = outbox.status(message_id)
    assert status.state is State.REFUSED
    assert outbox.journal.events(message_id=message_id)


def test_accounts_follow_the_transaction_and_a_watch_tells(outbox, relay):
    watch = outbox.vault.watch()
    before = outbox.vault.version(ALICE)
    put(outbox, relay, ALICE, connections=3)
    assert select.select([watch.fileno()], [], [], 30.0)[0]
    assert watch.read() is None
    watch.close()
    assert outbox.vault.version(ALICE) != before
    assert outbox.vault.get(ALICE).connections == 3
    transaction.begin()
    outbox.accounts.delete(ALICE)
    transaction.abort()
    assert [each.mailbox for each in outbox.vault.accounts()] == [ALICE]
    assert outbox.vault.sweep() == ()
    with transaction.manager:
        outbox.accounts.delete(ALICE)
    assert [each.mailbox for each in outbox.vault.accounts()] == []


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_change_of_an_account_in_doubt(outbox, relay, monkeypatch, verdict):
    changed = outbox.vault.get(ALICE).replace(connections=7)
    token = outbox.vault.stage(ALICE, changed, "T0k3n")
    outbox.vault.prepare([token], witnessed=True)
    monkeypatch.setattr(vault_module, "DOUBT_AFTER", 0.0)
    assert outbox.vault.sweep() == ()
    assert outbox.vault.doubts() == [(token, "T0k3n")]
    assert outbox.vault.resolve(token, verdict) == ALICE
    assert outbox.vault.resolve(token, verdict) == ""
    committed = verdict is Verdict.COMMITTED
    assert (outbox.vault.get(ALICE).connections == 7) == committed


# The schema


def test_upgrade_makes_repeats_and_leaves_what_is_newer(postgres):
    url = postgres.new_database(empty=True)
    connections = Connections(url)
    with Outbox(url, key=KEY) as early, pytest.raises(SpoolError, match="schema upgrade"):
        list(early.spool.scan())
    assert upgrade(connections) == (0, VERSION)
    with Outbox(url, key=KEY) as outbox:
        assert list(outbox.spool.scan()) == []
        assert upgrade(connections) == (VERSION, VERSION)
        assert list(outbox.spool.scan()) == []
    with connections.use("test") as connection:
        connection.execute("INSERT INTO cpsmail.version VALUES (%s, %s)", [VERSION + 1, VERSION])
    assert upgrade(connections) == (VERSION + 1, VERSION + 1)
    with Outbox(url, key=KEY) as beside:  # of two releases side by side, the older one
        assert list(beside.spool.scan()) == []
    with connections.use("test") as connection:
        connection.execute("INSERT INTO cpsmail.version VALUES (%s, %s)", [VERSION + 2] * 2)
    with Outbox(url, key=KEY) as old, pytest.raises(SpoolError, match="upgrade the package"):
        list(old.spool.scan())
    with pytest.raises(SpoolError, match="upgrade the package"):
        upgrade(connections)
    connections.close()
    postgres.drop_database(url)


def test_from_the_first_schema(postgres, relay):
    """It has no functions: who needs them says so before a mail is staged."""
    url = postgres.new_database(empty=True)
    connections = Connections(url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema_module, "VERSION", 1)
        assert upgrade(connections) == (0, 1)
    with open_outbox(url) as outbox, pytest.raises(OutboxError, match="cpsmail schema upgrade"):
        put(outbox, relay, ALICE)
    transaction.abort()
    assert upgrade(connections) == (1, VERSION)
    with open_outbox(url) as outbox:
        put(outbox, relay, ALICE)
        send(outbox)
        assert outbox.processor().run(forever=False).accepted == 1
    connections.close()
    postgres.drop_database(url)


def test_the_schema_is_upgraded_while_the_release_before_works(postgres, relay, monkeypatch):
    """A step that adds something, and one that fails: then all is as it was before that step."""
    url = postgres.new_database(empty=True)
    connections = Connections(url)
    upgrade(connections)
    with open_outbox(url) as outbox:
        put(outbox, relay, ALICE)
        processor = outbox.processor()
        processor.start()
        send(outbox, 5)
        add = "ALTER TABLE cpsmail.mails ADD COLUMN more text NOT NULL DEFAULT ''"
        steps = {VERSION + 1: (add, VERSION), VERSION + 2: ("SELECT 1; SELECT wrong", VERSION)}
        monkeypatch.setattr(schema_module, "_STEPS", {**schema_module._STEPS, **steps})
        monkeypatch.setattr(schema_module, "VERSION", VERSION + 2)
        for before in (VERSION, VERSION + 1):
            with pytest.raises(SpoolError, match="wrong"):
                upgrade(connections)
            with connections.use("test") as connection:
                assert schema_module.found(connection) == (VERSION + 1, VERSION), before
        send(outbox, 5)
        relay.wait_for(10, 60)
        wait_for(lambda: not list(outbox.spool.scan()))
        assert processor.stop()
    monkeypatch.undo()
    with open_outbox(url) as again:  # one of the release before, started now
        send(again)
        assert again.processor().run(forever=False).accepted == 1
    connections.close()
    postgres.drop_database(url)


def test_two_upgrades_at_once(postgres):
    url = postgres.new_database(empty=True)
    done: list[Any] = []

    def work() -> None:
        connections = Connections(url)
        done.append(upgrade(connections))
        connections.close()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [(0, VERSION), (VERSION, VERSION), (VERSION, VERSION)]
    postgres.drop_database(url)


# The command line and ZCML


def test_cpsmail_on_postgresql(database, relay, tmp_path):
    site = Site(tmp_path)
    site.environ |= {"CPSMAIL_OUTBOX": database, "CPSMAIL_KEY": KEY.hex()}
    assert f"schema {VERSION} already" in site.run("schema", "upgrade").output
    arguments = ["--host", relay.host, "--port", str(relay.port), "--security", "plain"]
    site.run("accounts", "set", ALICE, *arguments)
    site.run("send", "-f", ALICE, BOB, input=MESSAGE)
    assert ALICE in site.run("queue").output
    assert site.json("drain")["accepted"] == 1
    assert len(relay.mails) == 1
    findings = site.json("doctor", code=1)["findings"]
    failed = [finding["text"] for finding in findings if finding["level"] == "fail"]
    assert [text.partition(",")[0] for text in failed] == ["fsync = off"]  # as we start the server
    assert {"server", "key", "queue", "lanes"} <= {finding["check"] for finding in findings}


def doctor(site: Site, code: int) -> dict[str, list[tuple[str, str, str]]]:
    found: dict[str, list[tuple[str, str, str]]] = {}
    for finding in site.json("doctor", code=code)["findings"]:
        levels = found.setdefault(finding["check"], [])
        levels.append((finding["level"], finding["text"], finding["advice"]))
    return found


def test_a_doctor_who_reaches_nothing(postgres, tmp_path):
    """He says so once, and does not send anybody to look at a disk."""
    site = Site(tmp_path)
    site.environ["CPSMAIL_OUTBOX"] = "postgresql://nobody@127.0.0.1:1/none"
    found = doctor(site, code=1)
    assert set(found) == {"settings", "server"}
    ((level, text, advice),) = found["server"]
    assert (level, "cannot connect" in text, "PGPASSFILE" in advice) == ("fail", True, True)
    with contextlib.contextmanager(databases)(postgres, empty=True) as empty:
        site.environ["CPSMAIL_OUTBOX"] = empty
        found = doctor(site, code=1)
    assert set(found) == {"settings", "server"}
    ((level, text, advice),) = found["server"]
    assert (level, advice) == ("fail", "")
    assert text.endswith("run `cpsmail schema upgrade`")


def test_a_doctor_looks_for_the_key(outbox, database, tmp_path):
    site = Site(tmp_path)
    site.environ["CPSMAIL_OUTBOX"] = database
    new = b"n" * 32
    with transaction.manager:
        outbox.accounts.delete(ALICE)
    (none, _) = doctor(site, code=1)["key"]
    assert none[:2] == ("warn", "no key: without one, no account can be put")
    with transaction.manager:
        outbox.accounts.put(Account(mailbox=ALICE, host="127.0.0.1"))
    site.environ |= {"CPSMAIL_KEY": new.hex(), "CPSMAIL_FORMER_KEY": KEY.hex()}
    assert doctor(site, code=1)["key"][-1][2] == "cpsmail accounts rekey"
    site.run("accounts", "rekey")
    assert doctor(site, code=1)["key"][-1][2] == "take it away"
    del site.environ["CPSMAIL_FORMER_KEY"]
    assert [level for level, _, _ in doctor(site, code=1)["key"]] == ["ok", "ok"]


def test_a_directory_has_no_schema(tmp_path):
    assert "has no schema" in Site(tmp_path).run("schema", "upgrade", code=78).output


def test_a_schema_of_a_newer_release(database, tmp_path):
    """It is not taken for what this release makes."""
    site = Site(tmp_path)
    site.environ["CPSMAIL_OUTBOX"] = database
    newer = f"INSERT INTO cpsmail.version VALUES ({VERSION + 1}, {VERSION})"
    with psycopg.connect(database) as connection:
        connection.execute(newer)
    try:
        said = site.run("schema", "upgrade").output
        assert f"schema {VERSION + 1} is of a newer release and stays" in said
        texts = [text for _, text, _ in doctor(site, code=1)["server"]]
        assert f"schema {VERSION + 1}, of a newer release; this one makes {VERSION}" in texts
    finally:
        with psycopg.connect(database) as connection:
            connection.execute("DELETE FROM cpsmail.version WHERE version > %s", [VERSION])


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://u@127.0.0.1/d?leese=3&sslmode=prefer", "has no parameter leese:"),
        ("postgresql://u:1?geheim=x&y@h/d?leese=3", "understands: postgresql"),
    ],
)
def test_a_url_that_libpq_does_not_understand(tmp_path, url, words):
    site = Site(tmp_path)
    site.environ["CPSMAIL_OUTBOX"] = url
    said = site.run("queue", code=78).output
    assert words in said
    assert "geheim" not in said


def test_no_password_is_shown(database, tmp_path):
    site = Site(tmp_path)
    site.environ["CPSMAIL_OUTBOX"] = database.replace("cpsmail@", "cpsmail:geheim@")
    for command in ("doctor", "queue"):
        assert "geheim" not in site.run(command, code=None).output
    outbox = Outbox(site.environ["CPSMAIL_OUTBOX"])
    assert "geheim" not in repr(outbox) + repr(outbox.spool) + repr(outbox.vault)
    outbox.close()


def test_zcml_takes_a_url(database):
    from zope.configuration import xmlconfig

    context = xmlconfig.string(
        f"""<configure xmlns="http://namespaces.zope.org/zope"
                xmlns:mail="http://namespaces.zope.org/mail">
              <include package="cpsmailaccess_delivery" file="meta.zcml" />
              <mail:mailboxDelivery name="pg" queuePath="{database}" />
            </configure>"""
    )
    assert context is not None
    delivery = getGlobalSiteManager().getUtility(IMailDelivery, "pg")
    assert delivery.queuePath == database
    getGlobalSiteManager().getUtility(IOutbox, database).close()
    getGlobalSiteManager().__init__("base")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://x/y", "no back end"),
        ("postgresql://h/d?lease=0", "3600"),
        ("postgresql://h/d?lease=x", "3600"),
        ("postgresql://h/d?nonsense=geheim", "libpq"),
    ],
)
def test_urls_that_are_none(url, words):
    with pytest.raises(InvalidSettings, match=words) as caught:
        Outbox(url)
    assert "geheim" not in str(caught.value)


def test_the_queries_of_the_docs_are_queries(database):
    docs = Path(__file__).parent.parent / "docs" / "scaling.rst"
    queries = re.findall(r"``(SELECT .*?)``", docs.read_text(encoding="utf-8"))
    assert len(queries) >= 5
    with psycopg.connect(database) as connection:
        for query in queries:
            connection.execute(query)


def test_one_key_twice_within_a_transaction(outbox, database):
    with psycopg.connect(database, row_factory=psycopg.rows.dict_row) as connection:
        within = outbox.within(connection)
        first = within.send(ALICE, [BOB], MESSAGE, idempotency_key="a key")
        assert within.send(ALICE, [BOB], MESSAGE, idempotency_key="a key") == first
        with connection.transaction(force_rollback=True):
            other = within.send(ALICE, [BOB], MESSAGE, idempotency_key="another")
        assert within.send(ALICE, [BOB], MESSAGE, idempotency_key="another") != other
    assert len(list(outbox.spool.scan())) == 2


def test_a_mail_that_somebody_has_locked_stops_no_other_lane(outbox, relay, database, monkeypatch):
    """The relay has it, and nobody can write that down; the worker delivers what others send."""
    monkeypatch.setattr(recorder_module, "_UNSETTLED", 0.05)
    put(outbox, relay, CAROL)
    take = relay.take

    def lock_and_take(mail: ReceivedMail) -> None:
        if mail.sender == ALICE:
            person.execute("SELECT 1 FROM cpsmail.mails FOR UPDATE")
        take(mail)

    monkeypatch.setattr(relay, "take", lock_and_take)
    with psycopg.connect(database) as person:
        (locked,) = send(outbox)
        processor = outbox.processor()
        processor.start()
        wait_for(lambda: relay.mails)
        begun = time.monotonic()
        for _ in range(12):  # each needs the loop for itself
            (other,) = send(outbox, 1, CAROL)
            wait_for(lambda other=other: relay.mails[-1].message_id == other)
        assert time.monotonic() - begun < 60.0  # a wait of ten seconds for each would be 120
        wait_for(lambda: len(list(outbox.spool.scan())) == 1)
    wait_for(lambda: not list(outbox.spool.scan()))
    assert processor.stop()
    assert [mail.message_id for mail in relay.mails].count(locked) == 1


@pytest.mark.parametrize("setting", ["DateStyle = 'German'", "lock_timeout = '7s'"])
def test_whatever_the_database_is_set_to(database, relay, setting):
    name, (variable, _, value) = database.rpartition("/")[2], setting.partition(" = ")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} SET {setting}")
        try:
            with open_outbox(database) as outbox:
                put(outbox, relay, ALICE)
                outbox.processor().start()
                send(outbox)
                relay.wait_for(1)
                if variable == "lock_timeout":  # an operator's own stays
                    with outbox.spool.connections.use("look") as own:
                        assert own.execute(f"SHOW {variable}").fetchone() == (value.strip("'"),)
        finally:
            connection.execute(f"ALTER DATABASE {name} RESET {variable}")


@pytest.mark.parametrize("path", ["", "public, pg_catalog"])
def test_a_function_of_another_user_is_not_called(postgres, relay, path):
    """Whoever may make one in `public` would have it run by us, and read all mails."""
    for database in databases(postgres, empty=True):
        name = database.rpartition("/")[2]
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("CREATE TABLE loot (what text)")
            for head, real in [
                ("array_to_string(text[], text)", "pg_catalog.array_to_string($1, $2)"),
                ("unnest(text[])", "(SELECT pg_catalog.array_to_string($1, ','))"),
                ("current_setting(text)", "pg_catalog.current_setting($1)"),
            ]:
                connection.execute(
                    f"CREATE FUNCTION {head} RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
                    f" INSERT INTO public.loot VALUES ('{head}'); RETURN {real}; END $$"
                )
            if path:
                connection.execute(f"ALTER DATABASE {name} SET search_path = {path}")
            connections = Connections(database)
            upgrade(connections)
            connections.close()
            with open_outbox(database) as outbox:
                put(outbox, relay, ALICE)
                send(outbox)
                send(outbox, 3)
                with transaction.manager:
                    outbox.delivery.send(ALICE, [BOB], MESSAGE, idempotency_key="k")
                outbox.processor().start()
                relay.wait_for(5)
                list(outbox.queue.entries())
            assert connection.execute("SELECT * FROM loot").fetchall() == []


def test_an_upgrade_with_nothing_to_do_waits_for_nobody(outbox, database):
    """Somebody's transaction with a mail is open; all others would wait behind the upgrade."""
    connections = Connections(database)
    with psycopg.connect(database) as connection:
        outbox.within(connection).send(ALICE, [BOB], MESSAGE)
        assert upgrade(connections).before == VERSION
        send(outbox)
    connections.close()


def test_what_another_worker_has_noted_of_a_lane_is_ended(outbox, relay):
    """We had the lane, another one had trouble with it, and now it is ours again."""
    processor = outbox.processor()
    processor.start()
    send(outbox)
    relay.wait_for(1)
    (lane,) = processor.scheduler.lanes
    relay.drop_sessions()
    wait_for(lambda: not lane.sessions)
    now = outbox.spool.connections.now()
    note = LaneNote(lane.name, "relay", "down", now, now + 1.0, 3, lane.terms.version())
    outbox.spool.note_lane(lane.key, note)
    send(outbox)
    relay.wait_for(2)
    wait_for(lambda: outbox.spool.lane_note(lane.key) is None)


def test_the_trouble_of_a_lane_is_counted_on_by_another_worker(outbox, relay):
    processor = outbox.processor()
    processor.start()
    send(outbox)
    relay.wait_for(1)
    (lane,) = processor.scheduler.lanes
    relay.drop_sessions()
    wait_for(lambda: not lane.sessions)
    relay.on("GREETING", reply="421 not now")
    now = outbox.spool.connections.now()
    note = LaneNote(lane.name, "relay", "down", now, now + 1.0, 3, lane.terms.version())
    outbox.spool.note_lane(lane.key, note)
    send(outbox)
    wait_for(lambda: outbox.spool.lane_note(lane.key).failures == 4)


def test_the_relay_of_a_lane_is_tried_by_the_worker_that_has_it(database, relay):
    """A refused login that each worker tries at every due time locks the mailbox."""
    with open_outbox(f"{database}?lease=2") as outbox:
        put(outbox, relay, ALICE)
        relay.on("GREETING", reply="421 not now")
        processor = outbox.processor()
        processor.start()
        send(outbox)
        wait_for(lambda: processor.scheduler and processor.scheduler.lanes)
        (lane,) = processor.scheduler.lanes
        wait_for(lambda: lane.circuit.failures > 1)
        assert lane.is_ours
        with outbox.spool.connections.use("test") as connection:
            query = "UPDATE cpsmail.lanes SET worker = gen_random_uuid(), until = now() + '1h'"
            connection.execute(query)
        wait_for(lambda: not lane.is_ours and not lane.sessions)
        tried, (entry,) = len(relay.commands), outbox.spool.scan()
        loop = processor.scheduler.loop
        for _ in range(3):  # what was told before, and is due now
            lane.circuit.until = 0.0
            loop.call_soon_threadsafe(lane.push, entry)
            loop.call_soon_threadsafe(lane.work)
            done = threading.Event()
            loop.call_soon_threadsafe(done.set)
            assert done.wait(60)
        assert not lane.entries()
        assert not lane.sessions
        assert len(relay.commands) == tried
        assert processor.stop()


def test_the_note_of_a_lane_is_ended_by_the_worker_that_has_it(database, relay):
    """A changed account is news for all workers; one of them has tried it already, in vain."""
    with open_outbox(f"{database}?lease=2") as outbox:
        put(outbox, relay, ALICE)
        relay.on("GREETING", reply="421 not now")
        processor = outbox.processor()
        processor.start()
        send(outbox)
        wait_for(lambda: outbox.spool.lane_notes())
        (lane,) = processor.scheduler.lanes
        with outbox.spool.connections.use("test") as connection:
            query = "UPDATE cpsmail.lanes SET worker = gen_random_uuid(), until = now() + '1h'"
            connection.execute(query)
        wait_for(lambda: not lane.is_ours and not lane.sessions)
        before = lane.terms.version()
        now = outbox.spool.connections.now()
        note = LaneNote(lane.name, "login", "535 no", now, now + 3600.0, 1, "another", told=True)
        outbox.spool.note_lane(lane.key, note)
        put(outbox, relay, ALICE, mails_per_minute=1000)
        wait_for(lambda: lane.terms.account and lane.terms.account.mails_per_minute)
        assert lane.terms.version() != before
        done = threading.Event()
        processor.scheduler.loop.call_soon_threadsafe(done.set)
        assert done.wait(60)
        assert outbox.spool.lane_note(lane.key) == note
        assert processor.stop()


# What relays have taken is recorded together


def test_no_more_is_on_its_way_than_a_session_may_have(outbox, relay, monkeypatch):
    """Sent and not recorded: that is what the death of the worker sends twice."""
    put(outbox, relay, ALICE, connections=1)
    processor, most, together = outbox.processor(), [], []
    real = Leases.settle_accepted

    def settle(self: Leases, leases: Any) -> Any:
        (lane,) = processor.scheduler.lanes
        most.append(lane.in_flight + len(leases))
        together.append(len(leases))
        return real(self, leases)

    monkeypatch.setattr(Leases, "settle_accepted", settle)
    send(outbox, 60)
    processor.start()
    relay.wait_for(60)
    wait_for(lambda: not list(outbox.spool.scan()))
    assert processor.stop()
    assert max(most) <= WINDOW
    assert sum(together) == 60
    assert len(relay.mails) == 60


def test_lanes_are_recorded_in_one_statement(outbox, relay, monkeypatch):
    mailboxes = [f"m{n}@example.org" for n in range(10)]
    put(outbox, relay, *mailboxes)
    batches = []
    real = Mails.remove_all

    def remove_all(self: Mails, mails: Any) -> set[str]:
        batches.append(len(mails))
        return real(self, mails)

    monkeypatch.setattr(Mails, "remove_all", remove_all)
    monkeypatch.setattr(Mails, "remove", None)
    with transaction.manager:
        for mailbox in mailboxes:
            for _ in range(5):
                outbox.delivery.send(mailbox, [BOB], MESSAGE)
    assert outbox.processor().run(forever=False).accepted == 50
    assert sum(batches) == 50
    assert len(relay.mails) == 50
    assert list(outbox.spool.scan()) == []


def test_what_cannot_be_recorded_stops_sending_until_it_can(outbox, relay, monkeypatch):
    monkeypatch.setattr(recorder_module, "_UNSETTLED", 0.2)
    full = threading.Event()
    full.set()

    def until_there_is_room(real: Any) -> Any:
        def remove(*arguments: Any, **more: Any) -> Any:
            if full.is_set():
                raise SpoolError("no space left on device")
            return real(*arguments, **more)

        return remove

    for name in ("remove", "remove_all"):
        monkeypatch.setattr(Mails, name, until_there_is_room(getattr(Mails, name)))
    put(outbox, relay, ALICE, connections=1)
    send(outbox, 100)
    processor = outbox.processor()
    processor.start()
    relay.wait_for(8)
    for _ in range(3):  # it tries again, and sends nothing meanwhile
        tried = wait_for(lambda: processor.scheduler and processor.scheduler._recorder._unsettled)
        wait_for(lambda tried=tried: processor.scheduler._recorder._unsettled is not tried)
    assert len(relay.mails) <= 8 + WINDOW
    full.clear()
    relay.wait_for(100)
    wait_for(lambda: not list(outbox.spool.scan()))
    assert processor.stop()
    assert len(relay.mails) == 100  # each once


def test_a_fault_of_ours_while_recording_sends_nothing_again(outbox, relay, monkeypatch):
    def fault(*arguments: Any) -> None:
        raise TypeError("a fault of ours")

    monkeypatch.setattr(Leases, "settle_accepted", fault)
    send(outbox, 3)
    outbox.processor().run(forever=False)
    assert [entry.state for entry in outbox.spool.scan()] == [State.HELD] * 3
    assert len(relay.mails) == 3


def test_what_is_gathered_when_it_ends_is_recorded(outbox, relay, monkeypatch):
    """The notice that a mail was passed on is durable at the very end only; then it is recorded."""
    late, left = [], []
    flush, close = NoticeQueue.flush, recorder_module.Recorder.close

    def flush_late(self: NoticeQueue) -> None:
        for told in late:
            told(None)
        flush(self)

    def close_and_look(self: Any) -> None:
        left.append(list(outbox.spool.scan()))
        close(self)

    monkeypatch.setattr(recorder_module.Recorder, "close", close_and_look)
    monkeypatch.setattr(NoticeQueue, "queue", lambda self, wanted, told: late.append(told))
    monkeypatch.setattr(NoticeQueue, "flush", flush_late)
    relay.extensions -= {"DSN"}
    with transaction.manager:
        outbox.delivery.send(ALICE, [BOB], MESSAGE, notify=["success"])
    outbox.processor().run(forever=False)
    assert len(relay.mails) == len(late) == 1
    assert left == [[]]  # and what comes last, the sync, is for it, too


@pytest.mark.parametrize("way", ["drain", "run"])
def test_a_large_mail_that_cannot_be_read_now_is_sent_later(database, relay, monkeypatch, way):
    """It does not come with its lease, and the connection is lost in between."""
    monkeypatch.setattr(claims_module, "LONGEST_SLEEP", 0.2)
    failed = threading.Event()
    real = Mails.message

    def message(self: Mails, entry_id: str) -> bytes:
        if not failed.is_set():
            failed.set()
            raise SpoolError("the connection is lost")
        return real(self, entry_id)

    monkeypatch.setattr(Mails, "message", message)
    with open_outbox(f"{database}?lease=1") as outbox:
        put(outbox, relay, ALICE)
        with transaction.manager:
            outbox.delivery.send(ALICE, [BOB], MESSAGE + b"line\r\n" * 300_000)
        if way == "drain":
            outbox.processor().run(forever=False)
            assert failed.is_set()
            wait_for(lambda: outbox.processor().run(forever=False).accepted)
        else:
            processor = outbox.processor()
            processor.start()
            relay.wait_for(1)
            wait_for(lambda: not list(outbox.spool.scan()))
            assert processor.stop()
    assert len(relay.mails) == 1


def test_an_account_is_not_read_while_there_is_no_connection(database, relay, monkeypatch):
    with open_outbox(database, max_sessions=1) as outbox:
        put(outbox, relay, ALICE, "carol@example.org")
        relay.on("GREETING", delay=0.5, times=1)
        reads = Counter()
        real = vault_module.PostgresVault.current

        def current(self: Any, mailbox: str) -> Any:
            reads[mailbox] += 1
            return real(self, mailbox)

        monkeypatch.setattr(vault_module.PostgresVault, "current", current)
        send(outbox)
        processor = outbox.processor()
        processor.start()
        wait_for(lambda: relay.open_sessions)
        for _ in range(5):
            send(outbox, sender="carol@example.org")
        relay.wait_for(6)
        assert processor.stop()
        assert reads[ALICE] == 1
        assert reads["carol@example.org"] <= 2


def test_accounts_of_new_lanes_are_read_together(outbox, relay, monkeypatch):
    mailboxes = [f"m{n}@example.org" for n in range(10)]
    put(outbox, relay, *mailboxes)
    asked = []
    real = vault_module.PostgresVault._data

    def data(self: Any, name: str, mailbox: str) -> bytes | None:
        asked.append(mailbox)
        return real(self, name, mailbox)

    monkeypatch.setattr(vault_module.PostgresVault, "_data", data)
    with transaction.manager:
        for mailbox in mailboxes:
            outbox.delivery.send(mailbox, [BOB], MESSAGE)
    asked.clear()
    processor = outbox.processor()
    processor.start()
    relay.wait_for(10)
    assert processor.stop()
    assert asked == []


def test_an_account_that_changes_while_it_was_read_ahead(outbox, relay):
    """Its lane has the account that is in force, whenever it was read."""
    with SMTPServer() as other:
        relay.on("GREETING", reply="421 not now")
        processor = outbox.processor()
        processor.start()
        send(outbox)
        wait_for(lambda: outbox.spool.lane_notes())
        put(outbox, other, ALICE)
        other.wait_for(1)
        assert processor.stop()
    assert relay.mails == []
