"""The doubt window: a process dies between `send` and the end of `tpc_finish`; what then?"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transaction
import ZODB
from relstorage.storage import RelStorage
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from zope.component import getGlobalSiteManager
from zope.configuration import xmlconfig
from zope.event import notify
from zope.interface.verify import verifyObject
from zope.processlifetime import DatabaseOpenedWithRoot, IDatabaseOpenedWithRoot
from zope.sqlalchemy import register

from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.cli.checks import examine
from cpsmailaccess_delivery.datamanager import TOKEN_NAME
from cpsmailaccess_delivery.errors import KeyTaken
from cpsmailaccess_delivery.interfaces import Entry, ITransactionWitness, State, Verdict
from cpsmailaccess_delivery.search import search
from cpsmailaccess_delivery.spool import Maildir, doubts
from cpsmailaccess_delivery.spool.lease import Lease
from cpsmailaccess_delivery.testing import SMTPServer
from cpsmailaccess_delivery.upkeep import Upkeep
from cpsmailaccess_delivery.witness import zodb as zodb_witness
from cpsmailaccess_delivery.witness.sql import SQLWitness
from cpsmailaccess_delivery.witness.zodb import ZODBWitness
from cpsmailaccess_delivery.witness.zodb import register as register_zodb
from cpsmailaccess_delivery.zcml import RegisteredWitness
from witness_helpers import (
    ALICE,
    EARLIER,
    KEY,
    MAILS,
    NEW,
    commit_with_sql,
    commit_with_zodb,
    in_child,
    open_relstorage,
    open_zeo,
    open_zodb,
    send_all,
    send_earlier,
)

DEADLINE = 60.0


def make(path: Path, witness: Any = None) -> Outbox:
    outbox = Outbox(path, key=KEY, witness=witness)
    if outbox.vault.peek(ALICE) is None:
        with transaction.manager:
            outbox.accounts.put(Account(mailbox=ALICE, host="smtp.example.org"))
    return outbox


def swept(outbox: Outbox) -> None:
    Upkeep(outbox.spool, outbox.vault, outbox.journal, time.time, outbox.witness).sweep()


def check(outbox: Outbox, committed: bool, name: str) -> None:
    """The spool agrees with the database: all of it, or nothing at all."""
    found = {}
    for entry in outbox.spool.scan():
        found[outbox.spool.load(entry).envelope.message_id] = entry.state
    sent = [f"{name}.{number}@x" for number in range(MAILS)]
    cancelled = f"{EARLIER}@x"
    there = sent if committed else [cancelled]
    assert found == dict.fromkeys(there, State.QUEUED)
    for message_id in (*sent, cancelled):
        key = message_id.removesuffix("@x")
        assert outbox.spool.key_holder(key) == (message_id if message_id in there else None)
    assert (outbox.vault.peek(NEW) is not None) is committed
    if committed:
        assert outbox.vault.get(NEW).host == "new.example.org"
    assert outbox.spool.left_overs() == []
    assert outbox.vault.left_overs() == []
    assert not list(Path(outbox.location, "tmp").iterdir())


class Server:
    """A ZEO server in a process of its own."""

    def __init__(self, where: Path) -> None:
        code = (
            "import sys, ZEO, signal; address, stop = ZEO.server(sys.argv[1] + '/Data.fs');"
            "print(*address, flush=True); signal.pause()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(where)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        Path(where, "address").write_text(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=DEADLINE)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


OPEN = {"zodb": open_zodb, "zeo": open_zeo, "relstorage": open_relstorage}


def points(steps: list[str]) -> list[int]:
    """Choose where to die: every step with CI=true, else those around the window, and some."""
    if os.environ.get("CI") == "true":
        return list(range(len(steps)))
    names = ("tpc_", "_write", "settle")
    around = [n for n, step in enumerate(steps) if any(name in step for name in names)]
    first = min(around)
    return sorted({0, *range(4, first, 9), *range(first, len(steps), 3), *around, len(steps) - 1})


#: What the journal says of a mail of which the witness had to tell.
DECIDED = {True: "committed", False: "aborted"}

#: What must be seen: (committed, of how many mails the witness had to tell).
EVERY_END = {(False, 0), (False, MAILS + 1), (True, MAILS + 1), (True, 1), (True, 0)}


@pytest.mark.parametrize("flavour", ["zodb", "zeo", "relstorage"])
def test_killed_at_every_step_with_a_zodb(
    tmp_path: Path, flavour: str, request: pytest.FixtureRequest
) -> None:
    if flavour == "zeo":
        request.getfixturevalue("server")
    opened = OPEN[flavour]

    def kill(last: int) -> tuple[int, list[str]]:
        with closing(make(tmp_path / str(last))) as outbox:
            send_earlier(outbox)
        place, name = str(tmp_path / str(last)), f"mail{last}"
        return in_child(
            lambda steps: commit_with_zodb(str(tmp_path), place, name, steps, opened), last
        )

    ends = set()
    code, steps = kill(-1)
    assert code == 0
    for last in points(steps):
        code, made = kill(last)
        # A database may sync once more or less than the last time.
        assert code == (-signal.SIGKILL if len(made) == last + 1 else 0)
        db = opened(str(tmp_path))
        with closing(db), closing(make(tmp_path / str(last), ZODBWitness(db))) as outbox:
            swept(outbox)
            with db.transaction() as connection:
                committed = f"mail{last}" in connection.root()
            check(outbox, committed, f"mail{last}")
            counts = outbox.journal.counts(0.0)
            ends |= {(committed, counts.get(DECIDED[committed], 0))}
    assert ends >= EVERY_END


def test_killed_at_every_step_with_sql(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE things (name TEXT)"))
    engine.dispose()

    def kill(last: int) -> tuple[int, list[str]]:
        with closing(make(tmp_path / str(last))) as outbox:
            send_earlier(outbox)
        place, name = str(tmp_path / str(last)), f"mail{last}"
        return in_child(lambda steps: commit_with_sql(str(tmp_path), place, name, steps), last)

    ends = set()
    code, steps = kill(-1)
    assert code == 0
    for last in points(steps):
        code, made = kill(last)
        # A database may sync once more or less than the last time.
        assert code == (-signal.SIGKILL if len(made) == last + 1 else 0)
        witness = SQLWitness(engine.raw_connection)
        with closing(make(tmp_path / str(last), witness)) as outbox:
            swept(outbox)
            with engine.begin() as connection:
                found = text("SELECT * FROM things WHERE name = :name")
                committed = bool(connection.execute(found, {"name": f"mail{last}"}).all())
            check(outbox, committed, f"mail{last}")
            counts = outbox.journal.counts(0.0)
            ends |= {(committed, counts.get(DECIDED[committed], 0))}
        engine.dispose()
    assert ends >= EVERY_END


# What each witness knows, and what it cannot


class NullDataManager:
    """Takes part, and does nothing."""

    transaction_manager = transaction.manager

    def sortKey(self) -> str:
        return "~~~~"

    def nothing(self, txn: Any) -> None:
        pass

    tpc_begin = commit = tpc_vote = tpc_finish = tpc_abort = abort = nothing


class Doubtful:
    """An outbox whose process has died with mails in doubt; made in a forked child."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def leave(self, steps: Any, witness: Any, work: Any = None) -> None:
        """Commit in this (child) process, and die before the mails are published."""
        outbox = Outbox(self.path, key=KEY, witness=witness)
        for store in (outbox.vault, outbox.spool):
            steps.wrap(type(store), "publish")
        steps.on = True
        with transaction.manager as txn:
            send_all(outbox, "mail")
            if work is not None:
                work(txn)

    def left_by(self, opened: Any, work: Any = None) -> None:
        make(self.path).close()

        def child(steps: Any) -> None:
            db = opened()
            connection = db.open()
            self.leave(steps, ZODBWitness(db), work and (lambda txn: work(connection)))

        assert in_child(child, 0)[0] == -signal.SIGKILL


