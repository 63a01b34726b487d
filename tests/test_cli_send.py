"""`cpsmail send`: sendmail's manners, through the real spool."""

from __future__ import annotations

import subprocess
import sys
from email import message_from_bytes
from pathlib import Path

import pytest

from cli_helpers import DEADLINE, MAIL, Site
from cpsmailaccess_delivery.cli.mail_input import Mail, split_addresses
from cpsmailaccess_delivery.errors import InvalidAddress


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.environ["CPSMAIL_HELO_NAME"] = "host.example.org"
    site.account()
    return site


def sent(site: Site) -> tuple[str, list[str], bytes]:
    """Return sender, recipients and message of the one mail in the queue."""
    with site.outbox() as outbox:
        (record,) = outbox.queue.records()
        envelope = record.envelope
        return envelope.sender, list(envelope.recipients), outbox.queue.message(record)


def test_recipients_as_arguments(site: Site) -> None:
    result = site.run(
        "send", "-f", "alice@example.org", "bob@example.net", "c@d.e, f@g.h", input=MAIL
    )
    assert result.output == ""
    sender, recipients, message = sent(site)
    assert sender == "alice@example.org"
    assert recipients == ["bob@example.net", "c@d.e", "f@g.h"]
    assert message.endswith(MAIL)


def test_wishes(site: Site) -> None:
    site.run("send", "--not-before", "2100-01-01T00:00Z", "--priority", "8", "b@x.org", input=MAIL)
    site.run("send", "--not-before", "4102444801.5", "--priority", "low", "b@x.org", input=MAIL)
    site.run("send", "--undo", "3600", "b@x.org", input=MAIL)
    with site.outbox() as outbox:
        first, second, third = outbox.queue.entries()
    assert (first.due, first.priority) == (4102444800.0, 8)
    assert (second.due, second.priority) == (4102444801.5, 2)
    assert (third.due - third.staged_at) == pytest.approx(3600, abs=DEADLINE)


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("--not-before", "soon", 64),
        ("--not-before", "nan", 65),
        ("--undo", "-1", 65),
        ("--undo", "x", 64),
        ("--priority", "10", 65),
        ("--priority", "urgent", 65),
        ("--notify", "sometimes", 65),
        ("--notify", "", 65),
        ("--ret", "body", 65),
    ],
)
def test_a_wish_that_makes_no_sense(site: Site, option: str, value: str, code: int) -> None:
    site.run("send", option, value, "b@x.org", input=MAIL, code=code)


@pytest.mark.parametrize(
    ("options", "notify", "ret"),
    [
        (("--notify", "delay,success", "--ret", "headers"), "success,delay", "headers"),
        (("-N", "never", "-R", "hdrs"), "never", "headers"),
        (("-N", "SUCCESS", "-R", "FULL"), "success", "full"),
    ],
)
def test_what_the_sender_is_told_of(
    site: Site, options: tuple[str, ...], notify: str, ret: str
) -> None:
    site.run("send", *options, "b@x.org", input=MAIL)
    with site.outbox() as outbox:
        (record,) = outbox.queue.records()
    assert (record.envelope.notify, record.envelope.ret) == (notify, ret)


def test_recipients_from_the_header(site: Site) -> None:
    message = (
        b"From: Alice <alice@example.org>\nTo: Bob <bob@example.net>,\n\troot\n"
        b"Cc: friends: carol@example.net;\nBCC: =?utf-8?q?D=C3=B6?= <dora@example.net>\n\nx\n"
    )
    site.run("send", "-ti", "x@example.net", input=message)
    sender, recipients, stored = sent(site)
    assert sender == "alice@example.org"
    assert recipients == [
        "x@example.net",
        "bob@example.net",
        "root@host.example.org",
        "carol@example.net",
        "dora@example.net",
    ]
    assert b"dora" not in stored


def test_resent_fields_count_alone() -> None:
    mail = Mail.parse(b"To: a@b.c\nResent-To: d@e.f\nResent-Bcc: g@h.i\n\n")
    assert mail.recipients("host") == ["d@e.f", "g@h.i"]


def test_dot_ends_the_mail(site: Site) -> None:
    site.run("send", "b@example.net", input=b"Subject: x\n\none\n.\ntwo\n")
    assert sent(site)[2].endswith(b"\n\none\n")


@pytest.mark.parametrize("option", ["-i", "-oi", "--ignore-dots"])
def test_dot_is_text(site: Site, option: str) -> None:
    site.run("send", option, "b@example.net", input=b"Subject: x\n\none\n.\ntwo\n")
    assert sent(site)[2].endswith(b"\n\none\n.\ntwo\n")


def test_sendmails_harmless_options(site: Site) -> None:
    options = ["-oem", "-odb", "-bm", "-B8BITMIME", "-V", "id", "-G", "-em"]
    site.run("send", *options, "-i", "-f", "a@b.c", "--", "d@e.f", input=MAIL)
    assert sent(site)[1] == ["d@e.f"]


@pytest.mark.usefixtures("charsets")
def test_local_names_and_missing_from(site: Site) -> None:
    site.run("send", "-f", "cron", "-F", "Dæmon", "root", input=b"Subject: x\r\n\r\nbody\r\n")
    sender, recipients, message = sent(site)
    assert (sender, recipients) == ("cron@host.example.org", ["root@host.example.org"])
    assert message_from_bytes(message)["From"] == "=?utf-8?b?RMOmbW9u?= <cron@host.example.org>"
    assert b"\n" not in message.replace(b"\r\n", b"")


def test_input_without_header_is_a_body(site: Site) -> None:
    site.run("send", "-f", "a@b.c", "d@e.f", input=b"the disk is full: 100%\nhello\n")
    message = message_from_bytes(sent(site)[2])
    assert message["From"] == "a@b.c"
    assert message.get_payload() == "the disk is full: 100%\nhello\n"


