"""`cpsmail accounts`; and no secret gets out by it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cli_helpers import SECRET, Site
from cpsmailaccess_delivery.cli import cli
from cpsmailaccess_delivery.password import resolve_secret
from cpsmailaccess_delivery.testing import Authority, SMTPServer

ALICE = "alice@example.org"
SET = ("accounts", "set", ALICE, "--host", "smtp.example.org", "--username", "alice")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def stored(site: Site) -> str | None:
    with site.outbox() as outbox:
        secret = resolve_secret(outbox.vault.get(ALICE))
        return secret.reveal() if secret else None


def test_set_and_list(site: Site) -> None:
    output = site.run(*SET, "--password-stdin", input=f"{SECRET}\n").output
    assert output.startswith(f"added {ALICE}")
    (account,) = site.json("accounts", "list")["accounts"]
    assert account == {
        "mailbox": ALICE,
        "host": "smtp.example.org",
        "port": 587,
        "security": "starttls",
        "username": "alice",
        "password_from": None,
        "password_stored": True,
        "verify": True,
        "connect_timeout": 30.0,
        "command_timeout": 300.0,
        "data_timeout": 600.0,
        "connections": 3,
        "mails_per_session": 100,
        "mails_per_minute": None,
        "owner": "",
        "networks": [],
    }
    assert stored(site) == SECRET
    row = site.run("accounts", "list").output.splitlines()[1]
    assert row.split()[:6] == [ALICE, "smtp.example.org:587", "starttls", "alice", "stored", "yes"]


def test_an_owner_is_set_and_shown(site: Site) -> None:
    site.run(*SET, "--password-stdin", "--owner", "/acl_users:alice", input=SECRET)
    assert site.json("accounts", "list")["accounts"][0]["owner"] == "/acl_users:alice"
    assert "/acl_users:alice" in site.run("accounts", "list").output
    site.run("accounts", "set", ALICE, "--connections", "5")
    assert site.json("accounts", "list")["accounts"][0]["owner"] == "/acl_users:alice"
    site.run("accounts", "set", ALICE, "--owner", "")
    assert site.json("accounts", "list")["accounts"][0]["owner"] == ""


def test_change_keeps_the_rest(site: Site) -> None:
    site.run(*SET, "--password-stdin", input=SECRET)
    site.run("accounts", "set", ALICE, "--connections", "5", "--mails-per-minute", "30")
    assert stored(site) == SECRET
    answer = site.json("accounts", "set", ALICE, "--security", "tls")
    assert answer["added"] is False
    assert answer["account"]["port"] == 465
    assert answer["account"]["connections"] == 5
    assert answer["account"]["mails_per_minute"] == 30
    assert stored(site) == SECRET
    site.run("accounts", "set", ALICE, "--no-verify", code=65)  # a kept password stays safe
    answer = site.json(
        *("accounts", "set", ALICE, "--mails-per-minute", "none", "--no-verify"),
        "--password-stdin",
        input=SECRET,
    )
    assert answer["account"]["mails_per_minute"] is None
    assert answer["account"]["verify"] is False
    assert "NO" in site.run("accounts", "list").output
    site.run("accounts", "set", ALICE, "--password-from", "env:ALICE_PASSWORD")
    assert not site.json("accounts", "list")["accounts"][0]["password_stored"]
    site.run("accounts", "set", ALICE, "--password-stdin", input="another")
    assert stored(site) == "another"
    site.run("accounts", "set", ALICE, "--no-login")
    (account,) = site.json("accounts", "list")["accounts"]
    assert (account["username"], account["password_stored"]) == (None, False)


def test_prompt(site: Site) -> None:
    output = site.run(*SET, "--password-prompt", input=f"{SECRET}\n").output
    assert SECRET not in output
    assert stored(site) == SECRET


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("accounts", "set", ALICE), 65),  # new, and no host
        (SET, 65),  # a user name, and no password
        (("accounts", "set", "no mailbox", "--host", "h"), 65),
        ((*SET, "--password-from", "vault:x"), 65),
        ((*SET, "--port", "0x10"), 64),
        ((*SET, "--port", "70000"), 65),
        ((*SET, "--security", "ssl"), 64),
        ((*SET, "--password", "x"), 64),
        ((*SET, "--password-stdin", "--password-from", "env:X"), 64),
        ((*SET, "--ca-file", "x", "--verify"), 64),
        ((*SET, "--mails-per-minute", "some"), 64),
        ((*SET, "--password-stdin"), 64),  # empty
        (("accounts", "remove", ALICE), 66),
        (("accounts", "check", ALICE), 67),
    ],
)
def test_what_is_refused(site: Site, args: tuple[str, ...], code: int) -> None:
    site.account(mailbox="carol@example.org")
    site.run(*args, code=code)
    assert len(site.json("accounts", "list")["accounts"]) == 1


def test_no_option_takes_a_password() -> None:
    group = cli.commands["accounts"]
    options = {o for p in group.commands["set"].params for o in p.opts}  # type: ignore[attr-defined]
    flags = {"--password-stdin", "--password-prompt", "--password-from"}
    assert {option for option in options if "pass" in option or "secret" in option} == flags


def test_check(site: Site, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    context = authority.server_context()
    with SMTPServer(security="starttls", context=context, users={"alice": SECRET}) as server:
        relay = ("--host", "localhost", "--port", str(server.port))
        site.run(
            *("accounts", "set", ALICE, *relay, "--username", "alice", "--password-stdin"),
            *("--ca-file", str(authority.ca_file)),
            input=SECRET,
        )
        output = site.run("accounts", "check", ALICE).output
        assert "logged in as alice" in output
        assert f"{ALICE} at localhost:{server.port} works" in output
        answer = site.json("accounts", "check", ALICE)
        assert set(answer) == {
            *("mailbox", "relay", "ok", "steps", "tls", "problem", "phase", "code"),
        }
        assert answer["ok"] is True
        assert server.mails == []

        site.run("accounts", "set", ALICE, "--password-stdin", input="wrong-" + SECRET)
        result = site.run("accounts", "check", ALICE, code=1)
        assert "does not accept this username and password" in result.output
        answer = site.json("accounts", "check", ALICE, code=1)
        assert (answer["ok"], answer["code"]) == (False, 535)

        site.run("accounts", "set", ALICE, "--verify")
        assert "unknown authority" in site.run("accounts", "check", ALICE, code=1).output


def test_user_name_without_a_password(site: Site) -> None:
    assert "--password-prompt" in site.run(*SET, code=65).stderr
    site.run("accounts", "set", ALICE, "--host", "smtp.example.org")  # no login
    assert "--password-stdin" in site.run(*SET, code=65).stderr
    site.run(*SET, "--password-from", "env:ALICE_PASSWORD")
    site.run("accounts", "set", ALICE, "--username", "another")


def test_check_ends_the_wait(site: Site) -> None:
    with SMTPServer() as server:
        rule = server.on("GREETING", reply="554 no")
        site.account(server, mailbox="@example.org")
        site.send()
        site.run("drain", code=1)
        site.run("accounts", "check", ALICE, code=1)
        assert [mail["state"] for mail in site.json("queue")["mails"]] == ["deferred"]
        server.forget(rule)
        site.run("accounts", "check", ALICE)
        assert site.json("queue")["lanes"] == []
        assert [mail["state"] for mail in site.json("queue")["mails"]] == ["queued"]


def test_check_of_a_sender_whom_another_account_serves(site: Site) -> None:
    with SMTPServer() as server:
        site.account(server, mailbox="@example.org")
        assert "@example.org at" in site.run("accounts", "check", ALICE).output


def test_check_where_nobody_listens(site: Site) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        site.run(
            *("accounts", "set", ALICE, "--host", "127.0.0.1", "--security", "plain"),
            *("--port", str(free.getsockname()[1])),
        )
        assert "Nothing listens" in site.run("accounts", "check", ALICE, code=1).output


def test_check_without_the_password(site: Site) -> None:
    site.run(*SET, "--password-from", "env:CPSMAIL_TEST_UNSET")
    assert "CPSMAIL_TEST_UNSET" in site.run("accounts", "check", ALICE, code=78).stderr


def test_remove(site: Site) -> None:
    site.account(mailbox=ALICE)
    site.send()
    result = site.run("accounts", "remove", ALICE, code=1)
    assert "warning: 1 mail in the queue is routed" in result.stderr
    assert "nothing was changed" in result.stderr
    assert site.json("accounts", "remove", "Alice@Example.ORG", "--yes") == {
        "removed": ALICE,
        "mails_waiting": 1,
    }
    assert site.json("accounts", "list")["accounts"] == []
    assert "no accounts" in site.run("accounts", "list").output


def test_lost_key(site: Site) -> None:
    site.run(*SET, "--password-stdin", input=SECRET)
    site.path.with_name("outbox.key").unlink()
    assert "lost" in site.run("accounts", "check", ALICE, code=78).stderr


def test_no_secret_gets_out(site: Site) -> None:
    """Not into outputs, with tracebacks and logs; nor into the spool."""
    with SMTPServer(users={"alice": "another"}) as server:
        relay = ("--host", "127.0.0.1", "--port", str(server.port), "--security", "plain")
        outputs = []
        for args in (
            ("accounts", "set", ALICE, *relay, "--username", "alice", "--password-stdin", "--json"),
            ("accounts", "set", ALICE, *relay, "--username", "alice", "--password-stdin"),
            ("accounts", "list"),
            ("accounts", "list", "--json"),
            ("accounts", "check", ALICE),
            ("accounts", "check", ALICE, "--json"),
            ("send", "-f", ALICE, "bob@example.net"),
            ("drain",),
            ("queue",),
            ("queue", "--json"),
            ("doctor",),
            ("doctor", "--json"),
            ("accounts", "set", ALICE, "--port", "99999", "--password-stdin"),
        ):
            outputs.append(site.run("-v", *args, input=SECRET + "\n", code=None).output)
    assert SECRET not in "\n".join(outputs)
    for path in site.path.rglob("*"):
        if path.is_file() and path.parent.name not in ("new", "cur"):
            assert SECRET.encode() not in path.read_bytes()