def states(outbox: Outbox) -> list[str]:
    return sorted(entry.state.value for entry in outbox.spool.scan())


@pytest.fixture
def zodb(tmp_path: Path) -> Iterator[Any]:
    """Opens the database; the last one is closed at the end."""
    opened: list[Any] = []

    def open_it() -> Any:
        opened.append(open_zodb(str(tmp_path)))
        return opened[-1]

    yield open_it
    for db in opened:
        db.close()


def write(connection: Any) -> None:
    connection.root()["mail"] = True


def test_contract(tmp_path: Path, zodb: Any) -> None:
    assert verifyObject(ITransactionWitness, ZODBWitness(zodb()))
    assert verifyObject(ITransactionWitness, SQLWitness(lambda: sqlite3.connect(tmp_path / "db")))
    assert verifyObject(ITransactionWitness, RegisteredWitness("x"))


def test_a_transaction_that_changes_no_object_is_held(tmp_path: Path, zodb: Any) -> None:
    """It writes no record, so the missing record says nothing."""
    doubtful = Doubtful(tmp_path / "box")
    doubtful.left_by(zodb)
    with closing(make(doubtful.path, ZODBWitness(zodb()))) as outbox:
        swept(outbox)
        assert states(outbox) == ["held"] * MAILS
        assert outbox.journal.counts(0.0) == {"doubtful": MAILS}
        assert outbox.spool.doubts() == []


