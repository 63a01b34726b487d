"""What is told through zope.event: after the fact, and at nobody's expense but the subscriber's."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
import zope.component
import zope.component.event
import zope.event
from zope.configuration import xmlconfig
from zope.interface.verify import verifyObject

from cpsmailaccess_delivery import Account, Outbox, State, events, interfaces
from cpsmailaccess_delivery.announcer import Announcer
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.testing import SMTPServer

DEADLINE = 20.0
ALICE, ANN, BEN = "alice@example.org", "ann@example.net", "ben@example.net"
MESSAGE = b"From: alice@example.org\r\nSubject: hello\r\n\r\nhello\r\n"
NEVER = Schedule(first=3600.0, jitter=0.0)
ONE = events.AccountPaused(1.0, ALICE, "relay:25", "why")


@pytest.fixture
def server() -> Iterator[SMTPServer]:
    with SMTPServer() as server:
        yield server


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox", helo_name="client.example.org", schedule=NEVER) as outbox:
        yield outbox


@pytest.fixture
def subscribe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Add a subscriber, for the time of a test."""
    subscribers: list[Any] = []
    monkeypatch.setattr(zope.event, "subscribers", subscribers)
    return subscribers.append


@pytest.fixture
def told(subscribe: Callable[[Any], None]) -> list[Any]:
    """What is told, in its order."""
    told: list[Any] = []
    subscribe(told.append)
    return told


def put(outbox: Outbox, server: SMTPServer, **settings: Any) -> None:
    account = Account(
        mailbox=ALICE, host=server.host, port=server.port, security="plain", **settings
    )
    with transaction.manager:
        outbox.accounts.put(account)


def send(outbox: Outbox, *to: str) -> str:
    with transaction.manager:
        return outbox.delivery.send(ALICE, list(to or (ANN,)), MESSAGE)


def drain(outbox: Outbox) -> Any:
    return outbox.processor().run(forever=False)


