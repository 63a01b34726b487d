"""Nobody knows whether the relay took it: tried once more, then a person decides."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import transaction

from cli_helpers import Site
from cpsmailaccess_delivery import Account, Outbox, State
from cpsmailaccess_delivery.errors import NotUnclear
from cpsmailaccess_delivery.journal import MAX_LAG
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.testing import SMTPServer

ALICE, ANN, BEN = "alice@example.org", "ann@example.net", "ben@example.net"
MESSAGE = b"From: alice@example.org\r\nSubject: hello\r\n\r\nhello\r\n"
LATER = Schedule(first=3600.0, jitter=0.0)


@pytest.fixture
def server() -> Iterator[SMTPServer]:
    with SMTPServer() as server:
        yield server


def open_outbox(path: Path, **settings: object) -> Outbox:
    return Outbox(path, helo_name="client.example.org", schedule=LATER, **settings)


@pytest.fixture
def outbox(tmp_path: Path, server: SMTPServer) -> Iterator[Outbox]:
    with open_outbox(tmp_path / "outbox") as outbox:
        put(outbox, server)
        yield outbox


def put(outbox: Outbox, server: SMTPServer) -> None:
    with transaction.manager:
        outbox.accounts.put(
            Account(mailbox=ALICE, host=server.host, port=server.port, security="plain")
        )


def send(outbox: Outbox, *to: str) -> str:
    with transaction.manager:
        return outbox.delivery.send(ALICE, list(to or (ANN,)), MESSAGE)


def drain(outbox: Outbox) -> object:
    return outbox.processor().run(forever=False)


def try_now(outbox: Outbox, message_id: str) -> object:
    outbox.queue.retry(message_id)
    return drain(outbox)


def states(outbox: Outbox, message_id: str) -> dict[str, State]:
    return {r: o.state for r, o in outbox.status(message_id).recipients.items()}


def make_unclear(outbox: Outbox, server: SMTPServer, *to: str) -> str:
    """Send a mail of which nobody knows any more, twice."""
    rule = server.on("TAKEN", drop=True)
    message_id = send(outbox, *to)
    drain(outbox)
    try_now(outbox, message_id)
    server.forget(rule)
    assert set(states(outbox, message_id).values()) == {State.UNCLEAR}
    return message_id


def test_what_a_person_settles_is_durable_when_that_returns(
    outbox: Outbox, server: SMTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    message_id = make_unclear(outbox, server)
    order: list[str] = []
    mails = outbox.spool._mails
    remove, sync = mails.remove, mails.sync
    monkeypatch.setattr(
        mails, "remove", lambda *a, **kw: (order.append("remove"), remove(*a, **kw))
    )
    monkeypatch.setattr(mails, "sync", lambda: (order.append("sync"), sync()))
    outbox.queue.settle(message_id, State.ACCEPTED)
    assert order == ["remove", "sync"]


def test_unclear_twice_holds_no_deferred_neighbour(outbox: Outbox, server: SMTPServer) -> None:
    grey = server.on("RCPT", reply="450 4.7.1 later", match=BEN)
    died = server.on("TAKEN", drop=True)
    message_id = send(outbox, ANN, BEN)
    drain(outbox)
    assert states(outbox, message_id) == {ANN: State.UNCLEAR, BEN: State.DEFERRED}
    try_now(outbox, message_id)
    server.forget(died)
    (entry,) = outbox.spool.scan()
    assert (entry.state, entry.attempts) == (State.DEFERRED, 2)
    assert entry.due > time.time()
    status = outbox.status(message_id)
    assert status.recipients[ANN].held
    assert "settle or release" in status.reason
    copies = len(server.mails)
    try_now(outbox, message_id)  # Ben alone, and he is deferred again
    assert len(server.mails) == copies
    server.forget(grey)
    try_now(outbox, message_id)
    assert [mail.recipients for mail in server.mails[copies:]] == [(BEN,)]
    (entry,) = outbox.spool.scan()
    assert (entry.state, entry.due) == (State.UNCLEAR, 0.0)
    assert states(outbox, message_id) == {ANN: State.UNCLEAR, BEN: State.ACCEPTED}
    drain(outbox)
    assert len(server.mails) == copies + 1


@pytest.mark.parametrize("policy", ["retry", "hold"])
def test_who_may_be_tried_again_is_known_after_a_restart(
    tmp_path: Path, server: SMTPServer, policy: str
) -> None:
    """What the side file says decides, not what the setting is by then."""
    path = tmp_path / "outbox"
    server.on("TAKEN", drop=True, times=1)
    with open_outbox(path, unclear=policy) as outbox:
        put(outbox, server)
        message_id = send(outbox)
        drain(outbox)
    for side in (path / "outcomes").iterdir():
        assert side.stat().st_mode & 0o777 == 0o400  # binding: written with fsync
    with open_outbox(path, unclear="retry" if policy == "hold" else "hold") as outbox:
        (entry,) = outbox.spool.scan()
        assert entry.state is State.UNCLEAR
        assert bool(entry.due) == (policy == "retry")
        assert outbox.status(message_id).recipients[ANN].held == (policy == "hold")


def test_a_crash_between_side_file_and_name_sends_nothing_again(
    outbox: Outbox, server: SMTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the second unclear was written, and before the name of the mail followed."""
    server.on("TAKEN", drop=True)
    message_id = send(outbox, ANN, BEN)
    drain(outbox)
    copies = len(server.mails)
    child = os.fork()
    if not child:
        from cpsmailaccess_delivery.spool.mails import Mails

        def die(*args: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            with open_outbox(Path(outbox.location)) as again:
                again.queue.retry(message_id)
                Mails.rename = die  # type: ignore[method-assign]
                drain(again)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    server.forget()
    drain(outbox)
    assert len(server.mails) == copies + 1
    (entry,) = outbox.spool.scan()
    assert (entry.state, entry.due, entry.attempts) == (State.UNCLEAR, 0.0, 2)


def test_release_sends_the_unclear_ones_again(outbox: Outbox, server: SMTPServer) -> None:
    died = server.on("TAKEN", drop=True)
    server.on("RCPT", reply="450 4.7.1 later", match=BEN, times=4)
    message_id = send(outbox, ANN, BEN)
    drain(outbox)
    try_now(outbox, message_id)
    server.forget(died)
    copies = len(server.mails)
    outbox.queue.release(message_id)
    drain(outbox)
    assert [mail.recipients for mail in server.mails[copies:]] == [(ANN,)]
    assert states(outbox, message_id) == {ANN: State.ACCEPTED, BEN: State.DEFERRED}
    kinds = [(e.kind, e.recipient) for e in outbox.journal.events(message_id=message_id)]
    assert ("released", ANN) in kinds
    assert ("retried", ANN) in kinds  # its second try was asked for


def test_settled_as_accepted_it_leaves_the_queue(outbox: Outbox, server: SMTPServer) -> None:
    message_id = make_unclear(outbox, server)
    copies = len(server.mails)
    (before,) = outbox.queue.settle(message_id, State.ACCEPTED)
    assert before.entry.state is State.UNCLEAR
    assert list(outbox.spool.scan()) == []
    assert states(outbox, message_id) == {ANN: State.ACCEPTED}
    event = outbox.journal.events(message_id=message_id)[-1]
    assert (event.kind, event.recipient) == ("accepted", ANN)
    assert event.reply.startswith("settled by hand; ")
    drain(outbox)
    assert len(server.mails) == copies  # accepted: nobody is told


def test_settled_as_refused_tells_the_sender_once_for_each(
    outbox: Outbox, server: SMTPServer
) -> None:
    message_id = make_unclear(outbox, server, ANN, BEN)
    copies = len(server.mails)
    outbox.queue.settle(message_id, State.REFUSED, [BEN])
    assert states(outbox, message_id) == {ANN: State.UNCLEAR, BEN: State.REFUSED}
    (entry,) = outbox.queue.entries(State.UNCLEAR)  # for Ann it is still to be decided
    assert entry.due == 0.0
    outbox.queue.settle(message_id, State.REFUSED)
    assert states(outbox, message_id) == {ANN: State.REFUSED, BEN: State.REFUSED}
    drain(outbox)
    notices = server.mails[copies:]
    assert [(mail.sender, mail.recipients) for mail in notices] == [("", (ALICE,))] * 2
    told = [[r for r in (ANN, BEN) if b"rfc822; " + r.encode() in m.data] for m in notices]
    assert sorted(told) == [[ANN], [BEN]]
    assert list(outbox.spool.scan()) == []


def test_settled_while_a_neighbour_is_deferred(outbox: Outbox, server: SMTPServer) -> None:
    server.on("RCPT", reply="450 4.7.1 later", match=BEN, times=2)
    died = server.on("TAKEN", drop=True)
    message_id = send(outbox, ANN, BEN)
    drain(outbox)
    (before,) = outbox.spool.scan()
    outbox.queue.settle(message_id, State.ACCEPTED)  # also before the second try
    (entry,) = outbox.spool.scan()
    assert (entry.state, entry.due) == (State.DEFERRED, before.due)
    server.forget(died)
    copies = len(server.mails)
    try_now(outbox, message_id)
    try_now(outbox, message_id)
    assert [mail.recipients for mail in server.mails[copies:]] == [(BEN,)]
    assert list(outbox.spool.scan()) == []


def test_what_is_not_unclear_is_not_settled(outbox: Outbox, server: SMTPServer) -> None:
    server.on("RCPT", reply="450 4.7.1 later", match=BEN)
    server.on("TAKEN", drop=True)
    message_id = send(outbox, ANN, BEN)
    with pytest.raises(NotUnclear, match="no recipient is unclear"):
        outbox.queue.settle(message_id, State.ACCEPTED)
    drain(outbox)
    (before,) = outbox.queue.find(message_id)
    with pytest.raises(NotUnclear, match=r"'ben@example\.net': is deferred"):
        outbox.queue.settle(message_id, State.REFUSED, [ANN, BEN])
    with pytest.raises(NotUnclear, match="'eve@x': is no recipient"):
        outbox.queue.settle(message_id, State.REFUSED, ["eve@x"])
    with pytest.raises(ValueError, match="accepted or refused"):
        outbox.queue.settle(message_id, State.DEFERRED)
    assert outbox.queue.find(message_id) == [before]


def test_command_line(tmp_path: Path, server: SMTPServer) -> None:
    site = Site(tmp_path)
    site.account(server)
    server.on("TAKEN", drop=True, times=1)
    message_id = site.send(ANN, BEN)
    site.run("--set", "unclear=hold", "drain", code=1)
    (mail,) = site.json("queue")["mails"]
    assert [(each["state"], each["held"]) for each in mail["recipients"]] == [("unclear", True)] * 2
    site.run("settle", message_id, code=64)
    assert "is no recipient" in site.run("settle", message_id, "--refused", "eve@x", code=65).stderr
    answer = site.json("settle", message_id, "--refused", BEN)
    assert (answer["action"], answer["as"], answer["failures"]) == ("settled", "refused", [])
    assert answer["mails"] == [mail]
    said = site.run("settle", mail["id"], "--accepted").stdout
    assert said == f"settled {mail['id']} as accepted for {ANN}\n"
    (notice,) = site.json("queue")["mails"]
    assert (notice["sender"], [r["address"] for r in notice["recipients"]]) == ("", [ALICE])
    time.sleep(MAX_LAG)
    events = site.json("trace", message_id)["events"]
    assert [e["event"] for e in events if e["reply"].startswith("settled by hand")] == [
        "refused",
        "accepted",
    ]


def test_the_setting_is_checked(tmp_path: Path) -> None:
    site = Site(tmp_path)
    assert "is retry or hold" in site.run("--set", "unclear=ask", "drain", code=78).stderr
