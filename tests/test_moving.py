"""`cpsmail move`: to PostgreSQL and back, killed at every step, while mails come in and leave."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction

pytest.importorskip("psycopg", reason="needs the extra [postgres]")

import psycopg
from zope.interface.verify import verifyObject

from cli_helpers import Site
from conftest import KEY, PASSWORD
from cpsmailaccess_delivery import Account, Outbox, State
from cpsmailaccess_delivery.envelope import digest
from cpsmailaccess_delivery.errors import SpoolError
from cpsmailaccess_delivery.interfaces import Entry, ITransit, Outcome, Settlement, Verdict
from cpsmailaccess_delivery.moving import MARK, Moved, Mover
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.spool.doubts import ASKED, CANCEL_ASKED
from cpsmailaccess_delivery.spool.keys import KEPT
from cpsmailaccess_delivery.testing import SMTPServer
from postgres_helpers import wait_for

ALICE, BOB, CAROL = "alice@example.org", "bob@example.net", "carol@example.net"
MESSAGE = b"From: alice@example.org\r\nSubject: hello\r\n\r\nhello\r\n"
DUE = 1_900_000_000.25

ACCEPTED = Outcome(State.ACCEPTED, "250 ok", 5.0)
DEFERRED = Outcome(State.DEFERRED, "450 later", 6.0)
UNCLEAR = Outcome(State.UNCLEAR, "gone", 7.0, 1, True)

WAYS = ("to PostgreSQL", "to a directory", "between directories")

#: Every call that changes something: of a file system, or of a database.
CALLS = ("rename", "link", "unlink", "fsync", "writev", "utime", "open", "sync")


@pytest.fixture
def relay() -> Iterator[SMTPServer]:
    with SMTPServer() as server:
        yield server


@pytest.fixture
def places(request: pytest.FixtureRequest, tmp_path: Path, database: str) -> tuple[str, str]:
    way = request.param
    first = database if way == "to a directory" else str(tmp_path / "from")
    return first, database if way == "to PostgreSQL" else str(tmp_path / "to")


def both_ways(function: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.parametrize("places", WAYS[:2], indirect=True)(function)


@contextlib.contextmanager
def opened(places: tuple[str, str], **settings: Any) -> Iterator[tuple[Outbox, Outbox]]:
    options = {"key": KEY, "helo_name": "client.example.org"} | settings
    with Outbox(places[0], **options) as source, Outbox(places[1], **options) as target:
        yield source, target


def move(places: tuple[str, str], **options: Any) -> Moved:
    with opened(places) as (source, target):
        return Mover(source, target, **options).move()


def put(outbox: Outbox, port: int = 1, host: str = "127.0.0.1", **changes: Any) -> None:
    settings = {"security": "plain", "port": port} | changes
    with transaction.manager:
        outbox.accounts.put(Account(mailbox=ALICE, host=host, **settings))


def send(outbox: Outbox, to: tuple[str, ...] = (BOB,), **options: Any) -> str:
    with transaction.manager:
        return outbox.delivery.send(ALICE, to, MESSAGE, **options)


def entry_of(outbox: Outbox, message_id: str) -> Entry:
    (record,) = outbox.spool.find(message_id)
    return record.entry


@both_ways
def test_times_are_those_of_the_outboxes(places, monkeypatch):
    """Not of the host that moves: what is compared with them later was noted by them, too."""
    monkeypatch.setattr(Mover, "_copy_keys", lambda mover: 0)  # the key came in with its mail
    with opened(places) as (source, target):
        put(source)
        message_id = send(source, idempotency_key="a key")
        source.clock, target.clock = lambda: DUE, lambda: DUE + 60
        Mover(source, target).move()
        moved = [e for e in source.journal.events(message_id=message_id) if e.kind == "moved"]
        assert [(event.at, event.recipient) for event in moved] == [(DUE, BOB)]
        (note,) = target.spool.transit.key_notes()
        assert note.until == pytest.approx(DUE + 60 + KEPT, abs=1.0)


def fill(outbox: Outbox) -> dict[str, tuple[object, ...]]:
    """Queue a mail in each state; return what is to be found wherever they are."""
    spool = outbox.spool
    send(outbox, priority="high", expires=DUE + 60, idempotency_key="a key")
    send(outbox, not_before=DUE)
    tried = [
        Settlement(State.DEFERRED, {BOB: ACCEPTED, CAROL: DEFERRED}, due=DUE, attempts=3),
        Settlement(State.UNCLEAR, {BOB: UNCLEAR, CAROL: DEFERRED}, due=DUE, attempts=2),
        Settlement(State.REFUSED, {BOB: Outcome(State.REFUSED, "550 no", 8.0)}, attempts=1),
        Settlement(State.HELD, {BOB: DEFERRED}, attempts=1, reason="why it is held"),
    ]
    for settlement in tried:
        entry = entry_of(outbox, send(outbox, (BOB, CAROL)))
        spool.claim(entry).settle(settlement)
    spool.requeue(spool.claim(entry_of(outbox, send(outbox))).settle(tried[0]))
    return mails(outbox)


def mails(outbox: Outbox, *, marked: bool = True) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for entry in outbox.spool.scan():
        record = outbox.spool.load(entry)
        if marked or not record.reason.startswith(MARK):
            assert entry.id not in found
            message = outbox.spool.read_message(entry)
            shown = (record.entry, record.envelope, dict(record.outcomes), record.reason, message)
            found[entry.id] = shown
    return found


@both_ways
def test_contract(places):
    with opened(places) as (source, target):
        assert verifyObject(ITransit, source.spool.transit)
        assert verifyObject(ITransit, target.spool.transit)


@pytest.mark.parametrize("places", WAYS, indirect=True)
def test_every_state_moves_as_it_is(places):
    with opened(places) as (source, target):
        put(source, username="alice", password=PASSWORD)
        expected = fill(source)
        moved = Mover(source, target).move()
        assert (moved.mails, moved.accounts, moved.keys, moved.left) == (7, 1, 1, {})
        assert mails(source) == {}
        assert mails(target) == expected
        assert target.vault.get(ALICE).secret.reveal() == PASSWORD
        assert target.spool.transit.arrived(digest(source.location)) == []
        with transaction.manager:  # the same key again: nothing is queued
            again = target.delivery.send(ALICE, [BOB], MESSAGE, idempotency_key="a key")
        assert target.spool.find(again)
        assert mails(target) == expected
        assert Mover(source, target).move().mails == 0


@both_ways
def test_there_and_back_again(places):
    with opened(places) as (source, target):
        put(source)
        expected = fill(source)
        assert Mover(source, target).move().mails == 7
        assert Mover(target, source).move().mails == 7
        assert mails(source) == expected


@both_ways
def test_what_moved_is_delivered(places, relay):
    with opened(places, schedule=Schedule(first=0.2, jitter=0.0)) as (source, target):
        put(source, relay.port, relay.host)
        message_ids = [send(source) for _ in range(5)]
        assert Mover(source, target).move().mails == 5
        assert source.processor().run(forever=False).accepted == 0
        processor = target.processor()
        processor.start()
        wait_for(lambda: len(relay.mails) == 5)
        wait_for(lambda: not list(target.spool.scan()))
        assert processor.stop()
        assert {mail.message_id for mail in relay.mails} == set(message_ids)


@both_ways
def test_the_story_moves_too(places, relay):
    relay.on("RCPT", reply="450 later")
    with opened(places) as (source, target):
        put(source, relay.port, relay.host)
        message_id = send(source)
        source.processor().run(forever=False)
        for _ in range(2):  # said again, it is not told twice
            Mover(source, target).move()
        kinds = [event.kind for event in target.journal.events(message_id=message_id)]
        assert kinds.count("deferred") == 1
        last = source.journal.events(message_id=message_id)[-1]
        assert (last.kind, last.reply) == ("moved", f"to {target.location}")


@both_ways
def test_in_doubt_stays_with_its_witness(places):
    with opened(places) as (source, target):
        put(source)
        entry = entry_of(source, send(source))
        source.spool.claim(entry).settle(Settlement(State.HELD, reason=ASKED))
        Mover(source, target).move()
        assert [doubt.entry.id for doubt in target.spool.doubts()] == [entry.id]


@both_ways
def test_a_cancel_in_doubt_stays_with_its_witness(places):
    with opened(places) as (source, target):
        put(source)
        entry = entry_of(source, send(source))
        lease = source.spool.claim(entry)
        lease.set_aside(CANCEL_ASKED, "T0k3n")
        lease.leave()
        Mover(source, target).move()
        (doubt,) = target.spool.doubts()
        assert (doubt.entry.id, doubt.token, doubt.cancels) == (entry.id, "T0k3n", True)
        target.spool.resolve(doubt, Verdict.ABORTED)
        assert list(target.spool.scan()) == [entry]


@both_ways
def test_a_mail_that_is_half_moved_is_in_nobody_s_doubt(places):
    """Asked about meanwhile, it would be queued here, and be there, too."""
    with opened(places) as (source, target):
        put(source)
        entry = entry_of(source, send(source))
        lease = source.spool.claim(entry)
        lease.set_aside(CANCEL_ASKED, "T0k3n")
        lease.leave()
        (doubt,) = source.spool.doubts()
        lease = source.spool.claim(doubt.entry)
        lease.set_aside(f"{MARK}{target.location}: say it again")
        lease.leave()
        assert source.spool.doubts() == []
        assert source.spool.resolve(doubt, Verdict.ABORTED) is None


@both_ways
def test_accounts_that_are_there_stay(places):
    with opened(places) as (source, target):
        put(source, 1)
        put(target, 2)
        assert Mover(source, target).move().accounts == 0
        assert target.vault.get(ALICE).port == 2


@both_ways
def test_what_is_being_delivered_is_waited_for(places):
    with opened(places) as (source, target):
        put(source)
        entry = entry_of(source, send(source))
        lease = source.spool.claim(entry)
        moved = Mover(source, target, patience=0.0).move()
        assert (moved.mails, moved.left) == (0, {entry.id: "is being delivered"})
        assert target.spool.transit.arrived(digest(source.location)) == []
        lease.release()
        assert Mover(source, target).move().mails == 1


@both_ways
def test_what_cannot_be_read_is_left_and_said(places):
    with opened(places) as (source, target):
        put(source)
        entry = entry_of(source, send(source))
        good = send(source)
        damage(places[0], entry)
        moved = Mover(source, target, patience=0.0).move()
        assert moved.mails == 1
        assert list(moved.left) == [entry.id]
        assert target.spool.find(good)
        assert [each.id for each in source.spool.scan()] == [entry.id]


def damage(place: str, entry: Entry) -> None:
    if "://" in place:
        with psycopg.connect(place) as connection:
            connection.execute("UPDATE cpsmail.mails SET block = '' WHERE id = %s", [entry.id])
    else:
        (path,) = Path(place, "new").glob(f"{entry.id}*")
        path.write_bytes(b"nothing")


@both_ways
def test_a_mail_under_way_to_another_place_is_left(places):
    with opened(places) as (source, target):
        put(source)
        entry = entry_of(source, send(source))
        lease = source.spool.claim(entry)
        lease.set_aside(f"{MARK}postgresql://elsewhere/x: say it again")
        lease.leave()
        moved = Mover(source, target, patience=0.0).move()
        assert (moved.mails, list(moved.left)) == (0, [entry.id])
        assert "elsewhere" in moved.left[entry.id]


@both_ways
def test_an_id_that_is_there_is_not_replaced(places):
    with opened(places) as (source, target):
        put(source)
        send(source)
        (record,) = [source.spool.load(entry) for entry in source.spool.scan()]
        target.spool.transit.arrive([(record, b"another message")], "0" * 16)
        target.spool.transit.admit([record.entry.id])
        target.spool.transit.close()
        moved = Mover(source, target, patience=0.0).move()
        assert (moved.mails, list(moved.left)) == (0, [record.entry.id])
        assert target.spool.read_message(record.entry) == b"another message"
        assert source.spool.load(record.entry) == record


@both_ways
def test_who_moves_from_elsewhere_leaves_copies_alone(places, tmp_path):
    """They may be all that there is: their mails are marked where they come from."""
    with opened(places) as (source, target):
        put(source)
        entry = entry_of(source, send(source))
        target.spool.transit.admit = lambda ids: 1 / 0  # as if it died there
        with pytest.raises(ZeroDivisionError):
            Mover(source, target).move()
    expire_leases(places[0])
    assert move((str(tmp_path / "elsewhere"), places[1])).mails == 0
    with opened(places) as (source, target):
        assert Mover(source, target).move().mails == 1
        assert [each.id for each in target.spool.scan()] == [entry.id]


def test_two_at_once_into_a_directory(tmp_path):
    places = str(tmp_path / "from"), str(tmp_path / "to")
    with opened(places) as (_, target), opened(places) as (_, other):
        target.spool.transit.arrived("0" * 16)
        with pytest.raises(SpoolError, match="another process moves"):
            other.spool.transit.arrived("0" * 16)


# Killed


def kill_at(step: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that dies before one of its changes; return whether it did."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
        return os.WIFSIGNALED(status)
    left = step

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if call.__name__ != "open" or args[1] & os.O_CREAT:
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            return call(*args, **kwargs)

        return wrapper

    try:
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        psycopg.Connection.execute = counted(psycopg.Connection.execute)  # type: ignore[method-assign]
        psycopg.Connection.commit = counted(psycopg.Connection.commit)  # type: ignore[method-assign]
        work()
        os._exit(0)
    finally:
        os._exit(1)


@both_ways
def test_killed_at_every_step(places, tmp_path):
    """Whatever step is the last, no mail may be taken in two places, and the next run ends it."""
    step = killed = 0
    with opened(places) as (source, target):
        put(source)
        Mover(source, target).move()
    while True:
        with opened(places) as (source, _):
            send(source, idempotency_key=f"key {step}")
            entry = entry_of(source, send(source, (BOB, CAROL)))
            settlement = Settlement(State.DEFERRED, {BOB: ACCEPTED}, due=DUE, attempts=3)
            source.spool.claim(entry).settle(settlement)
            expected = mails(source)
        if not kill_at(step, lambda: move(places)):
            break
        killed += 1
        with opened(places) as (source, target):
            there, here = mails(source, marked=False), mails(target)
            assert not set(there) & set(here), f"step {step}: in both places"
            assert {**there, **here}.items() <= expected.items(), f"step {step}"
            expire_leases(places[0])
            Mover(source, target).move()
            assert mails(source) == {}, f"step {step}"
            assert mails(target) == expected, f"step {step}"
            assert target.spool.key_holder(f"key {step}")
            assert target.spool.transit.arrived(digest(source.location)) == []
            for entry in target.spool.scan():
                target.spool.cancel(entry)
        step += 1
    assert killed > 20


def expire_leases(place: str) -> None:
    """Whoever died on PostgreSQL is known to be dead when his lease has ended."""
    if "://" in place:
        with psycopg.connect(place) as connection:
            connection.execute("UPDATE cpsmail.mails SET leased_until = now() - interval '1 s'")


@both_ways
def test_while_mails_come_in_and_leave_and_it_is_killed(places, relay, tmp_path):
    """Each mail is delivered once, by whichever side."""
    site = Site(tmp_path)
    site.environ |= {"CPSMAIL_KEY": KEY.hex(), "PYTHONPATH": os.pathsep.join(sys.path)}
    from_ = places[0] + ("?lease=1" if "://" in places[0] else "")
    sent: list[str] = []
    with opened((from_, places[1])) as (source, target):
        put(source, relay.port, relay.host, connections=1)
        put(target, relay.port, relay.host, connections=1)
        processors = [source.processor(), target.processor()]
        for processor in processors:
            processor.start()
        for pause in (0.9, 1.0, 1.1, 1.3, 1.6, None):
            sent += [send(source) for _ in range(60)]
            command = site.process_command("move", from_, places[1])
            with subprocess.Popen(command, env=site.environ) as process:
                if pause is None:
                    assert process.wait(120) == 0
                else:
                    time.sleep(pause)  # the moment of its death is any
                    process.kill()
            sent += [send(source) for _ in range(5)]
        Mover(source, target).move()
        wait_for(lambda: len(relay.mails) >= len(sent))
        wait_for(lambda: not list(target.spool.scan()) and not list(source.spool.scan()))
        for processor in processors:
            assert processor.stop()
    counted = Counter(mail.message_id for mail in relay.mails)
    assert counted == Counter(sent)


# The command


def test_the_command(tmp_path, database):
    site = Site(tmp_path)
    site.account()
    site.environ["CPSMAIL_KEY"] = (tmp_path / "outbox.key").read_text()  # of both
    site.send(BOB)
    site.send(CAROL)
    directory = str(site.path)
    assert site.json("move", directory, database) == {
        "moved": 2,
        "accounts": 1,
        "keys": 0,
        "left": [],
    }
    assert "0 mails moved" in site.run("move", directory, database).output
    assert "2 mails moved" in site.run("move", database, directory).output
    assert site.json("queue")["mails"]


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("{0}", "{0}", "both FROM and TO"),
        ("{0}-missing", "{0}", "there is none"),
        ("postgresql://u:geheim@h/d", "{0}", "command line"),
    ],
)
def test_what_cannot_be_moved(tmp_path, source, target, words):
    site = Site(tmp_path)
    site.account()
    path = str(site.path)
    result = site.run("move", source.format(path), target.format(path), code=78)
    assert words in result.output
    assert "geheim" not in result.output


@pytest.mark.parametrize("kind", ["directory", "PostgreSQL"])
def test_an_outbox_is_not_moved_into_itself(tmp_path, kind, request):
    site = Site(tmp_path)
    if kind == "directory":
        places = str(site.path), str(tmp_path / "link")
        (tmp_path / "link").symlink_to(site.path)
    else:
        database = request.getfixturevalue("database")
        places = database, database.replace("127.0.0.1", "localhost")
        site.environ |= {"CPSMAIL_OUTBOX": database, "CPSMAIL_KEY": KEY.hex()}
    assert places[0] != places[1]
    site.run("accounts", "set", "*", "--host", "127.0.0.1", "--security", "plain")
    site.send(BOB)
    said = site.run("move", *places, code=78).output
    assert f"is both FROM and TO: {places[1]} is another name of it" in said
    (mail,) = site.json("queue")["mails"]
    assert mail["state"] == "queued"
