"""`cpsmail drain`: real relays; exit codes; the bar on a terminal."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from cli_helpers import DEADLINE, Site
from cpsmailaccess_delivery.testing import SMTPServer


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_everything_goes(site: Site) -> None:
    with SMTPServer() as server:
        site.account(server)
        for _ in range(3):
            site.send()
        assert site.run("drain").output.startswith("3 accepted in ")
        assert len(server.mails) == 3
    assert site.run("drain").output.startswith("nothing was due in ")


def test_json(site: Site) -> None:
    with SMTPServer() as server:
        server.on("RCPT", reply="450 4.2.0 later \x1b[31m", match="bob@")
        server.on("RCPT", reply="550 5.1.1 never", match="carol@")
        site.account(server)
        for recipient in ("bob@example.net", "carol@example.net", "dora@example.net"):
            site.send(recipient)
        answer = site.json("drain", code=1)
    assert answer["seconds"] >= 0
    del answer["seconds"]
    assert answer == {
        "accepted": 2,  # with the notice that carol's mail was refused
        "deferred": 1,
        "refused": 1,
        "unclear": 0,
        "held": 0,
        "waiting": answer["waiting"],
        "reasons": {},
        "interrupted": False,
    }


def test_what_is_not_due_does_not_count(site: Site) -> None:
    with SMTPServer() as server:
        rule = server.on("RCPT", reply="450 4.2.0 later")
        site.account(server)
        site.send()
        assert "1 deferred" in site.run("drain", code=1).output
        server.forget(rule)
        assert "1 waiting" in site.run("drain").output
        site.run("retry", "--all", "--yes")
        assert "1 accepted" in site.run("drain").output


def test_relay_in_trouble(site: Site) -> None:
    site.account()  # nobody listens
    site.send()
    output = site.run("drain", code=1).output
    assert "1 waiting" in output
    assert "* waits: " in output
    (lane,) = site.json("queue")["lanes"]
    assert lane["trouble"] == "relay"


def test_bar_on_a_terminal(site: Site) -> None:
    with SMTPServer() as server:
        site.account(server)
        site.send()
        output = site.terminal("drain")
    assert b"delivering" in output
    assert b"1 accepted in " in output


def test_interrupted(site: Site) -> None:
    with SMTPServer() as server:
        rule = server.on("MAIL", silence=True)
        site.account(server)
        message_id = site.send()
        process = site.process("drain", "--json", "--stop-timeout", "0.2")
        server.wait_until(lambda: rule.hits, DEADLINE)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 130, err
        assert b'"interrupted": true' in out
    assert [mail["message_id"] for mail in site.json("queue")["mails"]] == [message_id]


def test_interrupt_does_not_last(site: Site) -> None:
    with SMTPServer() as server:
        rule = server.on("MAIL", silence=True)
        site.account(server)
        site.send()
        process = site.process("drain")
        server.wait_until(lambda: rule.hits, DEADLINE)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE)
        assert process.returncode == 130
        assert time.monotonic() - begun < 20


def test_no_outbox_is_made_by_a_mistyped_path(site: Site) -> None:
    for command in (("drain",), ("queue",), ("show", "x"), ("accounts", "list"), ("trace", "x")):
        assert "there is none" in site.run(*command, code=78).stderr
    assert not site.path.exists()
