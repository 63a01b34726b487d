"""`cpsmail doctor`: healthy, and with everything that it looks for."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_helpers import DEADLINE, MAIL, SECRET, Site
from cpsmailaccess_delivery import Outbox
from cpsmailaccess_delivery.cli import checks
from cpsmailaccess_delivery.envelope import Envelope, Route, digest
from cpsmailaccess_delivery.interfaces import LaneNote, Outcome, Settlement, State

ALICE = "alice@example.org"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.account(mailbox=ALICE, username="alice", password=SECRET)
    return site


def findings(site: Site, check: str, code: int = 0) -> list[tuple[str, str]]:
    answer = site.json("doctor", code=code)
    assert answer["ok"] is not bool(code)
    return [(f["level"], f["text"]) for f in answer["findings"] if f["check"] == check]


@contextlib.contextmanager
def delivering(outbox: Outbox) -> Iterator[None]:
    processor = outbox.processor()
    processor.start()
    deadline = time.monotonic() + DEADLINE
    while not outbox.presence.deliverers():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield
    assert processor.stop()


def test_healthy(site: Site) -> None:
    with site.outbox() as outbox, delivering(outbox):  # as another process would
        answer = site.json("doctor")
        output = site.run("doctor").output
    bad = [finding for finding in answer["findings"] if finding["level"] != "ok"]
    assert bad == [], bad
    looked_at = {finding["check"] for finding in answer["findings"]} | {"passwords"}  # it has none
    assert looked_at == {"settings", *checks._CHECKS}
    assert "ok    write      a mail can be written" in output
    assert site.json("queue")["mails"] == []


def test_nothing_is_changed(site: Site) -> None:
    site.send()
    before = sorted(path for path in site.path.rglob("*") if path.parent.name != "presence")
    site.run("doctor")
    after = sorted(path for path in site.path.rglob("*") if path.parent.name != "presence")
    assert after == before


def test_access(site: Site) -> None:
    site.send()
    (mail,) = (site.path / "new").iterdir()
    mail.chmod(0o644)
    (level, text), *_ = findings(site, "access", code=1)
    assert level == "fail"
    assert str(mail) in text
    mail.chmod(0o600)
    site.path.chmod(0o755)
    assert "755" in findings(site, "access", code=1)[0][1]
    site.path.chmod(0o700)
    (site.path / "accounts" / "link").symlink_to("/etc/passwd")
    assert "symbolic link" in findings(site, "access", code=1)[0][1]


def test_queue_that_zope_sendmail_made(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for name in ("", "new", "cur", "tmp"):
        (site.path / name).mkdir(mode=0o755)
        (site.path / name).chmod(0o755)
    for name in ("1700000000.1.host.2", ".rejected-1700000001.1.host.2", ".sending-1.1.host.2"):
        path = site.path / "new" / name
        path.write_bytes(b"X-Zope-From: a@b.c\nX-Zope-To: d@e.f\n" + MAIL)
        path.chmod(0o644)
    site.account(mailbox=ALICE)
    ((level, text),) = findings(site, "access", code=1)  # an old mail is due, too
    assert (level, "zope.sendmail" in text) == ("warn", True)
    assert f"chmod -R go= '{site.path}'" in site.run("doctor", code=1).output
    assert [text.split(" of ")[0] for _, text in findings(site, "leftovers", code=1)] == [
        "1 .sending-*",
        "1 .rejected-*",
    ]
    site.send()
    ours = next(path for path in (site.path / "new").iterdir() if ",L=" in path.name)
    ours.chmod(0o644)
    assert findings(site, "access", code=1)[0][0] == "fail"


def test_advice_for_refused_mails(site: Site) -> None:
    site.send()
    with site.outbox() as outbox:
        (entry,) = outbox.queue.entries()
        lease = outbox.spool.claim(entry)
        assert lease is not None
        outcomes = {"bob@example.net": Outcome(State.REFUSED, "550 no")}
        lease.settle(Settlement(State.REFUSED, outcomes, attempts=1))
    assert "--state refused; then retry or cancel" in site.run("doctor").output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_owners(site: Site) -> None:
    site.send()
    (mail,) = (site.path / "new").iterdir()
    os.chown(mail, 12345, -1)
    assert ("fail", "1 files belong to other users") in findings(site, "access", code=1)


def test_key(site: Site) -> None:
    key = site.path.with_name("outbox.key")
    content = key.read_bytes()
    key.chmod(0o644)
    assert "chmod 600" in str(findings(site, "key", code=1))
    key.chmod(0o600)
    site.account(mailbox="carol@example.org")
    key.unlink()
    ((level, text),) = findings(site, "key", code=1)  # once, however many accounts there are
    assert (level, "is lost" in text) == ("fail", True)
    site.environ["CPSMAIL_KEY"] = "A" * 43
    assert "sealed with the key" in str(findings(site, "key", code=1))
    site.environ["CPSMAIL_KEY"] = "abc"
    (finding,) = (f for f in site.json("doctor", code=1)["findings"] if f["check"] == "key")
    assert "random bytes in base64" in finding["text"]
    assert finding["advice"] == ""  # nothing is wrong with the disk
    del site.environ["CPSMAIL_KEY"]
    key.write_bytes(content)
    key.chmod(0o600)
    account, _ = (site.path / "accounts").glob("*.account")
    account.write_bytes(account.read_bytes().replace(b"127.0.0.1", b"127.0.0.2"))
    assert "seal does not hold" in str(findings(site, "key", code=1))


def test_no_accounts(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.outbox().close()
    assert ("warn", "there are no accounts") in findings(site, "key")


def test_password_elsewhere(site: Site) -> None:
    site.run("accounts", "set", ALICE, "--password-from", "env:TEST_ALICE_PASSWORD")
    ((level, text),) = findings(site, "passwords")
    assert level == "warn"
    assert "TEST_ALICE_PASSWORD" in text
    site.environ["TEST_ALICE_PASSWORD"] = SECRET
    ((level, text),) = findings(site, "passwords")
    assert level == "ok"
    assert SECRET not in text


class _Space:
    f_frsize, f_files = 4096, 10
    f_bavail, f_favail = 100, 999


def test_disk(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: _Space)
    assert findings(site, "disk", code=1) == [("fail", "0 MiB free"), ("fail", "999 inodes free")]


def test_spool_that_cannot_be_written(site: Site) -> None:
    (site.path / "tmp").rmdir()
    (site.path / "tmp").write_text("")
    assert findings(site, "outbox", code=1) or findings(site, "write", code=1)[0][0] == "fail"


def test_clock(site: Site) -> None:
    block = b"X-Zope-From: a@b.c\nX-Zope-To: d@e.f\n" + MAIL
    ahead = int(time.time()) + 7200
    (site.path / "new" / f"{ahead}.1.host").write_bytes(block)
    (site.path / "new" / f"{ahead}.1.host").chmod(0o600)
    ((level, text),) = findings(site, "clock")
    assert (level, text) == ("warn", "1 mail was queued in the future, by up to 2h")


def test_oldest_mail(site: Site) -> None:
    block = b"X-Zope-From: a@b.c\nX-Zope-To: d@e.f\n" + MAIL
    for seconds, level, code in ((1200, "warn", 0), (9 * 3600, "fail", 1)):
        path = site.path / "new" / f"{int(time.time()) - seconds}.1.host"
        path.write_bytes(block)
        path.chmod(0o600)
        assert findings(site, "queue", code=code)[0][0] == level


def test_mails_for_a_person(site: Site) -> None:
    site.run("hold", site.send())
    assert ("warn", "1 mail is held, and waits for a person") in findings(site, "queue")


@pytest.mark.parametrize("trouble", ["account", "login"])
def test_lanes(site: Site, trouble: str) -> None:
    now = time.time()
    note = LaneNote(ALICE, trouble, "535 bad \x1b[31m", now - 60, now + 60)
    with site.outbox() as outbox:
        outbox.spool.note_lane(digest(ALICE), note)
    ((level, text),) = findings(site, "lanes")
    assert (level, text) == ("warn", f"{ALICE} waits since 1m: {note.reason}")
    output = site.run("doctor").output
    assert f"-> cpsmail accounts check '{ALICE}'" in output
    assert "\x1b" not in output


def test_what_dead_processes_left(site: Site) -> None:
    assert findings(site, "leftovers") == [("ok", "dead processes left nothing")]
    if not (child := os.fork()):
        outbox = site.outbox()
        outbox.spool.stage(Envelope(ALICE, ("b@c.d",), Route(ALICE)), MAIL)
        outbox.vault.stage(ALICE, outbox.vault.get(ALICE))
        os._exit(0)
    os.waitpid(child, 0)
    levels = findings(site, "leftovers")
    assert ("warn", "processes died and left 1 file of a mail in tmp/") in levels
    assert ("warn", "processes died and left 1 change of an account") in levels


def test_who_delivers(site: Site) -> None:
    ((level, text),) = findings(site, "processes")
    assert (level, "nothing delivers" in text) == ("warn", True)
    with site.outbox() as outbox:
        ((level, text),) = findings(site, "processes")
        assert level == "warn"  # whoever has it open may only send
        assert text == "1 other process has the outbox open: nothing delivers"
        with delivering(outbox):
            ((level, text),) = findings(site, "processes")
    assert (level, text) == ("ok", "1 process delivers; 1 has the outbox open")


def test_journal(site: Site) -> None:
    site.run("cancel", site.send())
    path = site.path / "journal.sqlite"
    path.write_bytes(b"no database" * 1000)
    path.chmod(0o600)
    ((level, text),) = findings(site, "journal", code=1)
    assert (level, str(path) in text) == ("fail", True)


def test_no_outbox(tmp_path: Path) -> None:
    site = Site(tmp_path)
    answer: Any = site.json("doctor", code=1)
    assert answer["findings"][-1]["check"] == "outbox"