def test_empty_line_after_the_header_is_optional() -> None:
    assert Mail.parse(b"Subject: x\nbody\n").data == b"Subject: x\n\nbody\n"
    assert Mail.parse(b"Subject: x").data == b"Subject: x\n\n"
    assert Mail.parse(b"From me Mon\nSubject: x\n\nb").data == b"Subject: x\n\nb"
    assert Mail.parse(b"").data == b"\n"


def test_null_sender(site: Site) -> None:
    site.run("send", "-f", "<>", "d@e.f", input=MAIL)
    assert sent(site)[0] == ""


def test_message_id(site: Site) -> None:
    assert site.run("send", "a@b.c", input=MAIL).output == ""
    verbose = site.run("send", "-v", "a@b.c", input=MAIL).output.strip()
    answer = site.json("send", "a@b.c", input=MAIL)
    assert verbose.endswith("@example.org")
    assert answer["recipients"] == ["a@b.c"]
    assert {verbose, answer["message_id"]} <= {
        mail["message_id"] for mail in site.json("queue")["mails"]
    }


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        ((), MAIL, 64),
        (("-bs", "a@b.c"), MAIL, 64),
        (("--no-such-option",), MAIL, 64),
        (("-F", "a\nb", "a@b.c"), MAIL, 64),
        (("bob@@example.net",), MAIL, 65),
        (("-f", "a b@c.d", "a@b.c"), MAIL, 65),
        (("a@b.c\nX: y",), MAIL, 65),
        (("-t",), b"Subject: x\n\n", 65),
        (("-t",), b"From: a@b.c\nTo: bob@example.net;carol@example.net\n\n", 65),
        (("a@b.c",), b"Message-Id: none\n\n", 65),
    ],
)
def test_what_is_refused(site: Site, args: tuple[str, ...], message: bytes, code: int) -> None:
    result = site.run("send", *args, input=message, code=code)
    assert "cpsmail: " in result.stderr
    assert site.json("queue")["mails"] == []


def test_no_account_for_the_sender(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.account(mailbox="carol@example.org")
    result = site.run("send", "a@b.c", input=MAIL, code=67)
    assert "no account for alice@example.org" in result.stderr


def test_size_limit(site: Site) -> None:
    site.run("--set", "size_limit=1000", "send", "a@b.c", input=MAIL + b"x" * 1000, code=65)
    site.run("--set", "size_limit=1000", "send", "-i", "a@b.c", input=MAIL + b"x" * 1000, code=65)
    site.run("--set", "size_limit=1000", "send", "a@b.c", input=MAIL)


def test_disk_that_cannot_be_written(site: Site) -> None:
    (site.path / "tmp").rename(site.path / "gone")
    (site.path / "tmp").write_text("no directory")
    site.run("send", "a@b.c", input=MAIL, code=75)


@pytest.mark.parametrize(
    "text",
    [
        *("Bob <bob@", "<>", "a@b@c", "a@b.c;d@e.f", "a b", "mailto:a@b.c", "@b.c", "a:b@c.d"),
        *("<a@b.c> <d@e.f>", "a@b.c d@e.f", "undisclosed:", "a@b\x1b[31m"),
    ],
)
def test_no_recipient_is_lost_by_guessing(text: str) -> None:
    with pytest.raises(InvalidAddress):
        split_addresses(text, "host")


def test_lists_of_addresses() -> None:
    text = 'Bob Q. <bob@x.org>, root, "a, b"@x.org (comment), ,müller@bücher.de'
    assert split_addresses(text, "host") == [
        "bob@x.org",
        "root@host",
        '"a, b"@x.org',
        "müller@bücher.de",
    ]
    assert split_addresses("undisclosed-recipients:;", "host") == []


def test_through_a_pipe(site: Site) -> None:
    process = site.process("send", "-t", "-oi")
    out, err = process.communicate(MAIL, timeout=DEADLINE)
    assert (process.returncode, out, err) == (0, b"", b"")
    assert sent(site)[1] == ["bob@example.net"]


def test_user_without_name(site: Site) -> None:
    code = (
        "import getpass\n"
        "def nobody(): raise KeyError('uid')\n"
        "getpass.getuser = nobody\n"
        "from cpsmailaccess_delivery.cli import main\n"
        "main(['send', 'a@b.c'])\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], input=b"x\n", env=site.environ, timeout=DEADLINE, check=True
    )
    assert sent(site)[0] == "nobody@host.example.org"


def test_what_may_work_later_is_to_be_tried_again(site: Site) -> None:
    """Whoever pipes a mail here keeps it (sysexits.h), as sendmail's callers do."""
    pytest.importorskip("psycopg", reason="needs the extra [postgres]")
    site.environ["CPSMAIL_OUTBOX"] = "postgresql://nobody@127.0.0.1:1/none"
    output = site.run("send", "-f", "alice@example.org", "b@x.org", input=MAIL, code=75).output
    assert "cannot connect" in output


def test_a_mistyped_outbox_is_not_made(site: Site) -> None:
    """It would have no account to send through."""
    site.environ["CPSMAIL_OUTBOX"] = mistyped = f"{site.path}x"
    output = site.run("send", "-f", "alice@example.org", "b@x.org", input=MAIL, code=78).output
    assert f"outbox {mistyped}: there is none" in output
    assert not Path(mistyped).exists()


def test_nobody_s_sender(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.account(mailbox="alice@example.org")
    output = site.run("send", "-f", "eve@example.net", "b@x.org", input=MAIL, code=67).output
    assert "sender 'eve@example.net': no account" in output
    assert str(site.path) in output
