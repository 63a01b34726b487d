"""`make demo`, `make run` and the mails that they send."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

ROOT = Path(__file__).parents[1]
MAILS = ROOT / "examples" / "mails"


@pytest.fixture(autouse=True)
def demo_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def run(*arguments, **environment):
    """Run it as `make demo` does: a process of its own, for it configures the registry."""
    return subprocess.run(
        [sys.executable, "-m", "demo", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples"), **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize("columns", ["100", "50"])
def test_all_is_as_it_must_be(tmp_path, columns):
    done = run(TMPDIR=str(tmp_path), COLUMNS=columns)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.count("accepted") == len(list(MAILS.glob("*.eml"))) + 1
    assert "20 of 20 arrived once" in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_names_are_whole_at_80_columns():
    done = run(COLUMNS="80")
    rows = [line for line in done.stdout.splitlines() if " accepted " in line]
    assert {row.split(" ")[0] for row in rows} >= {path.stem for path in MAILS.glob("*.eml")}
    mailboxes = set(re.findall(r"^Mailbox (\S+) leaves", done.stdout, re.MULTILINE))
    assert len(mailboxes) == 3
    assert {re.findall(r"(\S+) +(?:tls|starttls|plain) ", row)[0] for row in rows} == mailboxes


def test_somebody_s_own_mails(tmp_path):
    mail = b"From: me@home.example\nTo: you@home.example, y\xc3\xb6u@home.example\n\nHi\n"
    for name in ("one.eml", "TWO.EML", "three.Eml", "no.txt"):
        (tmp_path / name).write_bytes(mail)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 arrived once" in done.stdout


def test_what_is_no_directory_is_said(tmp_path):
    (tmp_path / "one.eml").write_bytes(b"From: a@b.example\nTo: a@b.example\n\n")
    (tmp_path / "empty").mkdir()
    for name, why in (
        ("none", "no such directory"),
        ("one.eml", "is a file"),
        ("empty", "has no .eml file that can be sent"),
    ):
        done = run(tmp_path / name, COLUMNS="400")
        assert done.returncode == 2
        assert f"WRONG  {tmp_path / name}: {why}" in done.stdout
        assert done.stderr == ""


def test_what_cannot_be_sent_is_said(tmp_path):
    (tmp_path / "bad.eml").write_bytes(b"To: you@home.example\n\nHi\n")
    (tmp_path / "id.eml").write_bytes(b"From: a@b.example\nTo: a@b.example\nMessage-Id: x\n\n")
    (tmp_path / "mbox.eml").write_bytes(
        b"From a@b.example Mon\nFrom: a@b.example\nTo: a@b.example\n"
    )
    done = run(tmp_path)
    assert done.returncode == 1
    assert 'WRONG  mbox: begins with the "From " line of an mbox' in done.stdout
    assert "WRONG  bad: has no address in From" in done.stdout
    assert "WRONG  id: could not be sent: Malformed Message-Id" in done.stdout
    (tmp_path / "id.eml").unlink()
    assert run(tmp_path).returncode == 2


@contextmanager
def site(place, mails) -> Iterator[tuple[str, str]]:
    """Run a site as `make run` does; yield what it says and its URL; stop it as Ctrl-C does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "demo.site", str(mails)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "examples"),
            "CPSMAIL_SITE": str(place),
            "PORT": "0",
            "COLUMNS": "100",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    alarm = threading.Timer(100, process.kill)
    alarm.start()
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("Ctrl-C"):
                break
        url = re.search(r"http://localhost:\d+", said)
        assert url, said
        yield said, url[0]
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait() == 0, rest
        assert rest == "Stopped; `make run` goes on with the same data.\n"
    finally:
        alarm.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_site_stops_and_goes_on(tmp_path):
    pytest.importorskip("Zope2", reason="Zope is in the extra [test]")
    mails, place = tmp_path / "mails", tmp_path / "site"
    mails.mkdir()
    for number in range(3):
        shutil.copy(sorted(MAILS.glob("*.eml"))[number], mails)
    with site(place, mails) as (said, url):
        assert "3 of 3 arrived once" in said
        login = re.search(r"Log in as +(\S+), password (\S+)", said).groups()
        page = fetched(f"{url}/demo/mail/manage_main", login)
        assert "@example.com</a>" in page
        users = dict(re.findall(r"Log in as +(\S+), password (\S+)", said))
        for name in ("alice", "bob"):
            page = fetched(f"{url}/demo/@@compose", (name, users[name]))
            assert re.findall(r">(\w+)@site.example</option>", page) == [name]
        with pytest.raises(HTTPError, match="401"):
            fetched(f"{url}/demo/mail/manage_main", ("admin", "x"))
    with site(place, mails) as (said, url):
        assert "3 of 3 arrived once" in said
        assert "password" not in said.partition("ZMI")[2]
        assert fetched(f"{url}/demo/mail/manage_main", login)
    assert login[1].encode() not in b"".join(
        path.read_bytes() for path in place.rglob("*") if path.is_file()
    )


