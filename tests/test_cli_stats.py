"""`cpsmail stats`, and the shape of a queue: `cpsmail queue --by`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cli_helpers import MAIL, Site
from cpsmailaccess_delivery import Outcome, State
from cpsmailaccess_delivery.envelope import Envelope, Route, digest
from cpsmailaccess_delivery.interfaces import LaneNote, Settlement
from cpsmailaccess_delivery.journal import Event
from cpsmailaccess_delivery.spool.staging import Staging
from cpsmailaccess_delivery.testing import SMTPServer

ALICE, CAROL = "alice@example.org", "carol@example.org"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.account(mailbox=ALICE)
    site.account(mailbox=CAROL)
    return site


def queue_mail(site: Site, mailbox: str, *, minutes: float = 0.0) -> None:
    """Queue a mail that was sent so long ago."""
    with site.outbox() as outbox:
        staging: Staging = outbox.spool._staging
        staging._clock = lambda: time.time() - minutes * 60
        envelope = Envelope(mailbox, ("bob@example.net",), Route(mailbox, "127.0.0.1", 1), "m@x")
        entries = [outbox.spool.stage(envelope, MAIL)]
        outbox.spool.prepare(entries)
        outbox.spool.publish(entries)


def test_what_was_done(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with SMTPServer() as server:
        site.account(server, mailbox=ALICE)
        server.on("RCPT", reply="550 5.1.1 nobody", match="eve@")
        server.on("RCPT", reply="450 4.7.1 later", match="ben@")
        site.send("ann@example.net", "ben@example.net", "eve@example.net")
        site.run("drain", code=1)
        relay = f"127.0.0.1:{server.port}"
        before = time.time()
        answer = site.json("stats")
    nothing = dict.fromkeys(("unclear", "cancelled", "paused", "resumed"), 0)
    row = {"accepted": 2, "deferred": 1, "refused": 1, **nothing}  # two: the notice to Alice, too
    assert answer["total"] == row
    assert answer["rows"] == [{"mailbox": ALICE, **row}]
    assert abs(answer["since"] - (before - 86400)) < 60
    assert (answer["waiting"], answer["oldest_due"]) == ({"deferred": 1}, None)
    assert site.json("stats", "--by", "relay")["rows"] == [{"relay": relay, **row}]
    lines = site.run("stats").stdout.splitlines()
    assert lines[1].split() == ["MAILBOX", "ACCEPTED", "DEFERRED", "REFUSED"]
    assert lines[2].split() == [ALICE, "2", "1", "1"]
    assert lines[3].split() == ["TOTAL", "2", "1", "1"]
    assert lines[4] == "now: 1 deferred"


def test_the_period(site: Site) -> None:
    now = time.time()
    with site.outbox() as outbox:
        for hours in (1, 30, 200):
            outbox.journal.record(Event(at=now - hours * 3600, kind="accepted", mailbox=ALICE))
        outbox.journal.record(Event(at=now - 60, kind="paused", mailbox="\x1b[31mred"))
    totals = {
        last: site.json("stats", "--last", last)["total"]["accepted"]
        for last in ("30m", "24h", "2d", "52w")
    }
    assert totals == {"30m": 0, "24h": 1, "2d": 2, "52w": 3}
    assert "\\x1b[31mred" in site.run("stats").stdout


@pytest.mark.parametrize("span", ["", "1", "h", "0h", "1y", "-1h", "1.5h"])
def test_a_period_that_is_none(site: Site, span: str) -> None:
    assert "30m, 24h, 7d" in site.run("stats", "--last", span, code=64).stderr


def test_of_an_empty_outbox(site: Site) -> None:
    said = site.run("stats").stdout.splitlines()
    assert said[0].endswith(": nothing")
    assert said[1] == "now: no mails"
    for by in ("lane", "age", "reason"):
        assert site.run("queue", "--by", by).stdout == "no mails\n"
        assert site.json("queue", "--by", by)["rows"] == []


def test_by_age(site: Site) -> None:
    for minutes in (0, 1, 6, 100, 3000):
        queue_mail(site, ALICE, minutes=minutes)
    queue_mail(site, CAROL, minutes=30)
    answer = site.json("queue", "--by", "age")
    assert answer["minutes"] == [5, 10, 20, 40, 80, 160, 320, 640, 1280]
    assert answer["total"]["ages"] == [2, 1, 0, 1, 0, 1, 0, 0, 0, 1]
    rows = {row["name"]: row["ages"] for row in answer["rows"]}
    assert rows == {
        ALICE: [2, 1, 0, 0, 0, 1, 0, 0, 0, 1],
        CAROL: [0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
    }
    lines = [line.split() for line in site.run("queue", "--by", "age").stdout.splitlines()]
    assert lines[0][:4] == ["MAILBOX", "TOTAL", "5m", "10m"]
    assert lines[0][-1] == "1280m+"
    assert lines[1] == ["TOTAL", *["6", "2", "1", "0", "1", "0", "1", "0", "0", "0", "1"]]
    assert lines[2] == [ALICE, *["5", "2", "1", "0", "0", "0", "1", "0", "0", "0", "1"]]


def test_by_lane(site: Site) -> None:
    queue_mail(site, CAROL, minutes=30)
    for _ in range(2):
        queue_mail(site, ALICE)
    with site.outbox() as outbox:
        outbox.queue.hold(next(outbox.queue.entries(State.QUEUED)), "look at it")
    answer = site.json("queue", "--by", "lane")
    first, second = answer["rows"]
    assert (first["name"], first["lane"], first["total"]) == (ALICE, digest(ALICE), 2)
    assert first["oldest_due"] == first["oldest"]
    assert (second["states"], second["oldest_due"]) == ({"held": 1}, None)
    assert site.json("queue", "--by", "lane", "--state", "held")["rows"] == [second]
    assert site.json("queue", "--by", "lane", "--limit", "1")["more"] == 1
    output = site.run("queue", "--by", "lane", "--limit", "1").stdout
    columns = ["MAILBOX", "TOTAL", "QUEUED", "HELD", "OLDEST", "OLDEST", "DUE"]
    assert output.splitlines()[0].split() == columns
    assert "... and 1 more" in output


def test_by_reason(site: Site) -> None:
    queue_mail(site, ALICE)
    with site.outbox() as outbox:
        lease = outbox.spool.claim(next(outbox.spool.scan()))
        outcomes = {"bob@example.net": Outcome(State.DEFERRED, "450 \x1b later", time.time())}
        lease.settle(Settlement(State.DEFERRED, outcomes, due=time.time() + 60, attempts=1))
        note = LaneNote(CAROL, "relay", "nobody listens", since=1.0, until=time.time() + 99)
        outbox.spool.note_lane(digest(CAROL), note)
    for _ in range(3):
        queue_mail(site, CAROL)
    queue_mail(site, ALICE)
    (site.path / "new" / "broken").write_text("no mail\n")
    rows = [(r["name"], r["total"]) for r in site.json("queue", "--by", "reason")["rows"]]
    assert rows == [
        ("nobody listens", 3),
        ("450 \x1b later", 1),
        ("its private block cannot be read", 1),
        ("waits for its turn", 1),
    ]
    assert "450 \\x1b later" in site.run("queue", "--by", "reason").stdout
