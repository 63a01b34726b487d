"""The whole path on real files and real servers: what is committed arrives, once."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import transaction

from cpsmailaccess_delivery import (
    Account,
    Outbox,
    State,
    connections,
    lanes,
    recorder,
    sessions,
    terms,
)
from cpsmailaccess_delivery import outbox as outbox_module
from cpsmailaccess_delivery import processor as processor_module
from cpsmailaccess_delivery import recorder as recorder_module
from cpsmailaccess_delivery import scheduler as scheduler_module
from cpsmailaccess_delivery.agenda import Agenda
from cpsmailaccess_delivery.errors import NoSuchEntry, SpoolError
from cpsmailaccess_delivery.interfaces import LaneNote
from cpsmailaccess_delivery.journal import Event
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.scheduler import Scheduler
from cpsmailaccess_delivery.smtp import mails
from cpsmailaccess_delivery.spool.maildir import Maildir
from cpsmailaccess_delivery.spool.mails import Mails
from cpsmailaccess_delivery.testing import ServerThread, SMTPServer

DEADLINE = 20.0
SOON = Schedule(first=0.01, jitter=0.0)
NEVER = Schedule(first=3600.0)
MESSAGE = b"From: alice@example.org\r\nSubject: hello\r\n\r\nhello\r\n"


@pytest.fixture
def server():
    with SMTPServer() as server:
        yield server


@pytest.fixture
def outbox(tmp_path):
    with Outbox(tmp_path / "outbox", helo_name="client.example.org", schedule=NEVER) as outbox:
        yield outbox


def put(outbox, server, mailbox="alice@example.org", **settings):
    settings = {"security": "plain", "connect_timeout": 10, "command_timeout": 10, **settings}
    with transaction.manager:
        outbox.accounts.put(
            Account(mailbox=mailbox, host=server.host, port=server.port, **settings)
        )


def send(outbox, sender="alice@example.org", to=("bob@example.net",), message=MESSAGE, **extra):
    with transaction.manager:
        return outbox.delivery.send(sender, list(to), message, **extra)


def wait_for(predicate):
    """Wait for something that no event announces."""
    deadline = time.monotonic() + DEADLINE
    while not predicate():
        assert time.monotonic() < deadline, "the deadline has passed"
        threading.Event().wait(0.01)


@pytest.fixture
def running(outbox):
    processor = outbox.processor()
    processor.start()
    yield processor
    assert processor.stop(timeout=DEADLINE)


def test_two_mailboxes_leave_through_their_own_relays(outbox, server):
    with SMTPServer() as other:
        put(outbox, server)
        put(outbox, other, "@example.com")
        first = send(outbox)
        second = send(outbox, "carol@example.com")
        summary = outbox.processor().run(forever=False)
    assert (summary.accepted, summary.waiting) == (2, 0)
    assert [mail.message_id for mail in server.mails] == [first]
    assert [mail.message_id for mail in other.mails] == [second]
    for message_id in (first, second):
        status = outbox.status(message_id)
        assert status.state == "accepted"
        assert status.recipients["bob@example.net"].state == "accepted"
        assert "250" in str(status)
    assert list(outbox.spool.scan()) == []


def test_nothing_private_is_on_the_wire(outbox, server):
    put(outbox, server)
    body = MESSAGE.replace(b"Subject", b"X-Zope-Hostname: evil.example\r\nBcc: d@x.org\r\nSubject")
    send(outbox, message=body)
    outbox.processor().run(forever=False)
    (mail,) = server.mails
    assert b"Bcc" not in mail.data
    assert b"X-Zope-Mailbox" not in mail.data
    assert b"X-Zope-Hostname: evil.example" in mail.data  # the sender's own, opaque
    assert mail.recipients == ("bob@example.net",)


def test_a_commit_wakes_the_processor_and_an_abort_does_not(outbox, server, running):
    put(outbox, server)
    aborted = outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
    transaction.abort()
    committed = send(outbox)
    server.wait_for(1, DEADLINE)
    assert [mail.message_id for mail in server.mails] == [committed]
    with pytest.raises(NoSuchEntry):
        outbox.status(aborted)


def test_a_commit_of_another_process_wakes_the_processor(outbox, server, running, tmp_path):
    put(outbox, server)
    code = (
        "import sys, transaction\n"
        "from cpsmailaccess_delivery import Outbox\n"
        "with Outbox(sys.argv[1]) as outbox, transaction.manager:\n"
        "    outbox.delivery.send('alice@example.org', ['bob@example.net'], 'Subject: x\\n\\nx')\n"
    )
    subprocess.run([sys.executable, "-c", code, outbox.location], check=True, timeout=DEADLINE)
    server.wait_for(1, DEADLINE)


def test_what_was_settled_is_synced_before_a_run_ends(outbox, server, monkeypatch):
    put(outbox, server)
    send(outbox)
    order = []
    spool = outbox.spool
    remove, sync = spool._mails.remove, spool.sync
    monkeypatch.setattr(
        spool._mails, "remove", lambda *args, **kw: (order.append("remove"), remove(*args, **kw))
    )
    monkeypatch.setattr(spool, "sync", lambda: (order.append("sync"), sync()))
    monkeypatch.setattr(recorder_module, "_SYNC_SOON", 3600.0)
    outbox.processor().run(forever=False)
    assert order == ["remove", "sync"]


def test_a_sync_that_fails_is_tried_again_without_another_mail(outbox, server, monkeypatch):
    real, calls, done = outbox.spool.sync, [], threading.Event()

    def sync():
        calls.append(1)
        if len(calls) == 1:
            raise SpoolError("the disk reports an error")
        real()
        done.set()

    monkeypatch.setattr(outbox.spool, "sync", sync)
    put(outbox, server)
    processor = outbox.processor()
    processor.start()
    try:
        send(outbox)
        assert done.wait(DEADLINE)
    finally:
        assert processor.stop()
    assert server.mails


def test_only_the_deferred_are_tried_again(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="450 4.2.0 greylisted", match="bob@", times=1)
    server.on("RCPT", reply="550 5.1.1 no such user", match="eve@")
    message_id = send(outbox, to=["bob@x.org", "carol@x.org", "eve@x.org"])
    assert outbox.processor().run(forever=False).deferred == 1
    states = {r: o.state for r, o in outbox.status(message_id).recipients.items()}
    assert states == {"bob@x.org": "deferred", "carol@x.org": "accepted", "eve@x.org": "refused"}
    assert outbox.processor().run(forever=False).waiting == 1  # not due yet
    outbox.queue.retry(message_id)
    outbox.processor().run(forever=False)
    assert Counter(r for mail in server.mails if mail.sender for r in mail.recipients) == {
        "carol@x.org": 1,
        "bob@x.org": 1,
    }
    status = outbox.status(message_id)
    assert status.state == "refused"
    assert status.recipients["eve@x.org"].reply.startswith("550")
    assert status.recipients["bob@x.org"].state == "accepted"


def test_recipients_over_the_limit_of_a_relay_follow_at_once(outbox, server):
    put(outbox, server)
    people = [f"bob{number}@x.org" for number in range(10)]
    for sent in range(2):  # it takes four at a time
        for person in people[4 * sent + 4 :]:
            server.on("RCPT", reply="452 4.5.3 too many recipients", match=person, times=1)
    message_id = send(outbox, to=people)
    summary = outbox.processor().run(forever=False)
    assert [len(mail.recipients) for mail in server.mails] == [4, 4, 2]
    assert (summary.accepted, summary.deferred, summary.waiting) == (1, 0, 0)
    status = outbox.status(message_id)
    assert {r: o.state for r, o in status.recipients.items()} == dict.fromkeys(people, "accepted")


def test_a_deferred_mail_is_tried_again_by_itself(tmp_path, server):
    server.on("MAIL", reply="451 4.3.0 later", times=2)
    with Outbox(tmp_path / "outbox", schedule=SOON) as outbox:
        put(outbox, server)
        message_id = send(outbox)
        processor = outbox.processor()
        processor.start()
        server.wait_for(1, DEADLINE)
        wait_for(lambda: outbox.status(message_id).state == State.ACCEPTED)
        assert processor.stop(timeout=DEADLINE)


def test_unclear_is_tried_once_more_and_then_held(outbox, server):
    put(outbox, server)
    server.on("TAKEN", drop=True, times=2)
    message_id = send(outbox)
    assert outbox.processor().run(forever=False).unclear == 1
    assert outbox.status(message_id).state == "unclear"
    (entry,) = outbox.spool.scan()
    assert entry.due  # it will be tried again
    outbox.queue.retry(message_id)
    outbox.processor().run(forever=False)
    (entry,) = outbox.spool.scan()
    assert (entry.state, entry.due, entry.attempts) == ("unclear", 0.0, 2)
    assert {mail.message_id for mail in server.mails} == {message_id}
    assert outbox.processor().run(forever=False).accepted == 0  # held for a person
    outbox.queue.retry(message_id)
    assert outbox.processor().run(forever=False).accepted == 1


def test_a_bad_password_keeps_the_mail_and_a_new_one_sends_it(tmp_path, outbox):
    with SMTPServer(users={"alice": "right"}) as server:
        put(outbox, server, username="alice", password="wrong")
        processor = outbox.processor()
        processor.start()
        message_id = send(outbox)
        wait_for(lambda: outbox.status(message_id).state == State.DEFERRED)
        status = outbox.status(message_id)
        assert "535" in status.reason
        assert status.next_try > time.time()
        assert outbox.processor().run(forever=False).waiting == 1
        assert len(server.logins) == 1  # nobody is locked out by our retries
        put(outbox, server, username="alice", password="right")
        server.wait_for(1, DEADLINE)
        wait_for(lambda: outbox.status(message_id).state == State.ACCEPTED)
        assert processor.stop(timeout=DEADLINE)
        assert server.mails[0].username == "alice"


def test_a_bad_password_is_tried_by_one_session_alone(outbox, running):
    with SMTPServer(users={"alice": "right"}, latency=0.02) as server:
        put(outbox, server, username="alice", password="wrong", connections=5)
        with transaction.manager:
            for _ in range(60):
                outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
        wait_for(outbox.spool.lane_notes)
        wait_for(lambda: not server.open_sessions)
        assert len(server.logins) == 1
        put(outbox, server, username="alice", password="right", connections=5)
        server.wait_for(60, DEADLINE)
        assert 2 < server.sessions <= 6  # the others follow the first that gets through


def test_a_dead_relay_is_probed_once_and_delays_nobody_else(outbox, server):
    put(outbox, server)
    with SMTPServer() as dead:
        put(outbox, dead, "@dead.example")
    lost = [send(outbox, f"a{n}@dead.example") for n in range(5)]
    sent = send(outbox)
    summary = outbox.processor().run(forever=False)
    assert (summary.accepted, summary.waiting) == (1, 5)
    assert outbox.status(sent).state == "accepted"
    for message_id in lost:
        status = outbox.status(message_id)
        assert status.state == "deferred"
        assert "Nothing listens" in status.reason
        assert status.attempts == 0


def test_an_account_that_is_gone_keeps_the_mail(outbox, server):
    put(outbox, server)
    put(outbox, server, "*")
    message_id = send(outbox)
    with transaction.manager:
        outbox.accounts.delete("alice@example.org")
    assert outbox.processor().run(forever=False).waiting == 1
    assert [mail for mail in server.mails if mail.sender] == []  # never through the default one
    assert "alice@example.org" in outbox.status(message_id).reason
    put(outbox, server)
    assert outbox.processor().run(forever=False).accepted == 1


def test_credentials_go_only_to_the_relay_of_the_account(outbox):
    with SMTPServer(users={"alice": "pw"}) as mine, SMTPServer(users={"alice": "pw"}) as evil:
        put(outbox, mine, username="alice", password="pw")
        send(outbox)
        (path,) = (Path(outbox.location) / "new").iterdir()
        path.write_bytes(
            path.read_bytes().replace(
                f"X-Zope-Port: {mine.port}".encode(), f"X-Zope-Port: {evil.port}".encode()
            )
        )
        outbox.processor().run(forever=False)
        assert len(mine.mails) == 1
        assert evil.sessions == 0


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
def test_a_relay_by_its_ipv6_address(outbox):
    with SMTPServer(host="::1") as server:
        put(outbox, server)
        by_account = send(outbox)
        by_relay = send(outbox, hostname="::1", port=server.port)
        assert outbox.processor().run(forever=False).accepted == 2
    assert {mail.message_id for mail in server.mails} == {by_account, by_relay}


def test_a_host_with_several_addresses_of_which_one_answers(outbox, server, monkeypatch):
    async def getaddrinfo(loop, host, port, **kwargs):
        assert host == "relay.example"
        stream = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [
            (socket.AF_INET, *stream, ("127.0.0.9", port)),  # nobody listens there
            (socket.AF_INET, *stream, (server.host, port)),
        ]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    with transaction.manager:
        outbox.accounts.put(
            Account(mailbox="*", host="relay.example", port=server.port, security="plain")
        )
    send(outbox)
    assert outbox.processor().run(forever=False).accepted == 1


def test_a_relay_without_login(outbox, server):
    message_id = send(outbox, hostname=server.host, port=server.port)
    outbox.processor().run(forever=False)
    assert server.mails[0].username is None
    assert outbox.status(message_id).state == "accepted"


def test_many_mails_by_two_processors_once_each(outbox, server, tmp_path):
    put(outbox, server)
    with transaction.manager:
        sent = {
            outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
            for _ in range(300)
        }
    with Outbox(outbox.location) as second:
        processors = [outbox.processor(), second.processor()]
        for processor in processors:
            processor.start()
        server.wait_for(300, DEADLINE)
        for processor in processors:
            assert processor.stop(timeout=DEADLINE)
    assert Counter(mail.message_id for mail in server.mails) == dict.fromkeys(sent, 1)
    assert list(outbox.spool.scan()) == []


def test_sessions_are_reused_and_end_after_their_mails(outbox, server):
    put(outbox, server, connections=1, mails_per_session=10)
    with transaction.manager:
        for _ in range(30):
            outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
    assert outbox.processor().run(forever=False).accepted == 30
    assert server.sessions == 3


def test_stop_hands_back_what_a_silent_relay_has(outbox, server):
    put(outbox, server)
    server.on("RCPT", silence=True)
    processor = outbox.processor()
    processor.start()
    message_id = send(outbox)
    server.wait_until(lambda: any(c.line.startswith("RCPT") for c in server.commands), DEADLINE)
    assert processor.stop(timeout=DEADLINE)
    (entry,) = outbox.spool.scan()
    assert (entry.state, entry.attempts) == ("queued", 0)
    assert not outbox.spool.leased(entry)
    assert outbox.status(message_id).state == "queued"


def test_stop_finishes_what_is_past_the_end_of_data(outbox, server):
    put(outbox, server)
    server.on("TAKEN", delay=0.3)
    processor = outbox.processor()
    processor.start()
    message_id = send(outbox)
    server.wait_for(1, DEADLINE)
    assert processor.stop(timeout=DEADLINE)
    assert outbox.status(message_id).state == "accepted"


def test_a_processor_killed_with_a_lease_leaves_the_mail_to_others(outbox, server):
    put(outbox, server)
    server.on("RCPT", silence=True, times=1)
    message_id = send(outbox)
    code = (
        "import sys\nfrom cpsmailaccess_delivery import Outbox\n"
        "Outbox(sys.argv[1]).processor().run(forever=False)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, outbox.location])
    server.wait_until(lambda: any(c.line.startswith("RCPT") for c in server.commands), DEADLINE)
    second = outbox.processor()
    second.start()  # finds it leased
    process.kill()
    process.wait(DEADLINE)
    server.wait_for(1, DEADLINE)
    wait_for(lambda: outbox.status(message_id).state == State.ACCEPTED)
    assert second.stop(timeout=DEADLINE)


def test_a_lease_given_back_at_the_wrong_moment_is_not_the_end(outbox, server, monkeypatch):
    put(outbox, server)
    send(outbox)
    (entry,) = outbox.spool.scan()
    leases = [outbox.spool.claim(entry)]  # another processor's
    claim = Maildir.claim

    def claim_just_before_it_is_free(spool, entry):
        lease = claim(spool, entry)
        while leases:
            leases.pop().release()
        return lease

    monkeypatch.setattr(Maildir, "claim", claim_just_before_it_is_free)
    assert outbox.processor().run(forever=False).accepted == 1


@pytest.mark.parametrize("silent", ["RCPT", "TAKEN"])
def test_an_account_that_leaves_a_silent_relay_leaves_at_once(outbox, running, silent):
    with SMTPServer(extensions=("PIPELINING",)) as server, SMTPServer() as other:
        server.on(silent, silence=True)
        put(outbox, server, command_timeout=300)
        first = send(outbox)
        if silent == "TAKEN":  # past the end of data: nobody knows, and it stays there
            server.wait_for(1, DEADLINE)
        else:
            asked = lambda: any(c.line.startswith("RCPT") for c in server.commands)  # noqa: E731
            server.wait_until(asked, DEADLINE)
        second = send(outbox)
        put(outbox, other)
        expected = {second} if silent == "TAKEN" else {first, second}
        late = other.wait_for(len(expected), DEADLINE)
        assert {mail.message_id for mail in late} == expected


def test_files_of_zope_sendmail_go_through_the_default_account(outbox, server):
    put(outbox, server, "*")
    (Path(outbox.location) / "new" / "1234.567.host.89").write_bytes(
        b"X-Zope-From: a@example.org\nX-Zope-To: b@example.net\n"
        b"Message-Id: <old@example.org>\nSubject: old\n\nold\n"
    )
    outbox.processor().run(forever=False)
    (mail,) = server.mails
    assert (mail.sender, mail.recipients) == ("a@example.org", ("b@example.net",))
    assert mail.data.startswith(b"Message-Id: <old@example.org>\r\n")
    assert outbox.status("old@example.org").state == "accepted"


def test_a_file_that_is_no_mail_is_set_aside(outbox, server):
    put(outbox, server)
    (Path(outbox.location) / "new" / "1234.junk").write_bytes(b"hello\n")
    message_id = send(outbox)
    summary = outbox.processor().run(forever=False)
    assert (summary.accepted, summary.held) == (1, 1)
    assert outbox.status(message_id).state == "accepted"
    (entry,) = outbox.spool.scan()
    assert entry.state == "held"


def test_a_file_that_is_no_mail_can_be_cancelled(outbox):
    (Path(outbox.location) / "new" / "1234.junk").write_bytes(b"hello\n")
    outbox.processor().run(forever=False)
    assert outbox.queue.cancel("1234.junk")[0].reason
    assert list(outbox.spool.scan()) == []


def test_each_mail_is_told_in_the_log(outbox, server, caplog):
    put(outbox, server)
    caplog.set_level("INFO", "cpsmailaccess_delivery")
    message_id = send(outbox)
    outbox.processor().run(forever=False)
    assert any(
        message_id in line and "bob@example.net accepted" in line for line in caplog.messages
    )


def test_a_relay_that_hangs_up_on_one_mail_gets_the_others_later(outbox, server):
    put(outbox, server, connections=1)
    server.on("MAIL", drop=True, match="poison@")
    bad = send(outbox, "poison@x.org", mailbox="alice@example.org")
    good = [send(outbox) for _ in range(3)]
    outbox.processor().run(forever=False)
    assert outbox.status(bad).attempts == 1
    assert outbox.status(bad).next_try > time.time()
    outbox.processor().run(forever=False)
    assert {outbox.status(message_id).state for message_id in good} == {"accepted"}
    assert outbox.status(bad).state == "deferred"


def test_a_mail_that_we_cannot_put_into_smtp_is_held_alone(outbox, server, monkeypatch):
    put(outbox, server, connections=1)
    real = mails.prepare

    def prepare(mail, relay):
        if b"poison" in mail.message:
            raise ZeroDivisionError("a bug")
        return real(mail, relay)

    monkeypatch.setattr(mails, "prepare", prepare)
    bad = send(outbox, message=MESSAGE + b"poison\r\n")
    good = [send(outbox) for _ in range(3)]
    summary = outbox.processor().run(forever=False)
    assert (summary.accepted, summary.held) == (3, 1)
    assert outbox.status(bad).state == "held"
    assert "a bug" in outbox.status(bad).reason
    assert {outbox.status(message_id).state for message_id in good} == {"accepted"}


def test_a_hostile_header_for_a_seven_bit_relay(outbox):
    with SMTPServer(extensions=()) as server:
        put(outbox, server)
        hostile = b"Subject: x\r\nCc: " + b"(" * 5000 + "\u00e9".encode() + b"\r\n\r\nx\r\n"
        bad, good = send(outbox, message=hostile), send(outbox)
        outbox.processor().run(forever=False)
        assert outbox.status(bad).state == "refused"
        assert outbox.status(good).state == "accepted"


def test_login_wanted_for_one_recipient_sends_the_others_one_copy(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="530 5.7.0 authentication required", match="eve@")
    message_id = send(outbox, to=["bob@x.org", "eve@x.org"])
    for _ in range(3):
        outbox.processor().run(forever=False)
    assert [mail.recipients for mail in server.mails] == [("bob@x.org",)]
    states = {r: str(o.state) for r, o in outbox.status(message_id).recipients.items()}
    assert states == {"bob@x.org": "accepted", "eve@x.org": "deferred"}


def test_one_refusal_over_many_mails_is_one_failure(outbox, server):
    put(outbox, server)
    server.on("MAIL", reply="530 5.7.0 authentication required")
    with transaction.manager:
        for _ in range(20):
            outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
    assert outbox.processor().run(forever=False).waiting == 20
    (note,) = outbox.spool.lane_notes().values()
    assert note.failures == 1


def test_a_broken_account_stops_nobody_else(outbox, server):
    put(outbox, server)
    put(outbox, server, "@broken.example")
    lost, sent = send(outbox, "a@broken.example"), send(outbox)
    (path,) = (
        path
        for path in Path(outbox.location, "accounts").iterdir()
        if b"@broken.example" in path.read_bytes()
    )
    path.write_bytes(b"{")
    summary = outbox.processor().run(forever=False)
    assert (summary.accepted, summary.waiting) == (1, 1)
    assert outbox.status(sent).state == "accepted"
    assert outbox.status(lost).state == "deferred"


def test_the_note_of_a_lane_ends_with_its_trouble(outbox):
    with SMTPServer(users={"alice": "right"}) as server:
        put(outbox, server, username="alice", password="wrong")
        send(outbox)
        outbox.processor().run(forever=False)
        assert outbox.spool.lane_notes()
        put(outbox, server, username="alice", password="right")
        assert outbox.processor().run(forever=False).accepted == 1
        assert outbox.spool.lane_notes() == {}


def test_a_person_may_end_the_wait_of_a_lane(outbox):
    with SMTPServer(users={"alice": "pw"}) as server:
        server.on("AUTH", reply="535 5.7.8 not now", times=1)
        put(outbox, server, username="alice", password="pw")
        processor = outbox.processor()
        processor.start()
        message_id = send(outbox)
        wait_for(lambda: outbox.spool.lane_notes())
        for key in outbox.spool.lane_notes():
            outbox.spool.note_lane(key, None)
        send(outbox)
        server.wait_for(2, DEADLINE)
        wait_for(lambda: outbox.status(message_id).state == State.ACCEPTED)
        assert processor.stop(timeout=DEADLINE)


def test_a_secret_that_appears_is_used_by_the_next_drain(outbox, monkeypatch):
    with SMTPServer(users={"alice": "pw"}) as server:
        put(outbox, server, username="alice", password_from="env:CPSMAIL_TEST_SECRET")
        message_id = send(outbox)
        assert outbox.processor().run(forever=False).waiting == 1
        assert "CPSMAIL_TEST_SECRET" in outbox.status(message_id).reason
        monkeypatch.setenv("CPSMAIL_TEST_SECRET", "pw")
        assert outbox.processor().run(forever=False).accepted == 1


def test_a_secret_that_appears_is_found_by_the_next_probe(tmp_path):
    """Nothing else comes in that would wake the lane."""
    path = tmp_path / "password"
    with (
        SMTPServer(users={"alice": "pw"}) as server,
        Outbox(tmp_path / "outbox", schedule=SOON) as outbox,
    ):
        put(outbox, server, username="alice", password_from=f"file:{path}")
        message_id = send(outbox)
        processor = outbox.processor()
        processor.start()
        wait_for(lambda: any(note.failures > 1 for note in outbox.spool.lane_notes().values()))
        path.write_text("pw")
        path.chmod(0o600)
        server.wait_for(1, DEADLINE)
        wait_for(lambda: outbox.status(message_id).state == State.ACCEPTED)
        assert processor.stop(timeout=DEADLINE)


def test_a_deferred_mail_is_counted_once(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="450 4.2.0 later")
    send(outbox)
    summary = outbox.processor().run(forever=False)
    assert (summary.deferred, summary.waiting) == (1, 0)


def test_a_limit_wakes_its_lane_once(outbox, server, monkeypatch):
    put(outbox, server, mails_per_minute=60, connections=3)
    with transaction.manager:
        for _ in range(40):
            outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
    asked = []
    real = Agenda.add
    monkeypatch.setattr(Agenda, "add", lambda self, *args: (asked.append(args), real(self, *args)))
    processor = outbox.processor()
    processor.start()
    server.wait_for(12, DEADLINE)
    assert processor.stop(timeout=DEADLINE)
    assert len(asked) < 10


def test_removals_are_made_durable_while_it_runs(outbox, server, monkeypatch, running):
    synced = threading.Event()
    real = outbox.spool.sync
    monkeypatch.setattr(outbox.spool, "sync", lambda: (real(), synced.set()))
    put(outbox, server)
    send(outbox)
    server.wait_for(1, DEADLINE)
    assert synced.wait(DEADLINE)


def test_a_processor_that_fails_begins_again(outbox, server, monkeypatch):
    monkeypatch.setattr(processor_module, "_RESTART", 0.01)
    real, failures = Scheduler.start, []

    def start(scheduler):
        if len(failures) < 2:
            failures.append(1)
            raise OSError("the disk is away")
        real(scheduler)

    monkeypatch.setattr(Scheduler, "start", start)
    put(outbox, server)
    send(outbox)
    processor = outbox.processor()
    processor.start()
    server.wait_for(1, DEADLINE)
    assert processor.stop(timeout=DEADLINE)
    assert len(failures) == 2


def test_an_interpreter_that_ends_records_what_the_relay_took(outbox, server):
    put(outbox, server)
    server.on("TAKEN", delay=0.5)
    message_id = send(outbox)
    code = (
        "import sys\nfrom cpsmailaccess_delivery import Outbox\n"
        "Outbox(sys.argv[1]).processor().start()\ninput()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, outbox.location], stdin=subprocess.PIPE)
    server.wait_for(1, DEADLINE)
    process.communicate(b"\n", timeout=DEADLINE)  # the main thread ends, not by a signal
    assert list(outbox.spool.scan()) == []
    assert outbox.status(message_id).state == "accepted"


def test_a_relay_that_greets_and_hangs_up_is_not_asked_at_once_again(outbox, server):
    put(outbox, server)
    server.on("EHLO", reply=b"250 relay.test\r\n421 4.3.2 closing\r\n")
    message_id = send(outbox)
    assert outbox.processor().run(forever=False).waiting == 1
    assert server.sessions <= 2
    assert outbox.status(message_id).state == "deferred"


def test_closing_the_outbox_ends_a_run_in_another_thread(outbox, server):
    put(outbox, server)
    server.on("TAKEN", delay=0.5, times=1)
    message_id = send(outbox)
    thread = threading.Thread(target=outbox.processor().run, args=(False,))
    thread.start()
    server.wait_for(1, DEADLINE)
    outbox.close()
    thread.join(DEADLINE)
    with Outbox(outbox.location) as again:
        assert again.processor().run(forever=False).accepted == 0
        assert again.status(message_id).state == "accepted"
    assert len(server.mails) == 1


def test_waiting_lanes_get_the_connections_of_silent_relays(tmp_path, server, monkeypatch):
    monkeypatch.setattr(connections, "_PATIENCE", 0.2)
    monkeypatch.setattr(connections, "_RELIEF", 0.05)
    with (
        ServerThread() as thread,
        Outbox(tmp_path / "outbox", schedule=NEVER, max_sessions=3) as outbox,
    ):
        silent = [SMTPServer(thread=thread) for _ in range(6)]
        for number, relay in enumerate(silent):
            relay.start()
            relay.on("GREETING", silence=True)
            put(outbox, relay, f"@silent{number}.example", command_timeout=60)
            send(outbox, f"a@silent{number}.example")
        put(outbox, server)
        send(outbox)
        processor = outbox.processor()
        processor.start()
        server.wait_for(1, DEADLINE)
        assert processor.stop(timeout=DEADLINE)
        for relay in silent:
            relay.stop()


def test_idle_sessions_make_room_for_waiting_lanes(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "_IDLE", 1000)
    with (
        ServerThread() as thread,
        Outbox(tmp_path / "outbox", schedule=NEVER, max_sessions=1) as outbox,
    ):
        relays = [SMTPServer(thread=thread) for _ in range(5)]
        processor = outbox.processor()
        processor.start()
        for number, relay in enumerate(relays):
            relay.start()
            put(outbox, relay, f"@relay{number}.example")
            send(outbox, f"a@relay{number}.example")
        for relay in relays:
            relay.wait_for(1, DEADLINE)
        assert processor.stop(timeout=DEADLINE)
        for relay in relays:
            relay.stop()


def test_many_lanes_without_a_secret_leave_their_connections(tmp_path, server):
    with Outbox(tmp_path / "outbox", schedule=NEVER, max_sessions=1) as outbox:
        with transaction.manager:
            for number in range(300):
                mailbox = f"a{number}@lost.example"
                outbox.accounts.put(
                    Account(
                        mailbox=mailbox,
                        host=server.host,
                        port=server.port,
                        security="plain",
                        username="a",
                        password_from="env:CPSMAIL_NOT_SET",
                    )
                )
                outbox.delivery.send(mailbox, ["bob@example.net"], MESSAGE)
        put(outbox, server)
        send(outbox)
        summary = outbox.processor().run(forever=False)
        assert (summary.accepted, summary.waiting) == (1, 300)


def test_a_mail_that_vanishes_in_flight_is_settled(outbox, server):
    put(outbox, server)
    server.on("TAKEN", delay=0.5)
    send(outbox)
    processor = outbox.processor()
    processor.start()
    server.wait_for(1, DEADLINE)
    for path in Path(outbox.location, "new").iterdir():
        path.unlink()
    assert processor.stop(timeout=DEADLINE)
    assert processor.summary.accepted == 1


@pytest.mark.parametrize("note", ['{"until": null}', "[]", "{", '{"until": "soon"}'])
def test_a_damaged_lane_note_stops_nobody(outbox, server, note):
    put(outbox, server)
    message_id = send(outbox)
    (entry,) = outbox.spool.scan()
    directory = Path(outbox.location, "lanes")
    directory.mkdir(exist_ok=True)
    (directory / entry.lane).write_text(note)
    assert outbox.processor().run(forever=False).accepted == 1
    assert outbox.status(message_id).state == "accepted"


def test_a_lane_note_that_is_a_pipe_stops_nobody(outbox, server):
    put(outbox, server)
    send(outbox)
    (entry,) = outbox.spool.scan()
    directory = Path(outbox.location, "lanes")
    directory.mkdir(exist_ok=True)
    os.mkfifo(directory / entry.lane)
    assert outbox.processor().run(forever=False).accepted == 1


def test_files_that_are_no_mails_and_a_huge_one_stop_nobody(outbox, server):
    put(outbox, server)
    new = Path(outbox.location, "new")
    with open(new / "0000.huge", "wb") as stream:
        stream.truncate(1 << 40)
    (new / "0001.link").symlink_to("/etc/passwd")
    send(outbox)
    summary = outbox.processor().run(forever=False)
    assert (summary.accepted, summary.held) == (1, 2)


def test_a_removed_presence_file_loses_no_committed_mail(outbox, server):
    put(outbox, server)
    for path in Path(outbox.location, "presence").iterdir():
        path.unlink()
    with Outbox(outbox.location) as other:
        outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
        other.spool.sweep()
        transaction.commit()
        assert other.processor().run(forever=False).accepted == 1
        outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
        for path in Path(outbox.location, "tmp").iterdir():
            path.unlink()  # somebody tidies too much
        with pytest.raises(SpoolError, match="removed"):
            transaction.commit()
        transaction.abort()


def test_a_clock_that_is_put_back_does_not_stop_a_lane(outbox, server):
    put(outbox, server)
    message_id = send(outbox)
    (entry,) = outbox.spool.scan()
    year = 365 * 86400
    note = LaneNote("alice@example.org", "relay", "down", time.time(), time.time() + year)
    version = outbox.vault.version("alice@example.org")
    outbox.spool.note_lane(entry.lane, replace(note, version=version))
    processor = outbox.processor()
    processor.start()
    server.wait_for(1, DEADLINE)
    assert processor.stop(timeout=DEADLINE)
    assert outbox.status(message_id).state == "accepted"


def test_after_an_unclear_mail_one_at_a_time(outbox, server):
    put(outbox, server, connections=1)
    server.mails_per_session = 1
    rule = server.on("TAKEN", drop=True, after=2)
    with transaction.manager:
        for _ in range(30):
            outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
    first = outbox.processor().run(forever=False)
    server.forget(rule)
    assert first.unclear <= 8 + 3
    for _ in range(12):
        outbox.processor().run(forever=False)
    assert sum(entry.state == "queued" for entry in outbox.spool.scan()) == 0


def test_a_full_disk_stops_sending_until_there_is_room(outbox, server, monkeypatch):
    monkeypatch.setattr(recorder, "_UNSETTLED", 0.2)
    put(outbox, server)
    full = threading.Event()
    full.set()
    real = Mails.remove

    def remove(self, entry, *, has_side):
        if full.is_set():
            raise SpoolError("no space left on device")
        real(self, entry, has_side=has_side)

    monkeypatch.setattr(Mails, "remove", remove)
    with transaction.manager:
        for _ in range(200):
            outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
    processor = outbox.processor()
    processor.start()
    server.wait_for(8, DEADLINE)
    wait_for(lambda: len(server.mails) >= 8)
    assert len(server.mails) < 100
    full.clear()
    server.wait_for(200, DEADLINE)
    wait_for(lambda: not list(outbox.spool.scan()))
    assert processor.stop(timeout=DEADLINE)
    assert len(server.mails) == 200  # each once


def test_what_is_recorded_at_the_very_end_is_no_fault(outbox, server, monkeypatch, caplog):
    """The disk has room again when the processor stops: its last records ask for a sync."""
    monkeypatch.setattr(recorder, "_UNSETTLED", 3600.0)
    monkeypatch.setattr(recorder, "_SYNC_SOON", 0.0)
    put(outbox, server)
    full = threading.Event()
    full.set()
    remove, flush = Mails.remove, recorder.Recorder.flush

    def removed(self, entry, *, has_side):
        if full.is_set():
            raise SpoolError("no space left on device")
        remove(self, entry, has_side=has_side)

    def flushed(self):
        full.clear()
        flush(self)

    monkeypatch.setattr(Mails, "remove", removed)
    monkeypatch.setattr(recorder.Recorder, "flush", flushed)
    send(outbox)
    processor = outbox.processor()
    processor.start()
    server.wait_for(1, DEADLINE)
    assert processor.stop(timeout=DEADLINE)
    assert list(outbox.spool.scan()) == []
    assert "in the delivery loop" not in caplog.text


def test_a_lane_that_is_made_while_stopping_sends_nothing(outbox, server):
    put(outbox, server)
    server.on("TAKEN", delay=1.0, times=1)
    with SMTPServer() as late:
        put(outbox, late, "@late.example")
        processor = outbox.processor()
        processor.start()
        send(outbox)
        server.wait_for(1, DEADLINE)
        stopper = threading.Thread(target=processor.stop)
        stopper.start()
        wait_for(processor._stopped.is_set)
        send(outbox, "a@late.example")
        stopper.join(DEADLINE)
        assert not processor.is_alive()
        assert late.sessions == 0


def test_a_lane_that_waits_for_its_limit_gives_its_connection_to_others(tmp_path, server):
    with (
        SMTPServer() as other,
        Outbox(tmp_path / "outbox", schedule=NEVER, max_sessions=1) as outbox,
    ):
        put(outbox, server, mails_per_minute=6)  # one at once, then one in ten seconds
        put(outbox, other, "@other.example")
        processor = outbox.processor()
        processor.start()
        with transaction.manager:
            for _ in range(20):
                outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
        server.wait_for(1, DEADLINE)
        send(outbox, "a@other.example")
        other.wait_for(1, DEADLINE)
        assert len(server.mails) < 20
        assert processor.stop(timeout=DEADLINE)


def test_another_account_does_not_end_the_wait_for_a_refused_login(outbox):
    with SMTPServer(users={"alice": "right"}) as server:
        put(outbox, server, username="alice", password="wrong")
        send(outbox)
        outbox.processor().run(forever=False)
        processor = outbox.processor()
        processor.start()
        send(outbox)  # its lane is known now
        put(outbox, server, "@other.example", username="alice", password="right")
        send(outbox, "a@other.example")
        server.wait_for(1, DEADLINE)
        assert processor.stop(timeout=DEADLINE)
        assert [login.accepted for login in server.logins].count(False) == 1


def test_a_signal_that_stops_may_come_while_it_is_stopped(outbox):
    """Twice SIGTERM, say: the second handler runs in the thread of the first, in its midst."""
    processor = outbox.processor()

    def stop_in_the_midst() -> None:
        with processor._lock:
            processor.stop(0)

    thread = threading.Thread(target=stop_in_the_midst, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_a_stop_during_the_look_up_of_our_name_is_heard(outbox, server, monkeypatch):
    put(outbox, server)
    send(outbox)
    asked, go_on = threading.Event(), threading.Event()

    def own_host_name():
        asked.set()
        assert go_on.wait(DEADLINE)
        return "client.example.org"

    monkeypatch.setattr(processor_module, "own_host_name", own_host_name)
    processor = outbox.processor()
    processor._helo_name = None
    thread = threading.Thread(target=processor.run, args=(False,))
    thread.start()
    assert asked.wait(DEADLINE)
    stopper = threading.Thread(target=processor.stop)
    stopper.start()
    wait_for(processor._stopped.is_set)
    go_on.set()
    stopper.join(DEADLINE)
    thread.join(DEADLINE)
    assert server.sessions == 0


def test_mails_per_minute(outbox, server):
    put(outbox, server, mails_per_minute=60)  # ten at once, then one a second
    with transaction.manager:
        for _ in range(11):
            outbox.delivery.send("alice@example.org", ["bob@example.net"], MESSAGE)
    outbox.processor().run(forever=False)
    at = sorted(mail.at for mail in server.mails)
    assert len(at) == 11
    assert at[10] - at[0] > 0.5  # not asserted from above: machines may be slow


def test_a_mail_that_we_fail_to_claim_is_held(outbox, server, monkeypatch):
    def claim(entry):
        raise MemoryError("too much")

    put(outbox, server)
    message_id = send(outbox)
    monkeypatch.setattr(outbox.spool, "claim", claim)
    assert outbox.processor().run(forever=False).held == 1
    status = outbox.status(message_id)
    assert (status.state, status.reason) == (
        "held",
        "a fault in the processor: MemoryError: too much",
    )


def test_what_the_spool_has_lost_is_looked_for_in_the_journal_alone(outbox, monkeypatch):
    looked = []
    find = outbox.spool.find

    def settle_elsewhere(seconds):
        outbox.journal.record(
            Event(time.time(), "accepted", "", "1@x", recipient="bob@example.net", attempt=2)
        )

    monkeypatch.setattr(outbox.spool, "find", lambda name: looked.append(name) or find(name))
    monkeypatch.setattr(outbox_module, "time", SimpleNamespace(sleep=settle_elsewhere))
    status = outbox.status("<1@x>")
    assert (status.state, status.attempts) == ("accepted", 2)
    assert looked == ["1@x"]


STAGE = """
import sys, transaction
from cpsmailaccess_delivery import Outbox
with Outbox(sys.argv[1]) as outbox:
    outbox.delivery.send("alice@example.org", ["bob@example.net"], "Subject: x\\n\\nx")
    print("staged", flush=True)
    sys.stdin.read()