def fetched(url: str, login: tuple[str, str]) -> str:
    word = base64.b64encode(":".join(login).encode()).decode()
    with urlopen(Request(url, headers={"Authorization": f"Basic {word}"}), timeout=60) as answer:
        return answer.read().decode()


SABOTAGE = """
import contextlib, sys
import demo.__main__ as demo

three_relays = demo.three_relays

@contextlib.contextmanager
def bad_relays(*arguments):
    with three_relays(*arguments) as relays:
        relays[0].server.on("BODY", reply="554 5.7.1 no dots", match="Subject: Dots")
        take = relays[0].server.take
        def change(mail):
            mail.data = mail.data.replace(b"half past twelve", b"half past three")
            take(mail)
        relays[0].server.take = change
        yield relays

demo.three_relays = bad_relays
sys.exit(demo.main([]))
"""


def test_a_relay_that_refuses_or_changes_a_mail_is_found_out():
    done = subprocess.run(
        [sys.executable, "-c", SABOTAGE],
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "18 of 20 arrived once" in done.stdout
    assert "WRONG  01-plain-ascii: differs at byte" in done.stdout
    assert "WRONG  08-lines-of-dots: " in done.stdout
    assert "554 5.7.1 no dots" in done.stdout


@pytest.mark.parametrize(
    ("sent", "received", "wrong"),
    [
        ("Message-Id: <1>\nDate: x\n\nb\n", "Message-Id: <1>\r\nDate: x\r\n\r\nb\r\n", ""),
        ("Message-Id: <1>\rDate: x\r\rb", "Message-Id: <1>\r\nDate: x\r\n\r\nb\r\n", ""),
        ("Message-Id: <1>\nDate: x\nBCC: a,\n\tb\n\nb", "Message-Id: <1>\nDate: x\n\nb\n", ""),
        ("Message-Id: <1>\nDate: x\n\nBcc: b", "Message-Id: <1>\nDate: x\n\n", "byte 25 of 32"),
        ("Message-Id: <1>\nDate: x\n", "Message-Id: <1>\nDate: x\n", ""),
        ("Message-Id: <1>\nDate: x\n", "X: y\nMessage-Id: <1>\nDate: x\n", "byte 0 "),
        (
            "A: b\n\nc",
            "Message-Id: <1>\nDate: Mon, 23 Nov 2026 10:00:00 +0100\nA: b\n\nc",
            "",
        ),
        ("A: b\n\nc", "A: b\n\nc", "message-id was missing"),
    ],
)
def test_compare(sent, received, wrong):
    from demo.compare import difference

    found = difference(sent.encode(), received.encode())
    assert wrong in found
    assert bool(wrong) is bool(found)


def test_the_made_mail_has_five_mebibytes():
    from demo.mails import make_large_mail

    assert len(make_large_mail().data) == pytest.approx(5 * 1024 * 1024, rel=0.01)


def test_addresses_come_from_the_header():
    from demo.mails import read_mails

    mails, unusable = read_mails(MAILS)
    assert unusable == {}
    by_name = {mail.name[3:]: mail for mail in mails}
    assert len(by_name) >= 12
    assert by_name["smtputf8-addresses"].sender == "jürgen@bücher.example"
    assert by_name["smtputf8-addresses"].recipients == ("用户@例え.example", "δοκιμή@example.net")
    assert by_name["bcc"].recipients == (
        "bob@example.net",
        "carol@example.net",
        "dave@example.net",
        "erin@example.net",
        "frank@example.net",
    )


def test_the_dkim_signature_is_valid():
    """RFC 6376 with simple/simple, which this mail uses; the key is in the README."""
    header, _, body = (MAILS / "06-dkim-signed.eml").read_bytes().partition(b"\r\n\r\n")
    signature, *fields = re.split(rb"\r\n(?![ \t])", header)
    tags = dict(re.findall(rb"(\w+)=([^;]*)", re.sub(rb"\s", b"", signature)))
    digest = hashlib.sha256(re.sub(rb"(\r\n)*\Z", b"", body) + b"\r\n").digest()
    assert base64.b64decode(tags[b"bh"]) == digest
    by_name = {field.partition(b":")[0]: field for field in fields}
    signed = b"".join(by_name[name] + b"\r\n" for name in tags[b"h"].split(b":"))
    signed += signature[: signature.index(b"\tb=") + 3]
    readme = "".join((MAILS / "README.rst").read_text().partition("p=")[2].split())
    key = serialization.load_der_public_key(base64.b64decode(readme))
    assert isinstance(key, rsa.RSAPublicKey)
    key.verify(base64.b64decode(tags[b"b"]), signed, padding.PKCS1v15(), hashes.SHA256())


def test_no_private_key_is_stored():
    assert not [path for path in MAILS.iterdir() if b"PRIVATE KEY" in path.read_bytes()]