def only_read(connection: Any) -> None:
    connection.readCurrent(connection.root())


def stored_by_a_savepoint(connection: Any) -> None:
    connection.root()["x"] = 1
    transaction.savepoint()


def undone(connection: Any) -> None:
    point = transaction.savepoint()
    connection.root()["x"] = 1
    point.rollback()


def undone_after_it_had_joined(connection: Any) -> None:
    connection.readCurrent(connection.root())
    connection._register()
    point = transaction.savepoint()
    connection.root()["x"] = 1
    point.rollback()


@pytest.mark.parametrize("work", [only_read, undone, undone_after_it_had_joined])
def test_joined_is_not_written(tmp_path: Path, zodb: Any, work: Any) -> None:
    doubtful = Doubtful(tmp_path / "box")
    doubtful.left_by(zodb, work)
    with closing(make(doubtful.path, ZODBWitness(zodb()))) as outbox:
        swept(outbox)
        assert states(outbox) == ["held"] * MAILS


def test_what_a_savepoint_has_stored_is_written(tmp_path: Path, zodb: Any) -> None:
    doubtful = Doubtful(tmp_path / "box")
    doubtful.left_by(zodb, stored_by_a_savepoint)
    with closing(make(doubtful.path, ZODBWitness(zodb()))) as outbox:
        swept(outbox)
        assert states(outbox) == ["queued"] * MAILS


def test_another_database_of_the_transaction_is_no_witness(tmp_path: Path, zodb: Any) -> None:
    (tmp_path / "other").mkdir()
    doubtful = Doubtful(tmp_path / "box")
    make(doubtful.path).close()

    def child(steps: Any) -> None:
        connection = open_zodb(str(tmp_path / "other")).open()
        doubtful.leave(steps, ZODBWitness(zodb()), lambda txn: write(connection))

    assert in_child(child, 0)[0] == -signal.SIGKILL
    with closing(make(doubtful.path, ZODBWitness(zodb()))) as outbox:
        swept(outbox)
        assert states(outbox) == ["held"] * MAILS


def test_a_pack_since_then_leaves_it_unknown(tmp_path: Path, zodb: Any) -> None:
    """It may have removed the record, with the revisions that it packed away."""
    doubtful = Doubtful(tmp_path / "box")
    doubtful.left_by(zodb, write)
    db = zodb()
    with db.transaction() as connection:
        connection.root()["mail"] = "changed since"
    time.sleep(0.01)  # the pack takes what is older than now, by the clock
    db.pack()
    with closing(make(doubtful.path, ZODBWitness(db))) as outbox:
        swept(outbox)
        assert states(outbox) == ["held"] * MAILS


def test_another_database_of_the_same_kind_knows_nothing(tmp_path: Path, zodb: Any) -> None:
    doubtful = Doubtful(tmp_path / "box")
    (tmp_path / "other").mkdir()
    open_zodb(str(tmp_path / "other")).close()  # older: it ends before the mark
    doubtful.left_by(zodb, write)
    other = open_zodb(str(tmp_path / "other"))
    with closing(other), closing(make(doubtful.path, ZODBWitness(other))) as outbox:
        swept(outbox)
        assert states(outbox) == ["held"] * MAILS


@pytest.mark.parametrize("hours", [-1, 1, 24 * 365])
def test_clocks_do_not_matter(tmp_path: Path, zodb: Any, hours: int) -> None:
    """The clock jumps between the send and the commit; the record is found all the same."""
    doubtful = Doubtful(tmp_path / "box")

    def jump(connection: Any) -> None:
        now = time.time
        time.time = lambda: now() + hours * 3600.0  # in the child
        write(connection)

    doubtful.left_by(zodb, jump)
    with closing(make(doubtful.path, ZODBWitness(zodb()))) as outbox:
        swept(outbox)
        assert states(outbox) == ["queued"] * MAILS