def wait_for(predicate: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not predicate():
        assert time.monotonic() < deadline, "the deadline has passed"
        threading.Event().wait(0.005)


def kinds(told: list[Any]) -> list[str]:
    return [type(event).__name__ for event in told]


@pytest.mark.parametrize(
    ("kind", "interface"),
    [
        (events.MailQueued, interfaces.IMailQueued),
        (events.MailAccepted, interfaces.IMailAccepted),
        (events.MailDeferred, interfaces.IMailDeferred),
        (events.MailRefused, interfaces.IMailRefused),
        (events.MailUnclear, interfaces.IMailUnclear),
    ],
)
def test_contracts_of_mails(kind: Any, interface: Any) -> None:
    event = kind(1.0, "id", "m@x", ALICE, ALICE, {})
    assert verifyObject(interface, event)
    assert not hasattr(event, "__dict__")


@pytest.mark.parametrize(
    ("kind", "interface"),
    [
        (events.AccountPaused, interfaces.IAccountPaused),
        (events.AccountResumed, interfaces.IAccountResumed),
    ],
)
def test_contracts_of_accounts(kind: Any, interface: Any) -> None:
    assert verifyObject(interface, kind(1.0, ALICE, "relay:25", "why"))


def test_queued_follows_the_transaction(outbox: Outbox, server: SMTPServer, told: list) -> None:
    put(outbox, server)
    outbox.delivery.send(ALICE, [ANN], MESSAGE)
    transaction.abort()
    point = transaction.savepoint()
    outbox.delivery.send(ALICE, [ANN], MESSAGE)
    point.rollback()
    message_id = outbox.delivery.send(ALICE, [ANN, BEN], MESSAGE)
    assert told == []
    transaction.commit()
    wait_for(lambda: told)
    (event,) = told
    assert interfaces.IMailQueued.providedBy(event)
    assert (event.message_id, event.mailbox, event.sender) == (message_id, ALICE, ALICE)
    assert {r: o.state for r, o in event.recipients.items()} == dict.fromkeys((ANN, BEN), "queued")
    assert event.id == next(outbox.spool.scan()).id


def test_each_outcome_is_told_when_it_is_recorded(
    outbox: Outbox, server: SMTPServer, subscribe: Callable[[Any], None], told: list
) -> None:
    seen: list[State] = []

    def look(event: Any) -> None:
        seen.extend(e.state for e in outbox.spool.scan() if e.id == event.id == told[0].id)

    put(outbox, server)
    server.on("RCPT", reply="550 5.1.1 nobody", match="eve@")
    grey = server.on("RCPT", reply="450 4.7.1 later", match=BEN)
    message_id = send(outbox, ANN, BEN, "eve@example.net")
    wait_for(lambda: told)
    subscribe(look)
    drain(outbox)
    mine = [event for event in told if event.message_id == message_id]  # not the notice
    assert kinds(mine) == ["MailQueued", "MailAccepted", "MailDeferred", "MailRefused"]
    outcomes = {type(e).__name__: {r: str(o) for r, o in e.recipients.items()} for e in mine[1:]}
    assert outcomes == {
        "MailAccepted": {ANN: outcomes["MailAccepted"][ANN]},
        "MailDeferred": {BEN: "deferred: 450 4.7.1 later"},
        "MailRefused": {"eve@example.net": "refused: 550 5.1.1 nobody"},
    }
    assert seen == [State.DEFERRED] * 3  # the spool says it already
    server.forget(grey)
    outbox.queue.retry(message_id)
    drain(outbox)
    (last,) = [e for e in told if e.message_id == message_id][4:]
    assert (type(last).__name__, list(last.recipients)) == ("MailAccepted", [BEN])


def test_unclear_and_settled(outbox: Outbox, server: SMTPServer, told: list) -> None:
    put(outbox, server)
    server.on("TAKEN", drop=True, times=1)
    message_id = send(outbox)
    drain(outbox)
    outbox.queue.settle(message_id, State.ACCEPTED)
    wait_for(lambda: "MailAccepted" in kinds(told))
    assert kinds(told) == ["MailQueued", "MailUnclear", "MailAccepted"]
    assert told[-1].recipients[ANN].reply.startswith("settled by hand")


def test_paused_and_resumed_once_for_each_trouble(tmp_path: Path, told: list) -> None:
    path = tmp_path / "outbox"
    with SMTPServer(users={"alice": "right"}) as server:
        for _ in range(2):  # also a restart is the same trouble
            with Outbox(path, schedule=Schedule(first=0.01, longest=0.02)) as outbox:
                if not told:
                    put(outbox, server, username="alice", password="wrong")
                    send(outbox)
                logins = len(server.logins)
                processor = outbox.processor()
                processor.start()
                wait_for(lambda: len(server.logins) >= logins + 3)  # noqa: B023
                assert processor.stop(timeout=DEADLINE)
        with Outbox(path, schedule=NEVER) as outbox:
            processor = outbox.processor()
            processor.start()
            soon = time.time() + 60.0
            wait_for(lambda: all(note.until > soon for note in outbox.spool.lane_notes().values()))
            put(outbox, server, username="alice", password="right")
            server.wait_for(1, DEADLINE)
            wait_for(lambda: "MailAccepted" in kinds(told))
            assert processor.stop(timeout=DEADLINE)
            journal = outbox.journal.events(address=ALICE)
    assert kinds(told) == ["MailQueued", "AccountPaused", "AccountResumed", "MailAccepted"]
    paused, resumed = told[1:3]
    assert (paused.mailbox, paused.relay) == (ALICE, f"127.0.0.1:{server.port}")
    assert "535" in paused.reason
    assert resumed.reason == "the account was changed"
    rows = [(e.kind, e.mailbox, e.reply) for e in journal if e.kind in ("paused", "resumed")]
    assert rows == [("paused", ALICE, paused.reason), ("resumed", ALICE, resumed.reason)]


def test_a_relay_that_is_down_pauses_at_the_second_refusal(
    outbox: Outbox, server: SMTPServer, told: list
) -> None:
    put(outbox, server)
    server.on("GREETING", reply="554 no service", times=2)
    message_id = send(outbox)
    drain(outbox)
    assert kinds(told) == ["MailQueued"]
    drain(outbox)
    drain(outbox)
    assert kinds(told) == ["MailQueued", "AccountPaused", "AccountResumed", "MailAccepted"]
    assert told[2].reason == "the relay works"
    assert outbox.status(message_id).state is State.ACCEPTED


def test_a_person_who_asks_for_a_try_resumes(
    outbox: Outbox, told: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpsmailaccess_delivery.lanes._LOOK", 0.05)
    with SMTPServer(users={"alice": "right"}) as server:
        server.on("AUTH", reply="535 5.7.8 not now", times=1)
        put(outbox, server, username="alice", password="right")
        message_id = send(outbox)
        processor = outbox.processor()
        processor.start()
        wait_for(lambda: "AccountPaused" in kinds(told))
        outbox.queue.retry(message_id)
        wait_for(lambda: "MailAccepted" in kinds(told))
        assert processor.stop(timeout=DEADLINE)
    assert kinds(told) == ["MailQueued", "AccountPaused", "AccountResumed", "MailAccepted"]
    assert told[2].reason == "a person asks for a try"


# Subscribers that misbehave


def test_one_that_raises_harms_nothing(
    outbox: Outbox,
    server: SMTPServer,
    subscribe: Callable[[Any], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[Any] = []

    def fail(event: Any) -> None:
        raise SystemExit("away with it all")

    subscribe(fail)
    subscribe(told.append)
    put(outbox, server)
    message_id = send(outbox)
    assert drain(outbox).accepted == 1
    assert kinds(told) == ["MailQueued", "MailAccepted"]
    assert outbox.status(message_id).state is State.ACCEPTED
    assert f"{told[0].id}: a subscriber failed on MailQueued" in caplog.text


def test_one_that_hangs_delays_no_mail(
    outbox: Outbox, server: SMTPServer, subscribe: Callable[[Any], None]
) -> None:
    go_on = threading.Event()
    subscribe(lambda event: go_on.wait(DEADLINE))
    put(outbox, server)
    try:
        processor = outbox.processor()
        processor.start()
        ids = [send(outbox) for _ in range(50)]
        server.wait_for(50, DEADLINE)
        wait_for(lambda: all(outbox.status(i).state is State.ACCEPTED for i in ids))
    finally:
        go_on.set()
    assert processor.stop(timeout=DEADLINE)


def test_what_one_has_not_committed_the_next_one_does_not(
    outbox: Outbox, server: SMTPServer, subscribe: Callable[[Any], None], told: list
) -> None:
    def half(event: Any) -> None:
        if isinstance(event, events.MailQueued) and ANN in event.recipients:
            outbox.delivery.send(ALICE, [BEN], MESSAGE)  # and no commit

    def whole(event: Any) -> None:
        transaction.commit()

    put(outbox, server)
    all_called: list[Any] = []
    for subscriber in (half, whole, all_called.append):
        subscribe(subscriber)
    send(outbox)
    wait_for(lambda: all_called)
    drain(outbox)
    assert [mail.recipients for mail in server.mails] == [(ANN,)]


def test_over_the_limit_events_are_dropped(
    subscribe: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    announcer = Announcer(limit=3)
    told: list[Any] = []
    begun, go_on = threading.Event(), threading.Event()

    def slow(event: Any) -> None:
        told.append(event)
        begun.set()
        go_on.wait(DEADLINE)

    subscribe(slow)
    announcer.announce(ONE)
    assert begun.wait(DEADLINE)
    for _ in range(5):
        announcer.announce(ONE)
    assert not announcer.flush(0.01)
    go_on.set()
    assert announcer.flush(DEADLINE)
    assert len(told) == 1 + 3
    assert "2 events were not told" in caplog.text
    announcer.close()
    announcer.close()


def test_without_subscribers_no_thread_and_no_event(
    outbox: Outbox, server: SMTPServer, subscribe: object
) -> None:
    before = set(threading.enumerate())
    put(outbox, server)
    send(outbox)
    drain(outbox)
    new = {thread.name for thread in threading.enumerate() if thread not in before}
    assert "cpsmail-events" not in new


def test_a_subscriber_may_close_the_outbox(
    outbox: Outbox, server: SMTPServer, subscribe: Callable[[Any], None]
) -> None:
    closed = threading.Event()

    def close(event: Any) -> None:
        outbox.close()
        closed.set()

    put(outbox, server)
    subscribe(close)
    send(outbox)
    assert closed.wait(DEADLINE)


def test_a_forked_child_tells_its_own(told: list) -> None:
    announcer = Announcer()
    announcer.announce(ONE)
    assert announcer.flush(DEADLINE)
    child = os.fork()
    if not child:
        told.clear()
        announcer.announce(ONE)
        os._exit(0 if announcer.flush(DEADLINE) and told == [ONE] else 1)
    assert os.waitpid(child, 0)[1] == 0
    announcer.close()


def test_announcing_is_cheap(told: list) -> None:
    """Under zope.component somebody always listens: a mail costs microseconds."""
    announcer = Announcer(limit=10**6)
    announcer.announce(ONE)
    begun = time.thread_time()
    for _ in range(10_000):
        announcer.announce(ONE)
    assert time.thread_time() - begun < 1.0  # generous: 100 us each
    announcer.close()


ZCML = """
<configure xmlns="http://namespaces.zope.org/zope">
  <include package="zope.component" file="meta.zcml" />
  <subscriber for="cpsmailaccess_delivery.interfaces.IMailRefused"
              handler="test_events.on_refused" />
</configure>
"""
refused: list[Any] = []


@zope.component.adapter(interfaces.IMailRefused)
def on_refused(event: Any) -> None:
    refused.append(event)


def test_zcml(outbox: Outbox, server: SMTPServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    xmlconfig.string(ZCML)
    try:
        put(outbox, server)
        server.on("RCPT", reply="550 5.1.1 nobody", match="eve@")
        message_id = send(outbox, ANN, "eve@example.net")
        drain(outbox)
    finally:
        zope.component.getGlobalSiteManager().unregisterHandler(on_refused)
    (event,) = refused
    assert (event.message_id, list(event.recipients)) == (message_id, ["eve@example.net"])
    assert caplog.text == ""
