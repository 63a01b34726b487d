"""What a sender can ask for: later, not too late, first, once; and to take it back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import transaction
from transaction import TransactionManager
from transaction.interfaces import TransientError

from conftest import mails_on_disk
from cpsmailaccess_delivery import Account, Outbox, QueueProcessorThread, State
from cpsmailaccess_delivery import outbox as outbox_module
from cpsmailaccess_delivery.delivery import MailboxDelivery
from cpsmailaccess_delivery.envelope import Envelope, Route, parse_block
from cpsmailaccess_delivery.errors import EntryBusy, InvalidOption, NoSuchEntry, SpoolError
from cpsmailaccess_delivery.interfaces import Entry
from cpsmailaccess_delivery.ready import Ready
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.spool.mails import Mails
from cpsmailaccess_delivery.testing import SMTPServer
from test_transaction import Participant

ALICE, BOB = "alice@example.org", "bob@example.net"
DEADLINE = 20.0
MESSAGE = b"From: alice@example.org\r\nSubject: hello\r\n\r\nhello\r\n"


@pytest.fixture
def server() -> Iterator[SMTPServer]:
    with SMTPServer() as server:
        yield server


@pytest.fixture
def outbox(tmp_path: Path, server: SMTPServer) -> Iterator[Outbox]:
    schedule = Schedule(first=3600.0, jitter=0.0)
    with Outbox(tmp_path / "outbox", helo_name="client.example.org", schedule=schedule) as made:
        account = Account(
            mailbox=ALICE,
            host=server.host,
            port=server.port,
            security="plain",
            connections=1,
        )
        with transaction.manager:
            made.accounts.put(account)
        yield made


class Clock:
    """The clock of the processors of a test; real time goes on."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()

    def thread(*arguments: Any, **settings: Any) -> QueueProcessorThread:
        return QueueProcessorThread(*arguments, **{**settings, "clock": clock})

    monkeypatch.setattr(outbox_module, "QueueProcessorThread", thread)
    return clock


def send(
    outbox: Outbox, message: bytes = MESSAGE, to: tuple[str, ...] = (BOB,), **wish: Any
) -> str:
    with transaction.manager:
        return outbox.delivery.send(ALICE, list(to), message, **wish)


def drain(outbox: Outbox) -> Any:
    return outbox.processor().run(forever=False)


def only(outbox: Outbox) -> Path:
    (path,) = Path(outbox.location, "new").iterdir()
    return path


# Later


def test_a_scheduled_mail_waits_for_its_time(outbox, server, clock):
    when = time.time() + 10 * 86400
    message_id = send(outbox, not_before=when)
    status = outbox.status(message_id)
    assert (status.state, status.reason) == (State.QUEUED, "scheduled")
    assert 0 <= status.next_try - when < 0.002
    summary = drain(outbox)
    assert (summary.accepted, summary.waiting) == (0, 1)
    clock.ahead = 10 * 86400 - 60
    assert drain(outbox).waiting == 1
    clock.ahead = 10 * 86400 + 1
    assert drain(outbox).accepted == 1
    assert outbox.status(message_id).state is State.ACCEPTED
    assert len(server.mails) == 1


def test_its_name_says_when(outbox):
    send(outbox, not_before=datetime(2100, 1, 1, tzinfo=UTC))
    path = only(outbox)
    assert path.name.endswith(":1,queued,4102444800,0")
    assert parse_block(path.read_bytes())[0].not_before == 4102444800.0


def test_a_start_opens_nothing_that_is_not_due(outbox, monkeypatch):
    send(outbox, not_before=time.time() + 3600)
    opened: list[Any] = []
    monkeypatch.setattr(outbox.spool, "load", opened.append)
    monkeypatch.setattr(outbox.spool, "claim", opened.append)
    assert drain(outbox).waiting == 1
    assert opened == []


def test_undo_holds_a_mail_back(outbox, server):
    processor = outbox.processor()
    processor.start()
    started = time.time()
    send(outbox, undo=0.5)
    server.wait_for(1, DEADLINE)
    assert time.time() >= started + 0.5
    assert processor.stop(timeout=DEADLINE)