def test_a_storage_without_history_knows_nothing(tmp_path: Path) -> None:
    doubtful = Doubtful(tmp_path / "box")
    opened = partial(open_relstorage, str(tmp_path), keep_history=False)
    doubtful.left_by(opened, write)
    db = opened()
    with closing(db), closing(make(doubtful.path, ZODBWitness(db))) as outbox:
        swept(outbox)
        assert states(outbox) == ["held"] * MAILS


def test_a_storage_that_keeps_no_history_is_no_witness() -> None:
    db = ZODB.DB(MappingStorage())
    with closing(db):
        token = f"{'0' * 32}.{db.lastTransaction().hex()}"
        with db.transaction() as connection:
            connection.root()["x"] = 1
        assert ZODBWitness(db).ask([token]) == {}


def test_a_storage_that_may_not_be_written_is_no_witness(tmp_path: Path) -> None:
    """Nobody can take his turn there: what the dead have told it may not have ended."""
    with closing(open_zodb(str(tmp_path))) as db:
        mark = db.lastTransaction().hex()
    with closing(ZODB.DB(FileStorage(f"{tmp_path}/Data.fs", read_only=True))) as db:
        assert ZODBWitness(db).ask([f"{'0' * 32}.{mark}"]) == {}


@pytest.mark.parametrize("mark", ["", ".", ".zz", ".00", f".{'00' * 9}"])
def test_a_token_without_a_mark_is_unknown(zodb: Any, mark: str) -> None:
    """Another witness has made it, or nobody."""
    db = zodb()
    good = f"{'1' * 32}.{db.lastTransaction().hex()}"
    bad = "0" * 32 + mark
    assert ZODBWitness(db).ask([bad]) == {}
    assert ZODBWitness(db).ask([bad, good]) == {good: Verdict.ABORTED}


def test_who_has_not_marked_a_transaction_expects_nothing(zodb: Any) -> None:
    """The mark in its token is another database's."""
    db = zodb()
    witness, seen = ZODBWitness(db), []
    for marked in (False, True):
        with transaction.manager as txn:
            connection = db.open()
            if marked:
                witness.mark(txn)
            connection.root()[f"x{marked}"] = 1

            class Last(NullDataManager):
                def sortKey(self) -> str:
                    return "~~~"

                def commit(self, txn: Any) -> None:
                    seen.append(witness.expects(txn))

            txn.join(Last())
        connection.close()
    assert seen == [False, True]


