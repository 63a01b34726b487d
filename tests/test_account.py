"""Accounts: settings that contradict each other are refused; a password is never shown."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.account import (
    HIDDEN,
    Account,
    Secret,
    candidates,
    mailbox_key,
    normalise_mailbox,
)
from cpsmailaccess_delivery.errors import InvalidAccount, OutboxError

PASSWORD = "hunter2-is-the-password"


def account(**changes) -> Account:
    settings = {
        "mailbox": "alice@example.org",
        "host": "smtp.example.org",
        "username": "alice",
        "password": PASSWORD,
    }
    return Account(**(settings | changes))


def test_defaults():
    made = Account(mailbox="Alice@Example.ORG", host="SMTP.example.org.")
    assert made.mailbox == "alice@example.org"
    assert made.host == "smtp.example.org"
    assert (made.port, made.security, made.verify) == (587, "starttls", True)
    assert made.secret is None
    assert made.connections <= 3  # what Exchange Online allows


@pytest.mark.parametrize(("security", "port"), [("tls", 465), ("starttls", 587), ("plain", 25)])
def test_port_follows_security(security, port):
    made = Account(mailbox="*", host="smtp.example.org", security=security)
    assert made.port == port
    assert Account(mailbox="*", host="x.org", security=security, port=2525).port == 2525


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mailbox": ""}, "mailbox"),
        ({"mailbox": None}, "mailbox"),
        ({"mailbox": 7}, "mailbox"),
        ({"mailbox": "alice"}, "mailbox"),
        ({"mailbox": "@"}, "mailbox"),
        ({"mailbox": "**"}, "mailbox"),
        ({"mailbox": "@exa mple.org"}, "mailbox"),
        ({"mailbox": "a@example.org\r\nX: y"}, "mailbox"),
        ({"host": ""}, "host"),
        ({"host": None}, "host"),
        ({"host": "smtp.example.org:587"}, "host"),
        ({"host": "smtp.example.org\r\nX: y"}, "host"),
        ({"host": "fe80::1%a\r\nb"}, "host"),
        ({"security": "ssl"}, "security"),
        ({"security": "TLS"}, "security"),
        ({"security": None}, "security"),
        ({"security": []}, "security"),
        ({"port": -1}, "port"),
        ({"port": 65536}, "port"),
        ({"port": "587"}, "port"),
        ({"port": 25.5}, "port"),
        ({"port": True}, "port"),
        ({"verify": ""}, "verify"),
        ({"verify": None}, "verify"),
        ({"verify": 1}, "verify"),
        ({"connect_timeout": 0}, "connect_timeout"),
        ({"connect_timeout": -1}, "connect_timeout"),
        ({"command_timeout": float("nan")}, "command_timeout"),
        ({"data_timeout": float("inf")}, "data_timeout"),
        ({"data_timeout": 3601}, "data_timeout"),
        ({"data_timeout": "60"}, "data_timeout"),
        ({"data_timeout": True}, "data_timeout"),
        ({"connections": 0}, "connections"),
        ({"connections": 1.5}, "connections"),
        ({"connections": None}, "connections"),
        ({"mails_per_session": 0}, "mails_per_session"),
        ({"mails_per_minute": 0}, "mails_per_minute"),
        ({"username": ""}, "username"),
        ({"username": "al\nice"}, "username"),
        ({"username": "al\0ice"}, "username"),
        ({"username": 7}, "username"),
        ({"username": None}, "username"),
        ({"password": f"{PASSWORD}\n"}, "control character"),
        ({"password": f"{PASSWORD}\0"}, "control character"),
        ({"password": PASSWORD.encode()}, "password is a string"),
        ({"password_from": "env:X"}, "excludes password"),
        ({"password_from": PASSWORD}, "password_from"),
        ({"password": None, "password_from": PASSWORD}, "env:NAME or file:PATH"),
        ({"password": None, "password_from": f"env:{PASSWORD}"}, "env:NAME or file:PATH"),
        ({"password": None, "password_from": "env:"}, "env:NAME or file:PATH"),
        ({"password": None, "password_from": "env:A B"}, "env:NAME or file:PATH"),
        ({"password": None, "password_from": "file:"}, "env:NAME or file:PATH"),
        ({"password": None, "password_from": "file:/x\ny"}, "env:NAME or file:PATH"),
        ({"password": None, "password_from": 7}, "env:NAME or file:PATH"),
        ({"password": None, "password_from": "env:X", "username": None}, "username"),
        ({"owner": None}, "owner"),
        ({"owner": "a\nb"}, "owner"),
        ({"owner": "a" * 401}, "owner"),
        ({"networks": "public"}, "networks"),
        ({"networks": [7]}, "networks"),
        ({"networks": ["private"]}, "neither 'public' nor a network"),
        ({"networks": ["10.0.0.1/8"]}, "host bits"),
        ({"security": "plain"}, "in clear"),
        ({"security": "plain", "host": "localhost.example.org"}, "in clear"),
    ],
    ids=str,
)
def test_refused(changes, words):
    with pytest.raises(InvalidAccount) as caught:
        account(**changes)
    assert words in str(caught.value)
    assert isinstance(caught.value, OutboxError)
    shown = "".join(traceback.format_exception(caught.value))
    assert PASSWORD not in shown.replace("password_from=PASSWORD", "")


@pytest.mark.parametrize(
    "changes",
    [
        {"security": "plain", "host": "localhost"},
        {"security": "plain", "host": "127.0.0.1"},
        {"security": "plain", "host": "::1"},
        {"security": "plain", "verify": False},
        {"security": "plain", "username": None, "password": None},
        {"verify": "/etc/ca.pem"},
        {"password": None, "password_from": "env:SITE_PASSWORD"},
        {"password": None, "password_from": "file:/run/secrets/a b"},
        {"password": "pässwörd with spaces"},
        {"password": Secret(PASSWORD)},
        {"password": HIDDEN},
        {"mails_per_minute": 1},
        {"owner": "/acl_users:álice"},
        {"networks": ("public", "10.0.0.0/8", "fd00::/8")},
        {"networks": ["public"]},
        {"connect_timeout": 0.5},
        {"mailbox": "*"},
        {"mailbox": "@example.org"},
        {"mailbox": "Alice <alice@example.org>"},
    ],
    ids=str,
)
def test_accepted(changes):
    made = account(**changes)
    assert made.replace() == made


def test_password_is_never_shown(caplog):
    made = account()
    assert made.secret.reveal() == PASSWORD
    logging.getLogger("x").error("%s %r %s", made, made.secret, vars(made))
    texts = [repr(made), str(made), f"{made}", f"{made.secret}", str(made.public()), caplog.text]
    texts += [repr(vars(made)), repr([made]), repr(made.without_secret())]
    assert not [text for text in texts if PASSWORD in text]
    assert "***" in repr(made)
    for leak in (pickle.dumps, copy.deepcopy, json.dumps):
        with pytest.raises(TypeError) as caught:
            leak(made.secret)
        assert PASSWORD not in str(caught.value)
    with pytest.raises(TypeError):
        pickle.dumps(made)


def test_hidden():
    read = account().without_secret()
    assert read.password is HIDDEN
    assert read.secret.hidden
    with pytest.raises(TypeError, match="write-only"):
        read.secret.reveal()
    assert Account(mailbox="*", host="x.org").without_secret().password is None


def test_equality_and_hash():
    assert account() == account()
    assert hash(account()) == hash(account())
    assert account(password="other") != account()
    assert Secret("x") != "x"


def test_relay():
    assert account().relay == "smtp.example.org:587"
    assert account(host="2001:db8::1").relay == "[2001:db8::1]:587"


@pytest.mark.parametrize(
    ("port", "security"), [(25, "plain"), (465, "tls"), (587, "starttls"), (2525, "plain")]
)
def test_without_login(port, security):
    made = Account.without_login("relay.example.org", port)
    assert (made.host, made.port, made.security) == ("relay.example.org", port, security)
    assert made.username is None


@pytest.mark.parametrize(
    ("mailbox", "key"),
    [
        ("*", "*"),
        ("@Example.ORG", "@example.org"),
        ("@bücher.example", "@xn--bcher-kva.example"),
        ("Alice@Example.ORG", "alice@example.org"),
        ("a@bücher.example", "a@xn--bcher-kva.example"),
        ('"A, b"@example.org', '"a, b"@example.org'),
        ('"alice"@example.org', "alice@example.org"),
        ('"Al\\ice"@example.org', "alice@example.org"),
        ('"a\\ b"@example.org', '"a b"@example.org'),
        ('"a\\"\\\\b"@example.org', '"a\\"\\\\b"@example.org'),
        ('"a..b"@example.org', '"a..b"@example.org'),
        ("a@[192.0.2.1]", "a@[192.0.2.1]"),
        ("@[192.0.2.1]", "@[192.0.2.1]"),
        ("a@[IPv6:2001:DB8::1]", "a@[ipv6:2001:db8::1]"),
        ("@[IPv6:2001:DB8::1]", "@[ipv6:2001:db8::1]"),
    ],
)
def test_keys(mailbox, key):
    assert normalise_mailbox(mailbox) == key
    assert normalise_mailbox(key) == key


@pytest.mark.parametrize("bad", ["@[x", "@[1.2.3]", "@[::1%>]", "@", "@@x.org", "*@", "", b"\xff"])
def test_bad_mailboxes(bad):
    with pytest.raises(InvalidAccount):
        normalise_mailbox(bad)


@pytest.mark.parametrize(
    "sender", ["Alice@Example.org", "a@[192.0.2.1]", '"a@b"@x.org', "é@bücher.example"]
)
def test_candidates_are_what_accounts_are_kept_under(sender):
    exact, domain, default = candidates(sender)
    assert exact == normalise_mailbox(sender) == mailbox_key(sender)
    assert domain == normalise_mailbox("@" + sender.rpartition("@")[2])
    assert default == "*"


@given(st.text(max_size=30))
def test_normalised_once_is_normalised(text):
    try:
        key = normalise_mailbox(text)
    except InvalidAccount:
        return
    assert normalise_mailbox(key) == key