def test_the_later_of_both_counts(outbox):
    now = time.time()
    later = outbox.status(send(outbox, undo=3600, not_before=now + 60)).next_try
    assert 3600 <= later - now < 3600 + DEADLINE
    later = outbox.status(send(outbox, undo=60, not_before=now + 3600)).next_try
    assert 3600 <= later - now < 3600.1


def test_what_is_due_at_once_has_a_plain_name(outbox):
    send(outbox, undo=0, not_before=1.0, priority="normal", expires=None)
    assert ":" not in only(outbox).name
    assert b"X-Zope-Not-Before" not in only(outbox).read_bytes()


def test_a_person_may_send_it_now(outbox, server):
    message_id = send(outbox, undo=3600)
    outbox.queue.retry(message_id)
    assert drain(outbox).accepted == 1


def test_a_scheduled_mail_is_not_the_oldest_that_is_due(outbox):
    send(outbox, undo=3600)
    assert outbox.queue.counts().oldest == 0


def test_a_mail_that_was_scheduled_late_has_all_its_tries(outbox, server, clock):
    server.on("RCPT", reply="450 4.2.0 later")
    message_id = send(outbox, undo=30 * 86400)
    clock.ahead = 30 * 86400 + 1
    for attempts in range(1, 8):
        drain(outbox)  # also the notice of its delay, when it is four hours old
        clock.ahead += 4 * 3600
        (record,) = outbox.queue.find(message_id)
        assert (record.entry.state, record.entry.attempts) == (State.DEFERRED, attempts)


# Not too late


def test_an_expired_mail_is_not_tried(outbox, server, clock):
    message_id = send(outbox, expires=time.time() + 60)
    clock.ahead = 61
    summary = drain(outbox)
    assert (summary.accepted, summary.refused) == (1, 1)
    assert [mail.sender for mail in server.mails] == [""]  # the notice to its sender alone
    status = outbox.status(message_id)
    assert (status.state, status.reason, status.attempts) == (State.REFUSED, "expired", 0)
    assert str(status.recipients[BOB]) == "refused: expired"
    assert outbox.journal.last_outcomes(message_id)[BOB].state is State.REFUSED


def test_before_that_it_is(outbox, server):
    send(outbox, expires=time.time() + 60)
    assert drain(outbox).accepted == 1


def test_no_next_try_in_time_is_expired(outbox, server):
    """The relay's words stay; who has it, has it."""
    server.on("RCPT", reply="450 4.2.0 later", match="carol@")
    message_id = send(outbox, to=(BOB, "carol@example.net"), expires=time.time() + 60)
    assert drain(outbox).refused == 1
    status = outbox.status(message_id)
    assert (status.state, status.reason) == (State.REFUSED, "expired")
    assert status.recipients[BOB].state is State.ACCEPTED
    assert str(status.recipients["carol@example.net"]) == "refused: expired; 450 4.2.0 later"


def test_a_retry_of_a_person_does_not_make_it_young(outbox, server, clock):
    message_id = send(outbox, expires=time.time() + 60)
    clock.ahead = 61
    drain(outbox)
    outbox.queue.retry(message_id)
    assert drain(outbox).refused == 1
    assert [mail.sender for mail in server.mails] == [""]  # the notices to its sender alone