def test_a_mark_is_not_used_for_long(zodb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor asked for at each mail: an old one costs a longer look, and a pack spoils it."""
    db = zodb()
    witness = ZODBWitness(db)
    first = witness.mark(transaction.begin())
    with db.transaction() as connection:
        connection.root()["x"] = 1
    assert witness.mark(transaction.begin()) == first
    monkeypatch.setattr(zodb_witness, "_MARKED", 0.0)
    assert witness.mark(transaction.begin()) == db.lastTransaction().hex() != first


def test_connections_of_relstorage_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = []
    release = RelStorage.release

    def noted(self: Any) -> None:
        released.append(self)
        release(self)

    with closing(open_relstorage(str(tmp_path))) as db:
        monkeypatch.setattr(RelStorage, "release", noted)
        witness = ZODBWitness(db)
        mark = witness.mark(transaction.begin())
        witness.ask([f"{'0' * 32}.{mark}"])
        assert len(released) == 2
        assert db.storage not in released


def test_a_commit_that_the_server_has_not_ended_is_waited_for(
    tmp_path: Path, server: Server
) -> None:
    """Only the client has died: what it has told the server goes on.  Never guess before."""
    other = open_zeo(str(tmp_path))
    with closing(other):
        meta = TransactionMetaData()
        other.storage.tpc_begin(meta)
        other.storage.store(other.storage.new_oid(), bytes(8), b"cN\n.", "", meta)
        other.storage.tpc_vote(meta)
        db = open_zeo(str(tmp_path))
        with closing(db):
            token = f"{'0' * 32}.{db.lastTransaction().hex()}"
            with ThreadPoolExecutor(1) as thread:
                asked = thread.submit(ZODBWitness(db).ask, [token])
                with pytest.raises(TimeoutError):
                    asked.result(0.3)
                other.storage.tpc_finish(meta)
                assert asked.result(DEADLINE) == {token: Verdict.ABORTED}


def test_a_server_that_is_down_is_asked_again_later(
    tmp_path: Path, zodb: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Down:
        def ask(self, tokens: Any) -> Any:
            raise ConnectionError("no route to the database")

    doubtful = Doubtful(tmp_path / "box")
    doubtful.left_by(zodb, write)
    with closing(make(doubtful.path, Down())) as outbox:
        for _ in range(2):
            swept(outbox)
            assert states(outbox) == ["held"] * MAILS
        assert "no route to the database" in caplog.text
    with closing(make(doubtful.path)) as outbox:  # a processor without the witness
        swept(outbox)
        assert states(outbox) == ["held"] * MAILS
        assert len(outbox.spool.doubts()) == MAILS
        assert len(outbox.vault.doubts()) == 1
    with closing(make(doubtful.path, ZODBWitness(zodb()))) as outbox:
        swept(outbox)
        assert states(outbox) == ["queued"] * MAILS
        assert outbox.vault.peek(NEW) is not None


def test_what_a_person_has_decided_is_not_asked(tmp_path: Path, zodb: Any) -> None:
    doubtful = Doubtful(tmp_path / "box")
    doubtful.left_by(zodb, write)
    with closing(make(doubtful.path)) as outbox:
        swept(outbox)
        first, second, third = outbox.spool.scan()
        outbox.queue.cancel(first.id)
        outbox.queue.hold(second.id, "not before I have looked")
        outbox.queue.release(third.id)
    with closing(make(doubtful.path, ZODBWitness(zodb()))) as outbox:
        swept(outbox)
        assert states(outbox) == ["held", "queued"]
        assert outbox.spool.load(second).reason == "not before I have looked"


def test_a_scheduled_mail_is_not_sent_early(tmp_path: Path, zodb: Any) -> None:
    path = tmp_path / "box"
    make(path).close()
    later = float(int(time.time()) + 86_400)

    def child(steps: Any) -> None:
        db = zodb()
        outbox = Outbox(path, key=KEY, witness=ZODBWitness(db))
        steps.wrap(type(outbox.spool), "publish")
        connection = db.open()
        steps.on = True
        with transaction.manager:
            outbox.delivery.send(
                ALICE, ["b@example.net"], b"\nx", not_before=later, priority="high"
            )
            write(connection)

    assert in_child(child, 0)[0] == -signal.SIGKILL
    with closing(make(path, ZODBWitness(zodb()))) as outbox:
        swept(outbox)
        (entry,) = outbox.spool.scan()
        assert (entry.state, entry.due, entry.priority) == ("queued", later, 8)


class Says:
    """A witness that says the same of every transaction."""

    def __init__(self, verdict: Verdict) -> None:
        self._verdict = verdict

    def mark(self, txn: Any) -> str:
        return ""

    def expects(self, txn: Any) -> bool:
        return True

    def ask(self, tokens: Any) -> Any:
        return dict.fromkeys(tokens, self._verdict)


@pytest.mark.parametrize("committed", [False, True])
def test_begun_again_with_its_key(tmp_path: Path, zodb: Any, committed: bool) -> None:
    """As one does after a crash: there is one mail in the end, whatever became of the first."""
    path = tmp_path / "box"
    make(path).close()

    def again(outbox: Outbox) -> str:
        return outbox.delivery.send(ALICE, ["b@example.net"], b"\nx", idempotency_key="k")

    def child(steps: Any) -> None:
        db = zodb()
        outbox = Outbox(path, key=KEY, witness=ZODBWitness(db))
        steps.wrap(type(db.storage), "tpc_finish")
        connection = db.open()
        steps.on = True
        with transaction.manager:
            again(outbox)
            write(connection)

    assert in_child(child, int(committed))[0] == -signal.SIGKILL
    with closing(make(path, ZODBWitness(zodb()))) as outbox:
        with pytest.raises(KeyTaken, match="witness"), transaction.manager:
            again(outbox)
        swept(outbox)
        with transaction.manager:
            message_id = again(outbox)
        swept(outbox)
        assert outbox.status(message_id).state is State.QUEUED
        assert states(outbox) == ["queued"]


@pytest.mark.parametrize("verdict", Verdict)
def test_a_cancel_in_doubt_is_told(
    tmp_path: Path, verdict: Verdict, caplog: pytest.LogCaptureFixture
) -> None:
    """By the log, the journal, the status and the doctor."""
    with closing(make(tmp_path / "box", Says(verdict))) as outbox:
        send_earlier(outbox)
        (entry,) = outbox.spool.scan()
        lease = outbox.spool.claim(entry)
        lease.set_aside("in doubt: and so on", "a transaction")
        swept(outbox)  # who cancels it lives
        assert outbox.status(f"{EARLIER}@x").state is State.HELD
        assert outbox.journal.counts(0.0) == {}
        lease.leave()
        swept(outbox)
        status = outbox.status(f"{EARLIER}@x")
        expected = {
            Verdict.COMMITTED: (State.CANCELLED, "1 are cancelled", "in doubt: 1 committed"),
            Verdict.ABORTED: (State.QUEUED, "1 are what they were before", "1 not committed"),
            Verdict.UNKNOWN: (State.HELD, "1 are held", "1 held because nobody knew"),
        }
        state, logged, found = expected[verdict]
        assert status.state is state
        assert logged in caplog.text
        (finding,) = (each for each in examine(outbox) if each.check == "doubts")
        assert found in finding.text
        kinds = [event.kind for event in outbox.journal.events(message_id=f"{EARLIER}@x")]
        decided = {"committed": ["committed", "cancelled"], "aborted": ["aborted"]}
        assert kinds == decided.get(verdict, ["doubtful"])


@pytest.mark.parametrize("verdict", Verdict)
def test_each_recipient_s_story_has_the_verdict(tmp_path: Path, verdict: Verdict) -> None:
    """Of a mail that is removed nothing but the journal says who was to get it."""
    path = tmp_path / "box"
    make(path).close()

    def child(steps: Any) -> None:
        outbox = Outbox(path, key=KEY, witness=Says(verdict))
        steps.wrap(type(outbox.spool), "publish")
        steps.on = True
        with transaction.manager:
            outbox.delivery.send(ALICE, ["bob@example.net", "carol@example.net"], b"\nx")

    assert in_child(child, 0)[0] == -signal.SIGKILL
    with closing(make(path, Says(verdict))) as outbox:
        swept(outbox)
        kinds = {"committed": "committed", "aborted": "aborted", "unknown": "doubtful"}
        for recipient in ("bob@example.net", "carol@example.net"):
            story = search(outbox.queue, outbox.journal, recipient).events
            assert kinds[verdict] in {e.kind for e in story if e.recipient == recipient}


def test_a_transaction_that_only_cancels_is_held(tmp_path: Path, zodb: Any) -> None:
    """It changes no object: the missing record would say nothing."""
    path = tmp_path / "box"
    with closing(make(path)) as outbox:
        send_earlier(outbox)

    def child(steps: Any) -> None:
        outbox = Outbox(path, key=KEY, witness=ZODBWitness(zodb()))
        steps.wrap(Lease, "settle")
        steps.on = True
        with transaction.manager:
            outbox.delivery.cancel(f"{EARLIER}@x")

    assert in_child(child, 0)[0] == -signal.SIGKILL
    with closing(make(path, ZODBWitness(zodb()))) as outbox:
        swept(outbox)
        assert states(outbox) == ["held"]
        assert "nobody can tell" in outbox.status(f"{EARLIER}@x").reason


def test_an_account_that_was_put_again_stays(tmp_path: Path, zodb: Any) -> None:
    doubtful = Doubtful(tmp_path / "box")
    doubtful.left_by(zodb, write)
    with closing(make(doubtful.path)) as outbox, transaction.manager:
        outbox.accounts.put(Account(mailbox=NEW, host="newer.example.org"))
    with closing(make(doubtful.path, ZODBWitness(zodb()))) as outbox:
        swept(outbox)
        assert outbox.vault.get(NEW).host == "newer.example.org"
        assert outbox.vault.left_overs() == []


def test_a_processor_delivers_what_was_committed(tmp_path: Path, zodb: Any) -> None:
    doubtful = Doubtful(tmp_path / "box")
    with SMTPServer() as relay:
        make(doubtful.path).close()
        with closing(make(doubtful.path)) as outbox, transaction.manager:
            outbox.accounts.put(
                Account(mailbox=ALICE, host="127.0.0.1", port=relay.port, security="plain")
            )
        doubtful.left_by(zodb, write)
        with closing(make(doubtful.path, ZODBWitness(zodb()))) as outbox:
            summary = outbox.processor().run(forever=False)
            assert summary.accepted == len(relay.mails) == MAILS


def test_a_drain_leaves_none_that_it_came_for_too_soon(
    tmp_path: Path, zodb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the moment in which it was decided: it is told of as soon as it stands there."""
    doubtful = Doubtful(tmp_path / "box")
    refused = threading.Semaphore(0)
    leased, unlock = Maildir.leased, doubts.unlock

    def is_leased(spool: Maildir, entry: Entry) -> bool:
        answer = leased(spool, entry)
        refused.release()
        return answer

    def unlocks(fd: int) -> None:
        for _ in range(2):  # who cannot claim it looks twice
            assert refused.acquire(timeout=DEADLINE)
        unlock(fd)

    with SMTPServer() as relay:
        with closing(make(doubtful.path)) as outbox, transaction.manager:
            outbox.accounts.put(
                Account(mailbox=ALICE, host="127.0.0.1", port=relay.port, security="plain")
            )
        doubtful.left_by(zodb, write)
        monkeypatch.setattr(Maildir, "leased", is_leased)
        monkeypatch.setattr(doubts, "unlock", unlocks)

        with closing(make(doubtful.path, Says(Verdict.COMMITTED))) as outbox:
            assert outbox.processor().run(forever=False).accepted == MAILS


def test_a_witness_that_fails_stops_no_commit(tmp_path: Path) -> None:
    class Broken:
        def mark(self, txn: Any) -> str:
            raise RuntimeError("mark")

        def expects(self, txn: Any) -> bool:
            raise RuntimeError("expects")

    with closing(make(tmp_path / "box", Broken())) as outbox:
        with transaction.manager:
            send_all(outbox, "mail")
        assert states(outbox) == ["queued"] * MAILS


def test_the_doctor_tells_the_numbers(tmp_path: Path, zodb: Any) -> None:
    doubtful = Doubtful(tmp_path / "box")
    doubtful.left_by(zodb, write)
    with closing(make(doubtful.path)) as outbox:
        swept(outbox)
        (finding,) = (each for each in examine(outbox) if each.check == "doubts")
        assert finding.level == "warn"
        assert "in doubt: 3 mails and 1 change of an account" in finding.text
    with closing(make(doubtful.path, ZODBWitness(zodb()))) as outbox:
        swept(outbox)
        (finding,) = (each for each in examine(outbox) if each.check == "doubts")
        assert finding.level == "ok"
        assert "in doubt: 3 committed, 0 not committed, 0 held" in finding.text


# SQL


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Any]:
    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    yield engine
    engine.dispose()


