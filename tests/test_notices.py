"""Who is told what became of a mail: real files, real servers, a clock that is ahead."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import transaction

from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery import notice_queue as queue_module
from cpsmailaccess_delivery import recorder as recorder_module
from cpsmailaccess_delivery.errors import SpoolError
from cpsmailaccess_delivery.processor import QueueProcessorThread
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.testing import SMTPServer

NEVER = Schedule(first=3600.0, jitter=0.0)
HOUR = 3600.0
DAY = 24 * HOUR
ALICE = "alice@example.org"
MESSAGE = b"From: alice@example.org\r\nSubject: hello\r\n\r\nhello\r\n"


@pytest.fixture
def server():
    with SMTPServer() as server:
        yield server


@pytest.fixture
def outbox(tmp_path):
    with Outbox(tmp_path / "outbox", schedule=NEVER) as outbox:
        yield outbox


def put(outbox, server, mailbox=ALICE, **settings):
    settings = {"security": "plain", **settings}
    with transaction.manager:
        outbox.accounts.put(
            Account(mailbox=mailbox, host=server.host, port=server.port, **settings)
        )


def put_dead(outbox, mailbox=ALICE):
    with SMTPServer() as dead:
        put(outbox, dead, mailbox)


def send(outbox, sender=ALICE, to=("bob@example.net",), **extra):
    with transaction.manager:
        return outbox.delivery.send(sender, list(to), MESSAGE, **extra)


def drain(outbox, ahead=0.0):
    """Deliver once, as a processor whose clock is some seconds ahead; a restart, each time."""
    processor = QueueProcessorThread(
        outbox.spool,
        outbox.vault,
        outbox.journal,
        schedule=NEVER,
        helo_name="client.example.org",
        clock=lambda: time.time() + ahead,
    )
    return processor.run(forever=False)


def notices(server):
    """Return the notices that arrived, each parsed; asserts how they came."""
    found = [mail for mail in server.mails if not mail.sender]
    assert {mail.recipients for mail in found} <= {(ALICE,)}
    return [email.message_from_bytes(mail.data) for mail in found]


def fields(notice):
    """Return the groups of the delivery status but the first, which is of the whole mail."""
    return notice.get_payload()[1].get_payload()[1:]


def test_the_sender_of_a_refused_mail_is_told(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user", match="bob@")
    message_id = send(outbox)
    summary = drain(outbox)
    assert (summary.refused, summary.accepted) == (1, 1)
    (notice,) = notices(server)
    assert notice["To"] == f"<{ALICE}>"
    assert notice["References"] == f"<{message_id}>"
    (bob,) = fields(notice)
    assert bob["Final-Recipient"] == "rfc822; bob@example.net"
    assert (bob["Action"], bob["Status"]) == ("failed", "5.1.1")
    assert bob["Diagnostic-Code"] == "smtp; 550 5.1.1 no such user"
    assert f"Message-Id: <{message_id}>" in notice.get_payload()[2].get_payload()
    assert outbox.status(message_id).state == "refused"
    drain(outbox, DAY)
    assert len(notices(server)) == 1


def test_the_refused_are_told_once_while_others_are_tried_again(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="450 4.2.0 greylisted", match="bob@", times=1)
    server.on("RCPT", reply="550 5.1.1 no such user", match="eve@")
    send(outbox, to=["bob@x.org", "carol@x.org", "eve@x.org"])
    drain(outbox)
    drain(outbox, 2 * HOUR)
    (notice,) = notices(server)
    assert [group["Final-Recipient"] for group in fields(notice)] == ["rfc822; eve@x.org"]
    assert sorted(r for m in server.mails if m.sender for r in m.recipients) == [
        "bob@x.org", "carol@x.org",
    ]  # fmt: skip


def test_a_null_sender_is_never_told(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user")
    send(outbox, "", mailbox=ALICE)
    assert drain(outbox).refused == 1
    assert list(outbox.spool.scan()) == []


@pytest.mark.parametrize("phase", ["MAIL", "RCPT"])
def test_a_notice_that_is_refused_is_the_end(outbox, server, caplog, phase):
    """Nobody can be told; journal and log say it, and it leaves the queue."""
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user", match="bob@")
    server.on(phase, reply="550 5.7.1 no notices", match={"MAIL": "<>", "RCPT": "alice@"}[phase])
    message_id = send(outbox)
    assert drain(outbox).refused == 2
    assert [entry.state for entry in outbox.spool.scan()] == ["refused"]
    assert outbox.status(message_id).state == "refused"
    refused, removed = outbox.journal.events(address=ALICE)[-2:]
    assert (refused.kind, removed.kind) == ("refused", "removed")
    assert removed.recipient == ALICE
    assert removed.message_id == refused.message_id != message_id
    assert outbox.status(removed.message_id).state == "refused"
    assert any(r.levelname == "WARNING" and removed.entry in r.getMessage() for r in caplog.records)
    assert os.listdir(f"{outbox.location}/outcomes") == [entry.id for entry in outbox.spool.scan()]


def test_a_notice_that_only_waits_stays(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user", match="bob@")
    server.on("RCPT", reply="450 4.2.0 greylisted", match="alice@")
    send(outbox)
    drain(outbox)
    assert sorted(entry.state for entry in outbox.spool.scan()) == ["deferred", "refused"]


def test_a_refused_mail_is_kept_for_thirty_days(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user", match="bob@")
    old, waiting = send(outbox), send(outbox, to=["carol@x.org"])
    outbox.queue.hold(waiting, "a person wants to look")
    drain(outbox)
    drain(outbox, 29 * DAY)
    assert outbox.status(old).state == "refused"
    drain(outbox, 31 * DAY)
    assert [entry.state for entry in outbox.spool.scan()] == ["held"]
    removed = outbox.journal.events(message_id=old)[-1]
    assert (removed.kind, removed.reply) == ("removed", "refused 30 days ago")
    assert outbox.status(old).state == "refused"
    outbox.spool.sync()
    assert len(os.listdir(f"{outbox.location}/outcomes")) == 1


def test_of_those_who_are_kept_none_is_opened(outbox, server, monkeypatch):
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user", match="bob@")
    for _ in range(3):
        send(outbox)
    drain(outbox)
    monkeypatch.setattr(outbox.spool, "claim", lambda entry: 1 / 0)
    drain(outbox, 29 * DAY)
    assert len(list(outbox.spool.scan())) == 3


def test_the_thirty_days_begin_with_the_refusal(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user", match="bob@")
    send(outbox)
    drain(outbox)
    (entry,) = (e for e in outbox.spool.scan() if e.state == "refused")
    side = f"{outbox.location}/outcomes/{entry.id}"
    os.utime(side, (0, time.time() + 10 * DAY))  # tried again by a person, ten days later
    drain(outbox, 39 * DAY)
    assert list(outbox.spool.scan()) == [entry]
    drain(outbox, 41 * DAY)
    assert list(outbox.spool.scan()) == []


def test_given_up_is_said(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="450 4.2.0 greylisted", match="bob@")
    message_id = send(outbox)
    for attempt in range(5):
        drain(outbox, 6 * DAY + attempt * DAY)
    assert outbox.status(message_id).state == "refused"
    failed = [n for n in notices(server) if fields(n)[0]["Action"] == "failed"]
    (bob,) = fields(failed[0])
    assert len(failed) == 1
    assert (bob["Status"], bob["Diagnostic-Code"]) == ("5.4.7", "smtp; 450 4.2.0 greylisted")
    assert "given up after 5 attempts" in failed[0].get_payload()[0].get_payload()


def test_a_delay_is_told_once_whatever_restarts(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="450 4.2.0 greylisted", match="bob@")
    send(outbox)
    drain(outbox)
    drain(outbox, 2 * HOUR)
    assert notices(server) == []
    outbox.journal.close()  # no journal is needed to know it
    for ahead in (5 * HOUR, 12 * HOUR, 30 * HOUR):
        drain(outbox, ahead)
    (notice,) = notices(server)
    (bob,) = fields(notice)
    assert (bob["Action"], bob["Status"]) == ("delayed", "4.2.0")
    assert bob["Will-Retry-Until"]


def test_mail_that_waits_for_its_relay_is_told_and_given_up(outbox, server):
    put_dead(outbox)
    put(outbox, server, "*")
    message_id = send(outbox)
    drain(outbox)
    assert notices(server) == []
    drain(outbox, 5 * HOUR)
    drain(outbox, 9 * HOUR)
    (notice,) = notices(server)  # through the default account
    assert fields(notice)[0]["Action"] == "delayed"
    assert "Nothing listens" in notice.get_payload()[0].get_payload()
    assert outbox.status(message_id).state == "deferred"
    for day in (6, 7, 8):
        drain(outbox, day * DAY)
    _, failed = [each for each in notices(server) if each.is_multipart()]
    assert (fields(failed)[0]["Action"], fields(failed)[0]["Status"]) == ("failed", "5.4.7")
    assert "given up after" in failed.get_payload()[0].get_payload()
    assert outbox.status(message_id).state == "refused"


def test_mail_whose_delay_was_told_leaves_when_its_account_is_mended(outbox, server):
    put_dead(outbox)
    message_id = send(outbox)
    drain(outbox, 5 * HOUR)
    put(outbox, server)
    drain(outbox, 5 * HOUR)
    assert outbox.status(message_id).state == "accepted"


def test_many_mails_wait_for_a_dead_relay(outbox, server):
    put_dead(outbox)
    put(outbox, server, "*")
    with transaction.manager:
        for _ in range(350):
            outbox.delivery.send(ALICE, ["bob@example.net"], MESSAGE)
    drain(outbox, 5 * HOUR)
    assert len(notices(server)) == 350
    assert drain(outbox, 9 * HOUR).waiting == 350
    assert len(notices(server)) == 350


@pytest.mark.parametrize(("last", "left"), [("Staging.publish", 1), ("Lease.settle", 2)])
def test_a_crash_beside_the_notice_loses_and_doubles_none(outbox, server, last, left):
    """Before it is visible: it is made again, and waits for no person.  After: it is found."""
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user", match="bob@")
    rule = server.on("MAIL", reply="451 4.3.0 later", match="<>")  # not before the crash
    message_id = send(outbox)
    code = (
        "import os, sys\n"
        "from cpsmailaccess_delivery import Outbox\n"
        "from cpsmailaccess_delivery.spool.lease import Lease\n"
        "from cpsmailaccess_delivery.spool.staging import Staging\n"
        f"{last} = lambda self, what: os._exit(9)\n"
        "Outbox(sys.argv[1]).processor().run(forever=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, outbox.location], timeout=30)
    assert done.returncode == 9
    assert [entry.state for entry in outbox.spool.scan()] == ["queued"] * left
    server.forget(rule)
    drain(outbox)
    assert len(notices(server)) == 1
    assert outbox.status(message_id).state == "refused"


def test_a_notice_that_cannot_be_written_is_written_later(outbox, server, monkeypatch):
    monkeypatch.setattr(recorder_module, "_UNSETTLED", 0.01)
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user", match="bob@")
    message_id = send(outbox)
    real, failures = outbox.spool.prepare, []

    def prepare(entries, **how):
        if entries and len(failures) < 3:
            assert outbox.status(message_id).state == "queued"
            failures.append(1)
            raise SpoolError("no space left on device")
        real(entries, **how)

    monkeypatch.setattr(outbox.spool, "prepare", prepare)
    assert drain(outbox).refused == 1
    assert len(failures) == 3
    assert len(notices(server)) == 1
    assert outbox.status(message_id).state == "refused"


def test_a_notice_that_we_cannot_make_stops_nothing(outbox, server, monkeypatch):
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user", match="bob@")
    monkeypatch.setattr("cpsmailaccess_delivery.notices.compose", lambda *args, **kw: 1 / 0)
    message_id = send(outbox)
    assert drain(outbox).refused == 1
    assert outbox.status(message_id).state == "refused"


def test_a_slow_journal_keeps_nobody_waiting_longer(outbox, server, monkeypatch):
    """Another process writes it: that is no large spool, for which notices make a pause."""
    clock = [0.0]
    flush = outbox.journal.flush
    people = [f"eve{number}@example.net" for number in range(20)]

    def slow_flush():
        clock[0] += 1000.0
        flush()

    monkeypatch.setattr(queue_module, "_BATCH", 5)
    monkeypatch.setattr(queue_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(outbox.journal, "flush", slow_flush)
    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 no such user", match="eve")
    with transaction.manager:
        for person in people:
            outbox.delivery.send(ALICE, [person], MESSAGE)
    processor = outbox.processor()
    processor.start()
    server.wait_for(len(people), 20.0)
    assert processor.stop(20.0)


def test_the_owner_of_a_mailbox_is_told_once_for_each_trouble(outbox, server):
    with SMTPServer(users={"alice": "right"}) as relay:
        put(outbox, relay, username="alice", password="wrong")
        put(outbox, server, "*")
        send(outbox)
        drain(outbox)
        (notice,) = notices(server)
        assert "535" in notice.get_payload()
        assert notice["Auto-Submitted"] == "auto-generated"
        (note,) = outbox.spool.lane_notes().values()
        assert note.told
        for day in (1, 2):
            drain(outbox, day * DAY)
        told = [n for n in notices(server) if not n.is_multipart()]
        assert len(told) == 1
        assert len(relay.logins) == 3
        put(outbox, relay, username="alice", password="right")
        assert drain(outbox).accepted == 1
        put(outbox, relay, username="alice", password="wrong")
        send(outbox)
        drain(outbox)
        assert len([n for n in notices(server) if not n.is_multipart()]) == 2


def test_the_owner_of_a_mailbox_is_told_of_a_relay_that_stays_away(outbox, server):
    put(outbox, server, "*")
    put_dead(outbox, ALICE)
    send(outbox)
    for hours in range(4):
        drain(outbox, hours * 3600.0)
    assert notices(server) == []
    for hours in range(5, 8):
        drain(outbox, hours * 3600.0)
    told = [n for n in notices(server) if not n.is_multipart()]
    assert len(told) == 1


@pytest.mark.parametrize("mailbox", ["@example.org", "*"])
def test_nobody_owns_a_domain(outbox, server, mailbox):
    put(outbox, server, "*")
    put_dead(outbox, mailbox)
    with SMTPServer(users={"alice": "right"}) as relay:
        put(outbox, relay, mailbox, username="alice", password="wrong")
        send(outbox)
        assert drain(outbox).waiting == 1
    assert notices(server) == []