def wait_for(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("when", ["before the start", "while it waits"])
def test_a_mail_expires_while_its_lane_waits(outbox, server, clock, when):
    """It is refused then, not when the relay is back; that probe is an hour away."""
    server.stop_accepting()
    send(outbox)
    drain(outbox)
    assert outbox.spool.lane_notes()
    processor = outbox.processor()
    if when == "before the start":
        message_id = send(outbox, expires=time.time() + 1)
        processor.start()
    else:
        processor.start()
        wait_for(lambda: processor.scheduler is not None and len(processor.scheduler.lanes) == 1)
        message_id = send(outbox, expires=time.time() + 1)
    wait_for(lambda: outbox.status(message_id).state is State.REFUSED)
    assert outbox.status(message_id).reason == "expired"
    assert processor.stop(timeout=DEADLINE)
    senders = [outbox.spool.load(entry).envelope.sender for entry in outbox.spool.scan()]
    assert sorted(senders) == ["", ALICE, ALICE]  # a notice waits, too


def test_what_is_unclear_stays_unclear(outbox, server, clock):
    server.on("TAKEN", drop=True)
    message_id = send(outbox, expires=time.time() + 7200)
    assert drain(outbox).unclear == 1
    clock.ahead = 7201
    drain(outbox)
    status = outbox.status(message_id)
    assert (status.state, status.reason) == (State.UNCLEAR, "expired")


# First


def test_higher_priorities_go_first(outbox, server):
    for number, priority in enumerate(["low", None, 9, "normal", "high", 0, "high", None]):
        send(outbox, b"Subject: %d\n\nx\n" % number, priority=priority)
    assert [entry.priority for entry in outbox.spool.scan()] == [2, 5, 9, 5, 8, 0, 8, 5]
    assert drain(outbox).accepted == 8
    subjects = [mail.data.partition(b"Subject: ")[2][:1] for mail in server.mails]
    assert b"".join(subjects) == b"24613705"


def test_the_priority_is_in_the_name(outbox):
    send(outbox, priority="high")
    assert only(outbox).name.endswith(",P=8")


def test_ready():
    ready = Ready()
    entries = {p: [Entry(f"{p}{n}", "lane", priority=p) for n in range(3)] for p in (2, 5, 8)}
    for priority in (5, 2, 8):
        ready.append(entries[priority][1])
        ready.append(entries[priority][2])
        ready.appendleft(entries[priority][0])
    assert len(ready) == 9
    assert list(ready) == [*entries[8], *entries[5], *entries[2]]
    assert [ready.popleft() for _ in range(9)] == [*entries[8], *entries[5], *entries[2]]
    assert not ready
    with pytest.raises(IndexError):
        ready.popleft()
    ready.append(entries[2][0])
    ready.clear()
    assert (len(ready), bool(ready)) == (0, False)


# Taken back


def test_a_cancelled_mail_is_gone_with_the_commit(outbox, server):
    message_id = send(outbox, undo=3600)
    other = send(outbox)
    outbox.delivery.cancel(f"<{message_id}>")
    assert outbox.status(message_id).state is State.QUEUED
    transaction.commit()
    assert drain(outbox).accepted == 1
    assert [mail.message_id for mail in server.mails] == [other]
    assert outbox.status(message_id).state is State.CANCELLED
    (event,) = outbox.journal.events(message_id=message_id)
    assert (event.kind, event.recipient) == ("cancelled", BOB)
    assert list(outbox.spool.scan()) == []


@pytest.mark.parametrize("way", ["abort", "savepoint"])
def test_undone_the_mail_stays(outbox, server, way):
    message_id = send(outbox)
    savepoint = transaction.savepoint()
    outbox.delivery.cancel(message_id)
    if way == "abort":
        transaction.abort()
    else:
        savepoint.rollback()
        transaction.commit()
    assert drain(outbox).accepted == 1
    assert outbox.status(message_id).state is State.ACCEPTED


def test_a_savepoint_that_is_not_rolled_back_changes_nothing(outbox):
    message_id = send(outbox)
    outbox.delivery.cancel(message_id)
    transaction.savepoint()
    transaction.commit()
    assert list(outbox.spool.scan()) == []


def test_sent_and_cancelled_in_one_transaction(outbox, server):
    with transaction.manager:
        message_id = outbox.delivery.send(ALICE, [BOB], MESSAGE)
        kept = outbox.delivery.send(ALICE, [BOB], MESSAGE)
        outbox.delivery.cancel(message_id)
        with pytest.raises(NoSuchEntry):
            outbox.delivery.cancel(message_id)
    assert len(mails_on_disk(outbox)) == 1
    assert drain(outbox).accepted == 1
    assert [mail.message_id for mail in server.mails] == [kept]


def test_sent_and_cancelled_and_the_cancel_undone(outbox, server):
    with transaction.manager:
        message_id = outbox.delivery.send(ALICE, [BOB], MESSAGE)
        savepoint = transaction.savepoint()
        outbox.delivery.cancel(message_id)
        savepoint.rollback()
    assert drain(outbox).accepted == 1


def test_sent_cancelled_and_both_undone(outbox):
    with transaction.manager:
        savepoint = transaction.savepoint()
        message_id = outbox.delivery.send(ALICE, [BOB], MESSAGE)
        outbox.delivery.cancel(message_id)
        savepoint.rollback()
        with pytest.raises(NoSuchEntry):
            outbox.delivery.cancel(message_id)
    assert mails_on_disk(outbox) == []


def test_only_once(outbox):
    message_id = send(outbox)
    outbox.delivery.cancel(message_id)
    with pytest.raises(NoSuchEntry):
        outbox.delivery.cancel(message_id)
    transaction.commit()
    with pytest.raises(NoSuchEntry):
        outbox.delivery.cancel(message_id)


def test_what_is_delivered_cannot_be_taken_back(outbox):
    message_id = send(outbox)
    drain(outbox)
    for name in (message_id, "unknown@example.org"):
        with pytest.raises(NoSuchEntry):
            outbox.delivery.cancel(name)


def test_what_is_being_delivered_is_busy(outbox):
    message_id = send(outbox)
    (entry,) = outbox.spool.scan()
    lease = outbox.spool.claim(entry)
    with pytest.raises(EntryBusy):
        outbox.delivery.cancel(message_id)
    lease.release()
    outbox.delivery.cancel(message_id)
    lease = outbox.spool.claim(entry)
    other = outbox.delivery.send(ALICE, [BOB], MESSAGE)
    with pytest.raises(EntryBusy):
        transaction.commit()
    transaction.abort()
    lease.release()
    assert list(outbox.spool.scan()) == [entry]
    with pytest.raises(NoSuchEntry):
        outbox.status(other)


def test_delivered_between_call_and_commit(outbox):
    message_id = send(outbox)
    outbox.delivery.cancel(message_id)
    drain(outbox)
    with pytest.raises(NoSuchEntry):
        transaction.commit()
    transaction.abort()
    assert outbox.status(message_id).state is State.ACCEPTED


def test_tried_between_call_and_commit(outbox, server):
    server.on("RCPT", reply="450 4.2.0 later")
    message_id = send(outbox)
    outbox.delivery.cancel(message_id)
    assert drain(outbox).deferred == 1
    transaction.commit()
    assert outbox.status(message_id).state is State.CANCELLED


class Last(Participant):
    """A participant that is asked after ours, and does something then."""

    def __init__(self, action: Callable[[], None], **settings: Any) -> None:
        super().__init__(key="~~~~~last", **settings)
        self.action = action

    def tpc_vote(self, txn: Any) -> None:
        self.action()
        super().tpc_vote(txn)


def test_nobody_sends_it_between_vote_and_finish(outbox, server):
    message_id = send(outbox)
    outbox.delivery.cancel(message_id)
    summaries: list[Any] = []
    transaction.get().join(Last(lambda: summaries.append(drain(outbox))))
    transaction.commit()
    assert (summaries[0].accepted, summaries[0].waiting) == (0, 0)
    assert server.mails == []
    assert outbox.status(message_id).state is State.CANCELLED


def test_a_veto_gives_the_mail_back(outbox, server):
    message_id = send(outbox)
    outbox.delivery.cancel(message_id)
    transaction.get().join(Last(lambda: None, fail="tpc_vote"))
    with pytest.raises(RuntimeError, match="veto"):
        transaction.commit()
    transaction.abort()
    assert drain(outbox).accepted == 1


def test_two_transactions_cancel_one_mail(outbox):
    """The second fails, and leaves the first its lease."""
    message_id = send(outbox)
    first, second = TransactionManager(), TransactionManager()
    deliveries = [
        MailboxDelivery(outbox.spool, outbox.accounts, manager) for manager in (first, second)
    ]
    for delivery in deliveries:
        delivery.cancel(message_id)

    def commit_second() -> None:
        with pytest.raises(EntryBusy):
            second.commit()
        second.abort()

    first.get().join(Last(commit_second, manager=first))
    first.commit()
    assert list(outbox.spool.scan()) == []


@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize("decision", ["release", "cancel"])
def test_a_crash_before_the_finish_is_a_doubt(outbox, server, clock, tried, decision):
    """Nobody knows whether the transaction has committed: nobody but a person decides."""
    message_id = send(outbox)
    if tried:
        server.on("RCPT", reply="450 4.2.0 greylisted", times=1)
        drain(outbox)
    code = (
        "import os, sys, transaction\n"
        "from cpsmailaccess_delivery import Outbox\n"
        "from cpsmailaccess_delivery.outgoing import Removals\n"
        "Removals.publish = lambda self, removals: os._exit(9)\n"
        "outbox = Outbox(sys.argv[1])\n"
        "outbox.delivery.cancel(sys.argv[2])\n"
        "transaction.commit()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, outbox.location, message_id], timeout=60, check=False
    )
    assert done.returncode == 9
    clock.ahead = 2 * 3600.0
    assert drain(outbox).accepted == 0
    status = outbox.status(message_id)
    assert status.state is State.HELD
    assert status.reason.startswith("in doubt")
    (record,) = getattr(outbox.queue, decision)(message_id)
    assert record.entry.attempts == tried
    assert drain(outbox).accepted == (decision == "release")
    assert list(outbox.spool.scan()) == []


def test_a_veto_leaves_no_trace_of_a_cancel(outbox, server):
    """Whatever is known of a mail, in its name and beside it, is what it was."""
    server.on("RCPT", reply="450 4.2.0 greylisted", match="bob@", times=1)
    message_id = send(outbox, to=(BOB, "carol@x.org"))
    drain(outbox)
    untried = send(outbox)
    held = send(outbox)
    outbox.queue.hold(held, "a person wants to look")
    before = [outbox.spool.load(entry) for entry in outbox.spool.scan()]
    sides = {p.name: p.read_bytes() for p in Path(outbox.location, "outcomes").iterdir()}
    for name in (message_id, untried, held):
        outbox.delivery.cancel(name)
    seen: list[State] = []
    look = Last(lambda: seen.extend(e.state for e in outbox.spool.scan()), fail="tpc_vote")
    transaction.get().join(look)
    with pytest.raises(RuntimeError, match="veto"):
        transaction.commit()
    transaction.abort()
    assert seen == [State.HELD] * 3
    assert [outbox.spool.load(entry) for entry in outbox.spool.scan()] == before
    after = {p.name: p.read_bytes() for p in Path(outbox.location, "outcomes").iterdir()}
    assert after == sides


def test_a_cancelled_mail_that_cannot_be_removed_is_not_sent(outbox, monkeypatch, caplog):
    message_id = send(outbox)
    outbox.delivery.cancel(message_id)

    def fail(self: Any, entry: Entry, *_: Any, **__: Any) -> None:
        raise SpoolError("read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Mails, "cancel", fail)
        transaction.commit()
    assert "cancelled, but only held" in caplog.text
    assert not outbox.spool.leased(next(outbox.spool.scan()))
    assert drain(outbox).accepted == 0
    assert outbox.status(message_id).state is State.HELD


# Once


def keys(outbox: Outbox) -> list[str]:
    """What is left of keys on disk."""
    found = [path.name for path in Path(outbox.location, "keys").iterdir()]
    found += [path.name for path in Path(outbox.location, "tmp").iterdir()]
    return [name for name in found if not name.startswith(".")]


def test_the_same_key_commits_once(outbox, server):
    first = send(outbox, idempotency_key="invoice 1")
    assert send(outbox, idempotency_key="invoice 1") == first
    other = send(outbox, idempotency_key="invoice 2")
    assert drain(outbox).accepted == 2
    assert send(outbox, idempotency_key="invoice 1") == first
    assert drain(outbox).accepted == 0
    assert [mail.message_id for mail in server.mails] == [first, other]
    with Outbox(outbox.location) as again:
        assert send(again, idempotency_key="invoice 1") == first


def test_twice_in_one_transaction(outbox):
    with transaction.manager:
        first = outbox.delivery.send(ALICE, [BOB], MESSAGE, idempotency_key="k")
        assert outbox.delivery.send(ALICE, [BOB], MESSAGE, idempotency_key="k") == first
    assert len(mails_on_disk(outbox)) == 1


@pytest.mark.parametrize("way", ["abort", "savepoint", "veto", "cancel"])
def test_what_was_not_committed_frees_its_key(outbox, way):
    savepoint = transaction.savepoint()
    first = outbox.delivery.send(ALICE, [BOB], MESSAGE, idempotency_key="k")
    if way == "savepoint":
        savepoint.rollback()
    elif way == "cancel":
        outbox.delivery.cancel(first)
    else:
        if way == "veto":
            transaction.get().join(Last(lambda: None, fail="tpc_vote"))
            with pytest.raises(RuntimeError, match="veto"):
                transaction.commit()
        transaction.abort()
        assert keys(outbox) == []
    second = outbox.delivery.send(ALICE, [BOB], MESSAGE, idempotency_key="k")
    transaction.commit()
    assert second != first
    assert outbox.status(second).state is State.QUEUED
    assert len(mails_on_disk(outbox)) == 1
    assert len(keys(outbox)) == 1


def test_undone_and_sent_again(outbox, server):
    first = send(outbox, idempotency_key="draft", undo=60)
    with transaction.manager:
        outbox.delivery.cancel(first)
    second = send(outbox, idempotency_key="draft")
    assert drain(outbox).accepted == 1
    assert [mail.message_id for mail in server.mails] == [second]


def test_the_later_of_two_transactions_begins_again(outbox):
    managers = TransactionManager(), TransactionManager()
    deliveries = [MailboxDelivery(outbox.spool, outbox.accounts, each) for each in managers]
    ids = [each.send(ALICE, [BOB], MESSAGE, idempotency_key="k") for each in deliveries]
    managers[1].commit()
    with pytest.raises(TransientError, match="send returns its Message-Id"):
        managers[0].commit()
    managers[0].abort()
    assert deliveries[0].send(ALICE, [BOB], MESSAGE, idempotency_key="k") == ids[1]
    managers[0].commit()
    assert len(mails_on_disk(outbox)) == 1


RACE = """
import sys, transaction
from cpsmailaccess_delivery import Outbox
outbox = Outbox(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(30):
    for attempt in transaction.manager.attempts(100):
        with attempt:
            message_id = outbox.delivery.send(
                "alice@example.org", ["bob@example.net"], "Subject: x\\n\\nx\\n",
                idempotency_key=f"k{number}")
    print(message_id)
"""


def test_two_processes_commit_the_same_keys(outbox):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, outbox.location],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    told = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert told[0] == told[1]
    records = [outbox.spool.load(entry) for entry in outbox.spool.scan()]
    assert sorted(record.envelope.message_id for record in records) == sorted(told[0])
    assert len(records) == 30


CRASH = """
import os, sys, transaction
from cpsmailaccess_delivery import Outbox
from cpsmailaccess_delivery.spool import staging
from cpsmailaccess_delivery.spool.keys import Keys
die = lambda *args, **kwargs: os._exit(9)
if sys.argv[2] == "prepared":
    staging.Staging.publish = die
elif sys.argv[2] == "confirmed":
    staging.Staging.move_to_new = die
else:
    take = Keys.take
    Keys.take = lambda *args, **kwargs: (take(*args, **kwargs), die())
outbox = Outbox(sys.argv[1])
outbox.delivery.send(
    "alice@example.org", ["bob@example.net"], "Subject: x\\n\\nx\\n", idempotency_key="k")
transaction.commit()
"""


def crash(outbox: Outbox, where: str) -> None:
    command = [sys.executable, "-c", CRASH, outbox.location, where]
    done = subprocess.run(command, timeout=60, check=False)
    assert done.returncode == 9


@pytest.mark.parametrize("where", ["prepared", "confirmed"])
@pytest.mark.parametrize("committed", [False, True])
def test_key_and_mail_are_in_doubt_together(outbox, server, where, committed):
    crash(outbox, where)
    if not committed:
        drain(outbox)  # sweeps
    message_id = send(outbox, idempotency_key="k")
    if committed:
        drain(outbox)
    status = outbox.status(message_id)
    assert status.state is State.HELD
    assert "in doubt" in status.reason
    if committed:
        outbox.queue.release(message_id)
        assert drain(outbox).accepted == 1
        assert send(outbox, idempotency_key="k") == message_id
        assert drain(outbox).accepted == 0
    else:
        outbox.queue.cancel(message_id)
        again = send(outbox, idempotency_key="k")
        assert again != message_id
        assert drain(outbox).accepted == 1
        assert [mail.message_id for mail in server.mails] == [again]
    assert len(keys(outbox)) == 1


def test_a_key_that_cannot_be_swept_is_not_taken_twice(outbox, monkeypatch):
    """Its process is dead, and the sweep fails: the next one may know better."""
    crash(outbox, "key taken")
    monkeypatch.setattr(outbox.spool._keys, "_sweep", lambda: None)
    with pytest.raises(TransientError, match="another transaction"):
        send(outbox, idempotency_key="k")
    transaction.abort()
    assert list(outbox.spool.scan()) == []


KILLED_CANCEL = """
import os, sys
from cpsmailaccess_delivery import Outbox
from cpsmailaccess_delivery.spool.keys import Keys
Keys.free = lambda *args: os._exit(9)
outbox = Outbox(sys.argv[1])
outbox.queue.cancel(sys.argv[2])
"""


def test_a_cancel_that_is_killed_frees_its_key(outbox, server):
    """The mail is gone: the next sweep knows from what is left of it whose key to free."""
    first = send(outbox, idempotency_key="k")
    command = [sys.executable, "-c", KILLED_CANCEL, outbox.location, first]
    assert subprocess.run(command, timeout=60, check=False).returncode == 9
    assert list(outbox.spool.scan()) == []
    assert outbox.spool.key_holder("k") == first
    outbox.spool.sweep()
    assert keys(outbox) == []
    second = send(outbox, idempotency_key="k")
    assert second != first
    assert drain(outbox).accepted == 1
    assert [mail.message_id for mail in server.mails] == [second]


@pytest.mark.parametrize("look", ["send", "sweep", "commit"])
def test_a_key_of_a_mail_that_cannot_be_committed_is_free(outbox, monkeypatch, look):
    crash(outbox, "key taken")
    assert len(keys(outbox)) == 3
    if look == "sweep":
        outbox.spool.sweep()
        assert keys(outbox) == []
    elif look == "commit":
        monkeypatch.setattr(outbox.spool, "key_holder", lambda key: None)
    message_id = send(outbox, idempotency_key="k")
    assert drain(outbox).accepted == 1
    assert outbox.status(message_id).state is State.ACCEPTED
    assert len(keys(outbox)) == 1


def test_old_keys_are_forgotten(outbox):
    directory = Path(outbox.location, "keys")
    old = send(outbox, idempotency_key="old")
    (path,) = (path for path in directory.iterdir() if path.name != ".pruned")
    os.utime(path, (1.0, time.time() - 31 * 86400))
    send(outbox, idempotency_key="later", not_before=time.time() + 86400)
    outbox.spool.sweep()
    assert len(keys(outbox)) == 1
    assert send(outbox, idempotency_key="old") != old
    os.utime(path, (1.0, time.time() - 31 * 86400))
    outbox.spool.sweep()  # once a day
    assert len(keys(outbox)) == 2
    os.utime(directory / ".pruned", (1.0, time.time() - 86401))
    outbox.spool.sweep()
    assert len(keys(outbox)) == 1


def test_keys_are_kept_for_a_month_and_while_they_are_pending(outbox):
    directory = Path(outbox.location, "keys")
    kept = send(outbox, idempotency_key="kept")
    (path,) = (path for path in directory.iterdir() if path.name != ".pruned")
    os.utime(path, (1.0, time.time() - 29 * 86400))
    envelope = Envelope(ALICE, (BOB,), Route(ALICE, "127.0.0.1", 25), "1@x", key="pending")
    pending = outbox.spool.stage(envelope, b"")
    outbox.spool.prepare([pending])
    (path,) = (p for p in directory.iterdir() if p.stat().st_nlink == 2)
    os.utime(path, (1.0, time.time() - 31 * 86400))  # as a clock that was set might leave it
    outbox.spool.sweep()
    assert path.exists()
    outbox.spool.discard([pending])
    assert not path.exists()
    assert send(outbox, idempotency_key="kept") == kept


def test_a_key_is_as_private_as_a_mail(outbox):
    send(outbox, idempotency_key="../../etc/passwd")
    (name,) = keys(outbox)
    assert Path(outbox.location, "keys", name).stat().st_mode & 0o777 == 0o600
    assert len(name) == 32


# What makes no sense


@pytest.mark.parametrize(
    "wish",
    [
        {"not_before": "tomorrow"},
        {"not_before": datetime(2100, 1, 1)},
        {"not_before": -1},
        {"not_before": True},
        {"not_before": float("nan")},
        {"not_before": 1e12},
        {"undo": -1},
        {"undo": "5"},
        {"undo": float("inf")},
        {"expires": 1.0},
        {"expires": 4e9, "not_before": 4e9},
        {"expires": time.time() + 3600, "undo": 7200},
        {"priority": "urgent"},
        {"priority": 10},
        {"priority": -1},
        {"priority": 5.0},
        {"priority": True},
        {"idempotency_key": ""},
        {"idempotency_key": "a\nX-Zope-Port: 1"},
        {"idempotency_key": " a"},
        {"idempotency_key": "k" * 201},
        {"idempotency_key": "\ud800"},
        {"idempotency_key": b"k"},
        {"idempotency_key": 7},
        {"notify": ""},
        {"notify": []},
        {"notify": "never,failure"},
        {"notify": ["failure", "sometimes"]},
        {"notify": ["failure", 7]},
        {"notify": "failure NOTIFY=NEVER"},
        {"notify": b"never"},
        {"notify": 7},
        {"ret": ""},
        {"ret": "hdrs"},
        {"ret": "full ENVID=x"},
        {"ret": b"full"},
    ],
)
def test_what_makes_no_sense_is_refused(outbox, wish):
    with pytest.raises(InvalidOption, match=next(iter(wish))):
        send(outbox, **wish)
    assert list(outbox.spool.scan()) == []


@pytest.mark.parametrize(
    ("notify", "kept"),
    [
        ("never", "never"),
        (["NEVER"], "never"),
        ("failure", "failure"),
        ("delay, success", "success,delay"),
        (("delay", "success", "failure", "delay"), "success,failure,delay"),
        ({"failure", "delay"}, "failure,delay"),
    ],
)
def test_of_what_the_sender_is_told(outbox, notify, kept):
    send(outbox, notify=notify, ret="full")
    (record,) = outbox.queue.records()
    assert (record.envelope.notify, record.envelope.ret) == (kept, "full")


def test_nothing_of_it_is_on_the_wire(outbox, server):
    send(outbox, expires=time.time() + 60, priority=9)
    assert drain(outbox).accepted == 1
    assert b"X-Zope" not in server.mails[0].data
