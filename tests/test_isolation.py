"""No secret anywhere: a whole life of an outbox, and a search of everything that is left of it."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import traceback
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import transaction
from zope.component import getGlobalSiteManager
from zope.configuration.xmlconfig import string

from cli_helpers import DEADLINE, MAIL, Site
from conftest import clean_components
from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.errors import OutboxError
from cpsmailaccess_delivery.testing import SMTPServer
from cpsmailaccess_delivery.testing.certificates import Authority

#: Not ASCII, and with what JSON, URLs, shells, XML and percent formats write in another way.
PASSWORDS = {
    "cli@example.org": "cli-päss wörd/+&<%s>'1",
    "api@example.org": "api-päss wörd/+&<%s>'2",
    "env@example.org": "env-päss wörd/+&<%s>'3",
    "file@example.org": "file-päss wörd/+&<%s>'4",
    "bad@example.org": "bad-päss wörd/+&<%s>'5",
}
USERS = {f"login-{mailbox}": password for mailbox, password in PASSWORDS.items()}


def forms(text: bytes) -> set[bytes]:
    """Return a secret as it might stand somewhere: as it is, encoded, quoted."""
    as_text = text.decode("utf-8", "backslashreplace")
    found = {text, text.hex().encode(), text.hex().upper().encode(), base64.b32encode(text)}
    for before in (b"", b"x", b"xx"):  # in the middle of something longer, too
        encoded = base64.b64encode(before + text)
        start = {0: 0, 1: 2, 2: 3}[len(before)]
        found |= {encoded[start:-4], base64.urlsafe_b64encode(before + text)[start:-4]}
    for quoted in (
        *(repr(as_text)[1:-1], ascii(as_text)[1:-1], repr(text)[2:-1], json.dumps(as_text)[1:-1]),
        *(urllib.parse.quote(as_text), urllib.parse.quote_plus(as_text)),
        *(as_text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"), as_text[1:-1]),
    ):
        found.add(quoted.encode("utf-8", "surrogateescape"))
    return {form for form in found if len(form) > 8}


def quotings(text: str) -> list[str]:
    """Return how the programs of a relay might quote what they were told."""
    data = text.encode()
    forms = ("\\x%02x", "\\x%02X", "\\%03o", "%%%02X", "=%02X")
    quoted = ["".join(chr(b) if b < 127 else form % b for b in data) for form in forms]
    return [text, *quoted, repr(data)[2:-1], ascii(text)[1:-1], json.dumps(text)[1:-1]]


def search(secrets: dict[str, set[bytes]], where: dict[str, bytes]) -> list[str]:
    return [
        f"{whose} in {place}"
        for place, content in where.items()
        for whose, shapes in secrets.items()
        if any(shape in content for shape in shapes)
    ]


def test_the_search_finds() -> None:
    """Whoever searches must be able to find."""
    password = PASSWORDS["cli@example.org"]
    shapes = {"x": forms(password.encode())}
    for text in (
        password.encode(),
        repr(Account(mailbox="*", host="h")).encode() + ascii(password).encode(),
        json.dumps([password]).encode(),
        base64.b64encode(b"\0login\0" + password.encode()),
        base64.b64encode(b"\0alogin\0" + password.encode()),
        base64.b64encode(password.encode()),
        urllib.parse.urlencode({"a": password}).encode(),
    ):
        assert search(shapes, {"there": text}) == ["x in there"], text
    assert not search(shapes, {"there": b"cli-pass word" * 100})


def children_of(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += children_of(int(child))
    return found


@pytest.fixture
def no_registry():
    clean_components()
    yield
    clean_components()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.usefixtures("no_registry")
def test_a_whole_life(tmp_path: Path, monkeypatch) -> None:
    site = Site(tmp_path)
    authority = Authority(tmp_path)
    seen: dict[str, bytes] = {}
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    monkeypatch.setattr(logging.getLogger(), "level", logging.DEBUG)
    logging.getLogger("cpsmailaccess_delivery").addHandler(handler)
    logging.getLogger("cpsmailaccess_delivery").setLevel(logging.DEBUG)
    password_file = tmp_path / "file.password"
    password_file.write_text(PASSWORDS["file@example.org"] + "\n")
    password_file.chmod(0o600)
    monkeypatch.setenv("ENV_PASSWORD", PASSWORDS["env@example.org"])
    tls = SMTPServer(security="tls", context=authority.server_context(), users=USERS)
    plain = SMTPServer(users={**USERS, "login-bad@example.org": "another"})
    try:
        with tls, plain:
            _live(site, tls, plain, authority, seen, password_file)
    finally:
        logging.getLogger("cpsmailaccess_delivery").removeHandler(handler)
        logging.getLogger("cpsmailaccess_delivery").setLevel(logging.NOTSET)
    seen["the log of this process"] = log.getvalue().encode()
    key_file = tmp_path / "outbox.key"
    for path in tmp_path.rglob("*"):
        if path.is_file() and path != password_file:
            seen[str(path.relative_to(tmp_path))] = path.read_bytes()
    key = base64.b64decode(key_file.read_bytes())
    secrets = {mailbox: forms(text.encode()) for mailbox, text in PASSWORDS.items()}
    assert search(secrets, seen) == []
    size = sum(map(len, seen.values()))
    shapes = sum(map(len, secrets.values()))
    print(f"{len(secrets)} passwords in {shapes} forms, in {len(seen)} places of {size:,} bytes")
    del seen["outbox.key"]
    secrets = {"the key": {key, key.hex().encode(), base64.b64encode(key), repr(key).encode()}}
    assert search(secrets, seen) == []
    assert len(seen) > 40, "is everything looked at?"
    assert {login.accepted for login in plain.logins} == {True, False}


def _live(site, tls, plain, authority, seen, password_file) -> None:
    def note(place: str, text: str | bytes) -> None:
        seen[place] = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text

    def command(*args: str, input: bytes | None = None) -> None:
        result = site.run(*args, input=input, code=None)
        note("cpsmail " + " ".join(args), result.output + repr(result.exception))

    # Accounts by every way there is
    command(
        *("-v", "accounts", "set", "cli@example.org", "--host", "127.0.0.1"),
        *("--port", str(tls.port), "--security", "tls", "--ca-file", str(authority.ca_file)),
        *("--username", "login-cli@example.org", "--password-stdin"),
        input=PASSWORDS["cli@example.org"].encode(),
    )
    local = {"host": "127.0.0.1", "port": plain.port, "security": "plain"}
    outbox = site.outbox()
    with transaction.manager:
        for mailbox in ("api@example.org", "bad@example.org"):
            made = Account(
                mailbox=mailbox,
                username=f"login-{mailbox}",
                password=PASSWORDS[mailbox],
                **local,
            )
            outbox.accounts.put(made)
            note(f"repr of {mailbox}", f"{made!r} {made} {vars(outbox)!r} {made.public()!r}")
            for value in (made, made.password, outbox.keys.load()):
                with pytest.raises(TypeError) as caught:
                    pickle.dumps(value)
                note(f"pickle of {type(value)}", str(caught.value))
        outbox.accounts.put(
            Account(
                mailbox="file@example.org",
                username="login-file@example.org",
                password_from=f"file:{password_file}",
                **local,
            )
        )
    string(
        '<configure xmlns="http://namespaces.zope.org/zope"'
        ' xmlns:mail="http://namespaces.zope.org/mail" i18n_domain="x">'
        '<include package="zope.component" file="meta.zcml" />'
        '<include package="cpsmailaccess_delivery" file="meta.zcml" />'
        f'<mail:smtpAccount queuePath="{site.path}" mailbox="env@example.org"'
        f' hostname="127.0.0.1" port="{plain.port}" security="plain"'
        ' username="login-env@example.org" passwordFrom="env:ENV_PASSWORD" /></configure>'
    )
    note("the registry", repr(list(getGlobalSiteManager().registeredUtilities())))

    # What goes wrong
    for wrong in (
        {"mailbox": "x y"},
        {"port": -1},
        {"security": "none"},
        {"host": "a b"},
        {"password_from": PASSWORDS["cli@example.org"], "password": None},
        {"username": "a\nb"},
        {"security": "plain", "host": "relay.example.org"},
        {"password": PASSWORDS["cli@example.org"] + "\n"},
    ):
        try:
            Account(
                **{
                    "mailbox": "*",
                    "host": "h.example",
                    "username": "u",
                    "password": PASSWORDS["cli@example.org"],
                    **wrong,
                }
            )
        except OutboxError as error:
            lines = traceback.TracebackException.from_exception(error).format()
            note(f"wrong {sorted(wrong)}", f"{error!r} {vars(error)} " + "".join(lines))
        else:
            pytest.fail(f"{wrong} was taken")

    # Deliver
    port = free_port()
    out, err = site.path.with_name("run.out"), site.path.with_name("run.err")
    environ = {**site.environ, "ENV_PASSWORD": os.environ["ENV_PASSWORD"]}
    with out.open("wb") as stdout, err.open("wb") as stderr:
        running = subprocess.Popen(
            site.process_command("-v", "run", "--workers", "2", "--metrics-port", str(port)),
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )
    try:
        for mailbox in PASSWORDS:
            with transaction.manager:
                outbox.delivery.send(mailbox, ["bob@example.net"], MAIL)
        tls.wait_for(1, DEADLINE)
        plain.wait_for(3, DEADLINE)
        plain.wait_until(lambda: any(not login.accepted for login in plain.logins), DEADLINE)
        # A relay that says again what it was told
        echo = PASSWORDS["bad@example.org"]
        token = base64.b64encode(f"\0login-bad@example.org\0{echo}".encode()).decode()
        for said in (token, *quotings(echo)):
            plain.on("AUTH", reply=f"535 5.7.8 no: <{said}>\r\n".encode(), times=1)
            command("-v", "accounts", "check", "bad@example.org")
            assert b"no: <***>" in seen["cpsmail -v accounts check bad@example.org"], said
        processes = children_of(running.pid)
        assert len(processes) >= 3
        for pid in processes:
            note(f"argv of {pid}", Path(f"/proc/{pid}/cmdline").read_bytes())
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            kept = [each for each in variables if not each.startswith(b"ENV_PASSWORD=")]
            note(f"environ of {pid}", b"\0".join(kept))
        for number in range(2):
            url = f"http://127.0.0.1:{port + number}/metrics"
            with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
                note(f"metrics {number}", answer.read())
        for args in (
            *(("queue", "--json"), ("accounts", "list", "--json"), ("accounts", "list")),
            *(("doctor", "--json"), ("stats", "--json"), ("trace", "bad@example.org", "--json")),
            *(("show", entry.id, "--json") for entry in outbox.queue.entries()),
            *(("-v", "accounts", "check", mailbox, "--json") for mailbox in PASSWORDS),
            ("accounts", "rekey", "--json"),
        ):
            command(*args)
    finally:
        running.send_signal(signal.SIGTERM)
        assert running.wait(DEADLINE) == 0
    note("repr of everything", repr(vars(outbox)) + repr([vars(a) for a in outbox.accounts.list()]))
    outbox.close()