def rows(engine: Any) -> int:
    with engine.begin() as connection:
        return connection.execute(text("SELECT count(*) FROM cpsmail_transactions")).scalar()


def test_the_table_stays_small(tmp_path: Path, engine: Any) -> None:
    witness = SQLWitness(engine.raw_connection)
    session = sessionmaker(bind=engine)()
    register(session)
    with closing(make(tmp_path / "box", witness)) as outbox:
        for number in range(20):
            txn = transaction.begin()
            witness.follow_session(txn, session)
            if number % 3:
                outbox.delivery.send(ALICE, ["b@example.net"], b"\nx")
            if number % 5:
                transaction.commit()
            else:
                transaction.abort()
            assert rows(engine) <= 1
            assert len(witness._ended) <= 1


def test_a_transaction_that_has_only_read_leaves_its_trace(tmp_path: Path, engine: Any) -> None:
    witness = SQLWitness(engine.raw_connection)
    session = sessionmaker(bind=engine)()
    register(session)
    with closing(make(tmp_path / "box", witness)) as outbox, transaction.manager as txn:
        witness.follow_session(txn, session)
        outbox.delivery.send(ALICE, ["b@example.net"], b"\nx")
    assert rows(engine) == 1


def test_rows_of_before_a_veto_are_removed_later(tmp_path: Path, engine: Any) -> None:
    witness = SQLWitness(engine.raw_connection)
    session = sessionmaker(bind=engine)()
    register(session)

    class Veto(NullDataManager):
        def commit(self, txn: Any) -> None:
            raise RuntimeError("a veto")

    with closing(make(tmp_path / "box", witness)) as outbox:
        for veto in (False, True, False):
            txn = transaction.begin()
            witness.follow_session(txn, session)
            outbox.delivery.send(ALICE, ["b@example.net"], b"\nx")
            if veto:
                txn.join(Veto())
                with pytest.raises(RuntimeError, match="a veto"):
                    transaction.commit()
                transaction.abort()
            else:
                transaction.commit()
            assert rows(engine) == 1