"""


def test_what_dies_while_a_processor_runs_is_swept(outbox, server, monkeypatch, caplog):
    monkeypatch.setattr(scheduler_module, "_SWEEP_EVERY", 0.02)
    put(outbox, server)
    processor = outbox.processor()
    processor.start()
    with subprocess.Popen(
        [sys.executable, "-c", STAGE, outbox.location],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout.readline() == "staged\n"
        swept = threading.Event()
        sweep = outbox.spool.sweep
        monkeypatch.setattr(outbox.spool, "sweep", lambda: (sweep(), swept.set())[0])
        assert swept.wait(DEADLINE)
        assert len(os.listdir(Path(outbox.location, "tmp"))) == 1  # of the living
        child.kill()
    wait_for(lambda: not os.listdir(Path(outbox.location, "tmp")))
    wait_for(lambda: "1 uncommitted mail removed, 0 in doubt" in caplog.text)
    assert processor.stop(timeout=DEADLINE)


def test_what_could_not_be_published_is_published_late(outbox, server, monkeypatch):
    monkeypatch.setattr(scheduler_module, "_SWEEP_EVERY", 0.02)
    put(outbox, server)
    processor = outbox.processor()
    processor.start()
    real = os.rename

    def rename(old, new, **kw):
        monkeypatch.setattr(os, "rename", real)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", rename)
    message_id = send(outbox)
    server.wait_for(1, DEADLINE)
    assert [mail.message_id for mail in server.mails] == [message_id]
    assert processor.stop(timeout=DEADLINE)


@pytest.mark.parametrize(("part", "where"), [(lanes.Lane, "work"), (terms.Terms, "load")])
def test_a_fault_in_one_lane_is_no_other_lanes(outbox, server, monkeypatch, part, where):
    """Also where it holds a connection of the common limit: it is given back."""
    right = getattr(part, where)

    def wrong(self):
        if self.route.mailbox.startswith("bad"):
            raise RuntimeError("a fault of ours")
        return right(self)

    monkeypatch.setattr(part, where, wrong)
    boxes = ["bad1@example.org", "bad2@example.org", "good1@example.org", "good2@example.org"]
    for box in boxes:
        put(outbox, server, mailbox=box)
    ids = {box: send(outbox, box) for box in boxes}
    outbox._max_sessions = 1
    done = outbox.processor().run(forever=False)
    assert (done.accepted, done.waiting) == (2, 2)
    assert set(done.reasons) == set(boxes[:2])
    assert "RuntimeError: a fault of ours" in outbox.status(ids[boxes[0]]).reason
    assert outbox.status(ids[boxes[2]]).state is State.ACCEPTED
