"""`cpsmail queue`, `show`, `retry`, `hold`, `release`, `cancel`, `trace`."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cli_helpers import MAIL, Site
from cpsmailaccess_delivery import Outcome, State
from cpsmailaccess_delivery.envelope import digest
from cpsmailaccess_delivery.interfaces import LaneNote, Settlement
from cpsmailaccess_delivery.testing import SMTPServer

HOSTILE = "4.7.1 \x1b]0;owned\x07 [red]later[/red] \u202etxt"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.account()
    site.account(mailbox="carol@example.org")
    return site


def settle(site: Site, state: State, reply: str = "", **more: object) -> None:
    """Give every queued mail a state, as a processor would."""
    with site.outbox() as outbox:
        for entry in list(outbox.queue.entries(State.QUEUED)):
            lease = outbox.spool.claim(entry)
            assert lease is not None
            outcomes = {
                recipient: Outcome(state, reply, time.time())
                for recipient in lease.envelope.recipients
            }
            lease.settle(Settlement(state, outcomes, attempts=1, **more))  # type: ignore[arg-type]


def states(site: Site) -> list[str]:
    return [mail["state"] for mail in site.json("queue")["mails"]]


def test_json_of_a_mail(site: Site) -> None:
    before = time.time()
    message_id = site.send("bob@example.net", "carol@example.net")
    answer = site.json("queue")
    (mail,) = answer["mails"]
    assert mail == {
        "id": mail["id"],
        "lane": digest("*"),
        "state": "queued",
        "queued_at": mail["queued_at"],
        "due": None,
        "attempts": 0,
        "message_id": message_id,
        "mailbox": "*",
        "relay": "127.0.0.1:1",
        "sender": "alice@example.org",
        "recipients": [
            {"address": who, "state": "queued", "reply": "", "at": None, "held": False}
            for who in ("bob@example.net", "carol@example.net")
        ],
        "size": mail["size"],
        "reason": "",
    }
    assert abs(mail["queued_at"] - before) < 30
    assert answer["counts"] == {"queued": 1}
    assert answer["outbox"] == str(site.path)
    assert answer["oldest_due"] == mail["queued_at"]
    assert answer["lanes"] == []
    assert site.json("show", message_id)["mails"] == [mail]
    assert site.json("show", f"<{message_id}>")["mails"] == [mail]
    assert site.json("show", mail["id"])["mails"] == [mail]


def test_table(site: Site) -> None:
    site.send()
    settle(site, State.DEFERRED, "450 later", due=time.time() + 7300)
    lines = site.run("queue").output.splitlines()
    assert lines[0].split() == [
        *("ID", "STATE", "MAILBOX", "SENDER", "RECIPIENTS", "AGE", "TRIES", "DUE", "WHY"),
    ]
    assert "deferred  *        alice@example.org  bob@example.net" in lines[1]
    assert "in 2h" in lines[1]
    assert lines[1].rstrip().endswith("450 later")
    assert lines[-1] == "1 deferred"


def test_empty(site: Site) -> None:
    assert site.run("queue").output == "no mails\n"
    assert site.json("queue")["mails"] == []


def test_selection(site: Site) -> None:
    site.send()
    settle(site, State.HELD, reason="why not")
    site.send()
    site.json("send", "-f", "carol@example.org", "x@y.z", input=MAIL)
    assert states(site) == ["held", "queued", "queued"]
    held = site.json("queue", "--state", "held")
    assert [mail["reason"] for mail in held["mails"]] == ["why not"]
    assert len(site.json("queue", "--state", "held", "--state", "queued")["mails"]) == 3
    for name in ("carol@example.org", "Carol@EXAMPLE.org", digest("carol@example.org")):
        (mail,) = site.json("queue", "--mailbox", name)["mails"]
        assert mail["mailbox"] == "carol@example.org"
    assert len(site.json("queue", "--lane", "*")["mails"]) == 2
    assert site.json("queue", "--mailbox", "smtp.example.org:25")["mails"] == []
    limited = site.run("queue", "--limit", "1").output
    assert "... and 2 more" in limited
    assert site.json("queue", "--limit", "1")["counts"] == {"held": 1, "queued": 2}
    site.run("queue", "--state", "lost", code=64)


def test_file_of_zope_sendmail_and_unreadable_file(site: Site) -> None:
    (site.path / "new" / "1700000000.1.host").write_bytes(
        b"X-Zope-From: a@b.c\nX-Zope-To: d@e.f\nSubject: x\n\nx\n"
    )
    (site.path / "new" / "1700000001.2.host").write_bytes(b"X-Zope-\x1b[31m\n\n")
    mails = site.json("queue")["mails"]
    assert [mail.get("sender") for mail in mails] == ["a@b.c", None]
    assert "cannot be read" in mails[1]["reason"]
    assert len(site.json("queue", "--mailbox", "*")["mails"]) == 1
    assert "cannot be read" in site.run("queue").output


def test_why_lanes_wait(site: Site) -> None:
    site.send()
    now = time.time()
    note = LaneNote("*", "relay", f"refused {HOSTILE}", now - 120, now + 600, failures=3)
    with site.outbox() as outbox:
        outbox.spool.note_lane(digest("*"), note)
    (lane,) = site.json("queue")["lanes"]
    assert lane == {
        "lane": digest("*"),
        "route": "*",
        "trouble": "relay",
        "reason": note.reason,
        "since": note.since,
        "until": note.until,
        "failures": 3,
    }
    output = site.run("queue").output
    assert "deferred  *" in output.splitlines()[1]
    assert "in 10m  refused 4.7.1 " in output.splitlines()[1]
    assert "\n1 deferred\n" in output
    assert "* waits since 2m, relay in trouble, next try in 10m: refused 4.7.1" in output
    assert "\x1b" not in output
    assert "waits since" in site.run("queue", "--mailbox", "*").output
    for asked in (["queue", "--mailbox", "bob@example.net"], ["queue", "--lane", "b.example:25"]):
        assert site.run(*asked).output == "no mails\n"  # of others, nothing was asked
        assert site.json(*asked)["lanes"] == []


def trouble(site: Site, lane: str = "*") -> LaneNote:
    now = time.time()
    note = LaneNote(lane, "relay", "nobody listens", now - 120, now + 600)
    with site.outbox() as outbox:
        outbox.spool.note_lane(digest(lane), note)
    return note


def test_a_lane_in_trouble_defers_its_mails(site: Site) -> None:
    message_id = site.send()
    site.json("send", "-f", "carol@example.org", "x@y.z", input=MAIL)
    note = trouble(site)
    queue = site.json("queue")
    assert queue["counts"] == {"deferred": 1, "queued": 1}
    mail = queue["mails"][0]
    assert (mail["state"], mail["reason"], mail["due"]) == ("deferred", note.reason, note.until)
    assert mail["recipients"] == [
        {
            "address": "bob@example.net",
            "state": "deferred",
            "reply": note.reason,
            "at": note.since,
            "held": False,
        }
    ]
    assert site.json("show", message_id)["mails"] == [mail]
    assert site.json("queue", "--state", "deferred")["mails"] == [mail]
    assert site.json("queue", "--state", "queued")["mails"] == queue["mails"][1:]
    output = site.run("show", message_id).output
    assert "state:      deferred: nobody listens" in output
    assert "lane:       waits, next try in 10m\n" in output
    with site.outbox() as outbox:
        status = outbox.status(message_id)
        assert (status.state, status.reason) == (mail["state"], mail["reason"])
        assert status.next_try == mail["due"]
        assert outbox.queue.counts().states == {State.DEFERRED: 1, State.QUEUED: 1}


@pytest.mark.parametrize("by", ["name", "--all"])
def test_retry_ends_the_wait_of_the_lane(site: Site, by: str) -> None:
    message_id = site.send()
    site.json("send", "-f", "carol@example.org", "x@y.z", input=MAIL)
    trouble(site)
    trouble(site, "carol@example.org")
    args = (message_id,) if by == "name" else ("--all", "--yes", "--mailbox", "*")
    assert len(site.json("retry", *args)["mails"]) == 1
    assert [lane["route"] for lane in site.json("queue")["lanes"]] == ["carol@example.org"]
    assert states(site) == ["queued", "deferred"]


def test_release_ends_the_wait_of_the_lane(site: Site) -> None:
    message_id = site.send()
    site.run("hold", message_id)
    trouble(site)
    assert states(site) == ["held"]
    site.run("release", message_id)
    assert states(site) == ["queued"]
    events = [event["event"] for event in site.json("trace", message_id)["events"]]
    assert events == ["queued", "held", "released"]


@pytest.mark.parametrize("command", ["retry", "release"])
def test_refused_mail_is_tried_again(tmp_path: Path, command: str) -> None:
    site = Site(tmp_path)
    with SMTPServer() as server:
        rule = server.on("RCPT", reply="550 5.1.1 no such user", match="carol@")
        site.account(server)
        message_id = site.send("bob@example.net", "carol@example.net")
        site.run("drain", code=1)
        assert states(site) == ["refused"]
        server.forget(rule)
        site.run(command, message_id)
        site.run("drain")
        assert [mail.recipients for mail in server.mails] == [
            ("bob@example.net",),
            ("alice@example.org",),  # the notice
            ("carol@example.net",),
        ]
    assert states(site) == []
    events = site.json("trace", message_id)["events"]
    assert [e["event"] for e in events if e["recipient"] == "carol@example.net"] == [
        *("queued", "refused", "retried" if command == "retry" else "released", "accepted"),
    ]


def test_mail_that_was_given_up_is_tried_again(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with SMTPServer() as server:
        rule = server.on("RCPT", reply="450 4.2.0 later")
        site.account(server)
        message_id = site.send()
        impatient = ("--set", "retry.give_up=0.001", "drain")
        site.run(*impatient, code=1)
        for _ in range(10):  # it has a few tries, however old it is
            if states(site) == ["deferred"]:
                site.run("retry", message_id)
                site.run(*impatient, code=1)
        assert site.json("show", message_id)["mails"][0]["state"] == "refused"
        server.forget(rule)
        site.run("retry", message_id)
        site.run(*impatient)
        assert [mail.recipients for mail in server.mails if mail.sender] == [("bob@example.net",)]


def test_relay_of_ipv6(site: Site) -> None:
    import transaction

    with site.outbox() as outbox, transaction.manager:
        outbox.delivery.send("a@b.c", ["d@e.f"], MAIL, hostname="::1", port=25)
    for name in ("[::1]:25", "[0:0::1]:25"):
        (mail,) = site.json("queue", "--mailbox", name)["mails"]
        assert mail["relay"] == "[::1]:25"


def test_limit_of_json(site: Site) -> None:
    for _ in range(3):
        site.send()
    answer = site.json("queue", "--limit", "2")
    assert (len(answer["mails"]), answer["more"], answer["counts"]) == (2, 1, {"queued": 3})
    assert site.json("queue", "--limit", "0")["more"] == 0


def test_show(site: Site) -> None:
    message_id = site.send(message=MAIL.replace(b"Hi", "Hi \x1b[2J\u202e".encode()))
    settle(site, State.DEFERRED, HOSTILE, due=time.time() + 60)
    output = site.run("show", message_id, "--headers").output
    assert f"message-id: {message_id}" in output
    assert "state:      deferred" in output
    assert (
        "  bob@example.net: deferred: 4.7.1 \\x1b]0;owned\\x07 [red]later[/red] \\u202etxt"
        in output
    )
    assert "Subject: Hi \\x1b[2J\\u202e" in output
    assert "Hello" not in output
    assert not {"\x1b", "\x07", "\u202e"} & set(output)
    headers = site.json("show", message_id, "--headers")["mails"][0]["headers"]
    assert "Subject: Hi \x1b[2J\u202e" in headers
    assert "\x1b" not in site.run("show", message_id, "--json").output
    raw = site.run("show", "--raw", message_id).stdout_bytes
    with site.outbox() as outbox:
        assert raw == outbox.spool.read_message(next(outbox.spool.scan()))


def test_on_a_terminal(site: Site) -> None:
    message_id = site.send(message=MAIL + "\x1b]0;owned\x07 \u202e\n".encode())
    assert b"\r\nHello\r\n\\x1b]0;owned\\x07 \\u202e" in site.terminal("show", "--raw", message_id)
    mail_id = site.json("queue")["mails"][0]["id"]
    assert mail_id.encode() in site.terminal("queue")  # whole, to be copied


def test_show_what_is_not_there(site: Site) -> None:
    result = site.run("show", "no@such.id", code=66)
    assert result.stderr.startswith(
        "cpsmail: no@such.id: is no mail in the queue, and no Message-Id"
    )
    site.run("show", "--raw", "no@such.id", code=66)


def test_one_message_id_of_two_mails(site: Site) -> None:
    message = b"Message-Id: <twice@example.org>\n" + MAIL
    site.send(message=message)
    site.send("carol@example.net", message=message)
    assert len(site.json("show", "twice@example.org")["mails"]) == 2
    assert "names 2 mails" in site.run("show", "--raw", "twice@example.org", code=64).stderr


def test_hold_release_retry(site: Site) -> None:
    message_id = site.send()
    output = site.run("hold", "--reason", "ask Bob", message_id).output
    assert output.startswith("held ")
    assert site.json("queue")["mails"][0]["reason"] == "ask Bob"
    answer = site.json("release", message_id)
    assert answer["action"] == "released"
    assert [mail["state"] for mail in answer["mails"]] == ["held"]  # as it was
    assert states(site) == ["queued"]
    assert "not held" in site.run("release", message_id, code=65).stderr
    settle(site, State.DEFERRED, due=time.time() + 3600)
    site.run("retry", message_id)
    assert states(site) == ["queued"]


def test_cancel(site: Site) -> None:
    message_id = site.send()
    other = site.send()
    assert site.run("cancel", message_id).output.startswith("cancelled ")
    assert [mail["message_id"] for mail in site.json("queue")["mails"]] == [other]
    events = site.json("trace", message_id)["events"]
    assert [event["event"] for event in events] == ["queued", "cancelled"]
    assert "cancelled" in site.run("show", message_id).output
    answer = site.json("cancel", message_id, other, code=66)
    assert [mail["message_id"] for mail in answer["mails"]] == [other]
    assert [failure["name"] for failure in answer["failures"]] == [message_id]


def test_all_asks_first(site: Site) -> None:
    for _ in range(3):
        site.send()
    settle(site, State.DEFERRED, due=time.time() + 3600)
    site.send()
    assert "nothing was changed" in site.run("cancel", "--all", code=1).stderr
    assert "nothing was changed" in site.run("cancel", "--all", input="n\n", code=1).stderr
    assert len(states(site)) == 4
    assert "3 mails retried" in site.run("retry", "--all", input="y\n").output
    assert states(site) == ["queued"] * 4
    assert "4 mails held" in site.run("hold", "--all", "--yes").output
    assert "0 mails held" in site.run("hold", "--all", "--yes").output
    assert "0 mails" in site.run("release", "--all", "--yes", "--state", "unclear").output
    assert "4 mails released" in site.run("release", "--all", "--yes").output
    assert (
        "0 mails" in site.run("cancel", "--all", "--yes", "--mailbox", "carol@example.org").output
    )
    assert "0 mails" in site.run("cancel", "--all", "--yes", "--state", "held").output
    assert "4 mails cancelled" in site.run("cancel", "--all", "--yes").output
    assert states(site) == []


@pytest.mark.parametrize("command", ["retry", "hold", "release", "cancel"])
def test_names_or_all(site: Site, command: str) -> None:
    site.run(command, code=64)
    site.run(command, "x@y.z", "--all", code=64)
    site.run(command, "x@y.z", "--state", "held", code=64)
    site.run(command, "x@y.z", code=66)


def test_mail_on_its_way_is_not_touched(site: Site) -> None:
    message_id = site.send()
    with site.outbox() as outbox:
        (entry,) = outbox.queue.entries()
        lease = outbox.spool.claim(entry)
        assert lease is not None
        for command in ("hold", "cancel"):
            result = site.run(command, message_id, code=75)
            assert result.stderr.startswith("cpsmail: ")
        lease.release()


def test_trace(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with SMTPServer() as server:
        server.on("RCPT", reply="550 5.1.1 \x1b[31mno", match="carol@")
        site.account(server)
        message_id = site.send("bob@example.net", "carol@example.net")
        (mail,) = site.json("queue")["mails"]
        site.run("drain", code=1)
    for name in (message_id, f"<{message_id}>", "Bob@Example.net", mail["id"]):
        events = site.json("trace", name)["events"]
        assert {event["message_id"] for event in events} == {message_id}
    events = site.json("trace", message_id)["events"]
    assert {(e["recipient"], e["event"]) for e in events if e["attempt"]} == {
        ("bob@example.net", "accepted"),
        ("carol@example.net", "refused"),
    }
    assert set(events[0]) == {
        *("at", "event", "id", "message_id", "mailbox", "sender", "recipient", "attempt"),
        *("relay", "reply"),
    }
    output = site.run("trace", message_id).output
    assert "\x1b" not in output
    assert "5.1.1" in output
    assert events[0]["event"] == "queued"
    assert events[0]["at"] == mail["queued_at"]  # though it has left the queue
    site.run("trace", "nobody@example.net", code=66)


def test_trace_of_what_was_not_tried(site: Site) -> None:
    message_id = site.send()
    site.send("carol@example.net")
    mail = site.json("queue")["mails"][0]
    for name in (message_id, "Bob@Example.net", mail["id"]):
        (event,) = site.json("trace", name)["events"]
        assert (event["event"], event["at"], event["id"]) == (
            *("queued", mail["queued_at"], mail["id"]),
        )
        assert (event["recipient"], event["attempt"]) == ("bob@example.net", 0)
    assert len(site.json("trace", "alice@example.org")["events"]) == 2


def test_show_what_was_delivered(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with SMTPServer() as server:
        site.account(server)
        message_id = site.send()
        site.run("drain")
    assert f"{message_id}: accepted" in site.run("show", message_id).output
    answer = site.json("show", message_id)
    assert answer["mails"] == []
    assert answer["journal"]["state"] == "accepted"
    assert answer["journal"]["recipients"][0]["address"] == "bob@example.net"