def test_who_does_not_follow_is_held(tmp_path: Path, engine: Any) -> None:
    path = tmp_path / "box"
    make(path).close()
    SQLWitness(engine.raw_connection)
    engine.dispose()
    doubtful = Doubtful(path)
    assert (
        in_child(lambda s: doubtful.leave(s, SQLWitness(engine.raw_connection)), 0)[0]
        == -signal.SIGKILL
    )
    with closing(make(path, SQLWitness(engine.raw_connection))) as outbox:
        swept(outbox)
        assert states(outbox) == ["held"] * MAILS


@pytest.mark.parametrize("kind", ["psycopg", "sqlalchemy"])
def test_on_postgresql(tmp_path: Path, database: str, kind: str) -> None:
    """Each driver writes parameters in its own way, and the connection tells of which it is."""
    psycopg = pytest.importorskip("psycopg")
    engine = create_engine(database.replace("postgresql", "postgresql+psycopg"))
    connect = engine.raw_connection if kind == "sqlalchemy" else partial(psycopg.connect, database)
    witness = SQLWitness(connect)
    with closing(make(tmp_path / "box", witness)) as outbox, closing(connect()) as connection:
        txn = transaction.begin()
        witness.follow(txn, lambda *statement: connection.cursor().execute(*statement))
        outbox.delivery.send(ALICE, ["b@example.net"], b"\nx")
        token = txn.extension[TOKEN_NAME]
        transaction.commit()
        connection.commit()
        assert witness.ask([token, "x"]) == {token: Verdict.COMMITTED, "x": Verdict.ABORTED}
        connection.cursor().execute("DROP TABLE cpsmail_transactions")
        connection.commit()
    engine.dispose()


