"""Limits of relays: what is set, and what they teach; real servers, real sessions."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transaction

from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.limits import SessionLimit
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.testing import ServerThread, SMTPServer

DEADLINE = 20.0
MESSAGE = b"Subject: hello\r\n\r\nhello\r\n"
NEVER = Schedule(first=3600.0)


class MostOpen:
    """The most sessions that servers had at a time, as seen from outside."""

    def __init__(self, *servers: SMTPServer) -> None:
        self._servers = servers
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.most = 0

    def __enter__(self) -> MostOpen:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.most = max(self.most, sum(server.open_sessions for server in self._servers))


def wait_for(predicate: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not predicate():
        assert time.monotonic() < deadline, "the deadline has passed"
        threading.Event().wait(0.01)


def put(outbox: Outbox, server: SMTPServer, mailbox: str, **settings: object) -> None:
    with transaction.manager:
        outbox.accounts.put(
            Account(
                mailbox=mailbox, host=server.host, port=server.port, security="plain", **settings
            )
        )


def send(outbox: Outbox, mailbox: str, count: int) -> list[str]:
    with transaction.manager:
        return [outbox.delivery.send(mailbox, ["bob@x.org"], MESSAGE) for _ in range(count)]


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox", schedule=NEVER, connections_per_relay=3) as outbox:
        yield outbox


def test_connections_per_relay_over_all_accounts(outbox: Outbox) -> None:
    with SMTPServer(latency=0.005) as server, MostOpen(server) as seen:
        ids = []
        for number in range(12):
            put(outbox, server, f"box{number}@example.org", connections=5)
            ids += send(outbox, f"box{number}@example.org", 20)
        summary = outbox.processor().run(forever=False)
    assert (summary.accepted, summary.waiting) == (240, 0)
    assert 2 <= seen.most <= 3
    assert Counter(mail.message_id for mail in server.mails) == Counter(ids)


def test_another_relay_has_its_own(outbox: Outbox) -> None:
    with (
        ServerThread() as thread,
        SMTPServer(thread=thread) as stuck,
        SMTPServer(thread=thread) as good,
    ):
        rule = stuck.on("MAIL", silence=True)
        for number in range(5):
            put(outbox, stuck, f"stuck{number}@example.org")
            send(outbox, f"stuck{number}@example.org", 1)
        processor = outbox.processor()
        processor.start()
        stuck.wait_until(lambda: rule.hits == 3, DEADLINE)
        put(outbox, good, "good@example.org")
        send(outbox, "good@example.org", 30)
        good.wait_for(30, DEADLINE)
        assert stuck.open_sessions == 3
        assert processor.scheduler is not None
        assert processor.scheduler.lanes_waiting == 2
        stuck.forget(rule)
        assert processor.stop(timeout=0.1)


def test_an_idle_session_makes_room_for_who_waits(outbox: Outbox) -> None:
    """Else the second mail would wait until sessions are closed for being idle: 10 s."""
    with SMTPServer() as server:
        for number in range(4):
            put(outbox, server, f"box{number}@example.org")
        processor = outbox.processor()
        processor.start()
        begun = time.monotonic()
        for number in range(4):
            send(outbox, f"box{number}@example.org", 1)
            server.wait_for(number + 1, DEADLINE)
        assert time.monotonic() - begun < 5
        assert processor.stop(timeout=DEADLINE)


def test_a_lane_with_several_makes_room_for_one_with_none(outbox: Outbox) -> None:
    with SMTPServer(latency=0.02) as server:
        put(outbox, server, "many@example.org", connections=3, mails_per_session=10_000)
        put(outbox, server, "few@example.org")
        send(outbox, "many@example.org", 600)
        processor = outbox.processor()
        processor.start()
        server.wait_until(lambda: server.open_sessions == 3, DEADLINE)
        (wanted,) = send(outbox, "few@example.org", 1)
        server.wait_until(lambda: any(m.message_id == wanted for m in server.mails), DEADLINE)
        assert len(server.mails) < 601
        assert processor.stop(timeout=DEADLINE)


def test_lanes_of_a_relay_take_turns(tmp_path: Path) -> None:
    with (
        Outbox(tmp_path / "outbox", schedule=NEVER, connections_per_relay=1) as outbox,
        SMTPServer() as server,
    ):
        for mailbox, count in (("a@example.org", 60), ("b@example.org", 10), ("c@example.org", 10)):
            put(outbox, server, mailbox, mails_per_session=10)
            send(outbox, mailbox, count)
        assert outbox.processor().run(forever=False).accepted == 80
        order = [mail.sender[0] for mail in server.mails]
    assert set(order[:30]) == {"a", "b", "c"}  # a session each, before any has its second


def test_who_waits_in_vain_blocks_nobody(outbox: Outbox) -> None:
    """A lane whose mails were cancelled while it waited for its relay."""
    with SMTPServer() as server:
        rule = server.on("MAIL", silence=True)
        for number in range(5):
            put(outbox, server, f"box{number}@example.org")
        for number in range(3):
            send(outbox, f"box{number}@example.org", 1)
        processor = outbox.processor()
        processor.start()
        server.wait_until(lambda: rule.hits == 3, DEADLINE)
        (vain,) = send(outbox, "box3@example.org", 1)
        scheduler = processor.scheduler
        assert scheduler is not None
        wait_for(lambda: scheduler.lanes_waiting == 1)
        (last,) = send(outbox, "box4@example.org", 1)
        wait_for(lambda: scheduler.lanes_waiting == 2)
        outbox.queue.cancel(vain)
        server.forget(rule)
        server.drop_sessions()
        server.wait_until(lambda: any(m.message_id == last for m in server.mails), DEADLINE)
        assert processor.stop(timeout=DEADLINE)


def test_a_relay_that_takes_few_sessions_is_not_asked_again_and_again(tmp_path: Path) -> None:
    with (
        Outbox(tmp_path / "outbox", schedule=NEVER) as outbox,
        SMTPServer(max_sessions=2, latency=0.005) as server,
    ):
        put(outbox, server, "alice@example.org", connections=8, mails_per_session=10_000)
        ids = send(outbox, "alice@example.org", 400)
        summary = outbox.processor().run(forever=False)
        assert summary.accepted == 400
        assert Counter(mail.message_id for mail in server.mails) == Counter(ids)
        assert server.sessions <= 8 + 2  # the burst, and no more


def test_fewer_sessions_when_mail_from_is_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SessionLimit, "PAUSE", 0.2)
    monkeypatch.setattr(SessionLimit, "RECOVER", 0.2)
    with (
        Outbox(tmp_path / "outbox", schedule=NEVER) as outbox,
        SMTPServer(latency=0.01) as server,
    ):
        put(outbox, server, "alice@example.org", connections=4, mails_per_session=10_000)
        send(outbox, "alice@example.org", 2000)
        processor = outbox.processor()
        processor.start()
        server.wait_until(lambda: server.open_sessions == 4, DEADLINE)
        server.on("MAIL", reply="451 4.7.1 slow down", times=1)
        server.wait_until(lambda: server.open_sessions == 2, DEADLINE)  # halved
        server.wait_until(lambda: server.open_sessions == 4, DEADLINE)  # and recovered
        assert len(server.mails) < 2000
        assert processor.stop(timeout=DEADLINE)
        assert processor.summary.deferred == 1


@pytest.mark.parametrize("connections", [1, 3])
def test_a_relay_that_wants_less_of_the_last_session_is_not_told_of_every_mail(
    outbox: Outbox, connections: int
) -> None:
    with SMTPServer() as server:
        put(outbox, server, "alice@example.org", connections=connections)
        send(outbox, "alice@example.org", 200)
        rule = server.on("MAIL", reply="450 4.7.1 rate limit exceeded, slow down")
        summary = outbox.processor().run(forever=False)
        assert rule.hits == summary.deferred < 50
        assert summary.waiting == 200 - summary.deferred
        (reason,) = summary.reasons.values()
        assert "slow down" in reason
        server.forget(rule)
        assert outbox.processor().run(forever=False).accepted == summary.waiting


def test_connections_of_an_account_that_moved_count_at_its_new_relay(tmp_path: Path) -> None:
    with (
        SMTPServer() as before,
        SMTPServer() as after,
        Outbox(tmp_path / "outbox", schedule=NEVER, connections_per_relay=1) as outbox,
    ):
        after.on("RCPT", silence=True)
        put(outbox, before, "moves@example.org")
        put(outbox, before, "stays@example.org")
        processor = outbox.processor()
        processor.start()
        send(outbox, "moves@example.org", 1)
        before.wait_for(1, DEADLINE)
        put(outbox, after, "moves@example.org")
        wait_for(lambda: before.open_sessions == 0)
        send(outbox, "moves@example.org", 1)
        after.wait_until(lambda: any(c.line.startswith("RCPT") for c in after.commands), DEADLINE)
        send(outbox, "stays@example.org", 1)
        before.wait_for(2, DEADLINE)
        assert processor.stop(DEADLINE)