def test_a_driver_that_nobody_knows(tmp_path: Path) -> None:
    class Connection:
        def __init__(self) -> None:
            self.cursor = sqlite3.connect(tmp_path / "db").cursor
            self.close = self.commit = lambda: None

    with pytest.raises(ValueError, match='say placeholder="'):
        SQLWitness(Connection)
    SQLWitness(Connection, placeholder="?")


def test_a_commit_that_is_still_ending_is_waited_for(tmp_path: Path) -> None:
    """The token is taken in a transaction of the database that has not ended."""

    def connect() -> Any:
        return sqlite3.connect(tmp_path / "db", timeout=DEADLINE, check_same_thread=False)

    witness = SQLWitness(connect)
    ending = connect()
    ending.execute("INSERT INTO cpsmail_transactions VALUES ('a')")
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(witness.ask, ["a", "b"])
        with pytest.raises(TimeoutError):
            asked.result(0.3)
        ending.commit()
        assert asked.result(DEADLINE) == {"a": Verdict.COMMITTED, "b": Verdict.ABORTED}
    ending.close()
    with closing(connect()) as connection:
        rows = connection.execute("SELECT * FROM cpsmail_transactions").fetchall()
    assert rows == [("a",)]


# The utility


def test_the_witness_is_looked_up_when_it_is_needed(tmp_path: Path, zodb: Any) -> None:
    manager = getGlobalSiteManager()
    witness = RegisteredWitness("/var/outbox")
    assert (witness.mark(transaction.get()), witness.expects(transaction.get())) == ("", False)
    with pytest.raises(LookupError):
        witness.ask(["x"])
    event = type("DatabaseOpenedWithRoot", (), {"database": zodb()})
    register_zodb(event)
    named = SQLWitness(lambda: sqlite3.connect(tmp_path / "db"))
    try:
        assert len(witness.mark(transaction.get())) == 16
        manager.registerUtility(named, ITransactionWitness, "/var/outbox")
        assert witness.mark(transaction.get()) == ""
        assert witness.ask(["x"]) == {"x": Verdict.ABORTED}
    finally:
        manager.unregisterUtility(provided=ITransactionWitness)
        manager.unregisterUtility(provided=ITransactionWitness, name="/var/outbox")


def test_zcml(tmp_path: Path, zodb: Any) -> None:
    xmlconfig.string(
        """<configure xmlns="http://namespaces.zope.org/zope">
             <include package="cpsmailaccess_delivery.witness" file="zodb.zcml" />
           </configure>"""
    )
    manager = getGlobalSiteManager()
    try:
        notify(DatabaseOpenedWithRoot(zodb()))
        assert isinstance(manager.getUtility(ITransactionWitness), ZODBWitness)
    finally:
        manager.unregisterUtility(provided=ITransactionWitness)
        manager.unregisterHandler(register_zodb, (IDatabaseOpenedWithRoot,))
