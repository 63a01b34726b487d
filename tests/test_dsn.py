"""What a sender wants to be told of: said to relays that offer DSN (RFC 3461), else done by us."""

from __future__ import annotations

import email
import email.policy
import subprocess
import sys
import time
from email.utils import parsedate_to_datetime

import pytest

from cpsmailaccess_delivery import dsn
from cpsmailaccess_delivery.bounce import compose
from cpsmailaccess_delivery.dsn import Wish
from cpsmailaccess_delivery.interfaces import Outcome, State
from cpsmailaccess_delivery.report import Action, Notice
from cpsmailaccess_delivery.testing import SMTPServer
from cpsmailaccess_delivery.testing.server import EXTENSIONS
from smtp_helpers import MODES, Drive, Letter, Relay
from test_notices import ALICE, DAY, HOUR, MESSAGE, drain, fields, notices, outbox, put, send

__all__ = ["outbox"]  # a fixture

WITHOUT_DSN = EXTENSIONS - {"DSN"}
NO_USER = "550 5.1.1 no such user"


@pytest.fixture(params=["a relay with DSN", "a relay without"])
def server(request):
    extensions = EXTENSIONS if request.param == "a relay with DSN" else WITHOUT_DSN
    with SMTPServer(extensions=extensions) as server:
        yield server


@pytest.fixture
def deaf():
    """A relay without DSN."""
    with SMTPServer(extensions=WITHOUT_DSN) as server:
        yield server


# In words


def test_what_may_be_wanted():
    assert len(dsn.NOTIFIES) == 8
    assert dsn.NOTIFIES[-1] == "success,failure,delay"


@pytest.mark.parametrize(
    ("notify", "wanted"),
    [
        ("", {"failure", "delay"}),
        ("never", set()),
        ("success", {"success"}),
        ("failure", {"failure"}),
        ("success,delay", {"success", "delay"}),
    ],
)
def test_what_is_wanted(notify, wanted):
    assert {event for event in dsn.EVENTS if dsn.wants(notify, event)} == wanted


def test_xtext():
    assert dsn.xtext("a+b=c d~!\x7f") == "a+2Bb+3Dc+20d~!+7F"
    assert dsn.xtext("".join(map(chr, range(33, 127)))).replace("+2B", "+").replace(
        "+3D", "="
    ) == "".join(map(chr, range(33, 127)))


@pytest.mark.parametrize(
    ("recipient", "said"),
    [
        ("bob@example.net", b" ORCPT=rfc822;bob@example.net"),
        ("bob+x=y@example.net", b" ORCPT=rfc822;bob+2Bx+3Dy@example.net"),
        ('"a b"@example.net', b' ORCPT=rfc822;"a+20b"@example.net'),
        ("j\u00f6rg+x@example.net", b" ORCPT=utf-8;j\\x{F6}rg\\x{2B}x@example.net"),
        ("x" * 600 + "@example.net", b""),
    ],
)
def test_the_original_recipient(recipient, said):
    assert dsn.recipient_parameters(Wish("success,delay"), recipient) == (
        b" NOTIFY=SUCCESS,DELAY" + said
    )
    assert dsn.recipient_parameters(Wish(ret="full"), recipient) == said


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (Wish(ret="full", envelope_id="1+1=2@x"), b" RET=FULL ENVID=1+2B1+3D2@x"),
        (Wish(ret="headers", envelope_id="a b"), b" RET=HDRS ENVID=a+20b"),
        (Wish(notify="never", envelope_id="\u00e4@x"), b""),
        (Wish(notify="never", envelope_id="x" * 101), b""),
        (Wish(notify="never"), b""),
    ],
)
def test_what_mail_says(wish, said):
    assert dsn.mail_parameters(wish) == said


# To relays


def test_a_relay_with_dsn_is_asked(outbox):
    with SMTPServer() as server:
        put(outbox, server)
        message_id = send(outbox, notify=["failure", "success"], ret="headers")
        assert drain(outbox).accepted == 1
        (mail,) = server.mails
    assert mail.params["RET"] == "HDRS"
    assert mail.params["ENVID"] == dsn.xtext(message_id)
    assert mail.recipient_params["bob@example.net"] == {
        "NOTIFY": "SUCCESS,FAILURE",
        "ORCPT": "rfc822;bob@example.net",
    }


def test_an_address_beyond_ascii_is_named_in_seven_bits(outbox):
    with SMTPServer() as server:
        put(outbox, server)
        send(outbox, to=["j\u00f6rg@example.net"], notify="delay")
        assert drain(outbox).accepted == 1
        (mail,) = server.mails
    assert mail.recipient_params["j\u00f6rg@example.net"] == {
        "NOTIFY": "DELAY",
        "ORCPT": "utf-8;j\\x{F6}rg@example.net",
    }


def test_nothing_is_said_that_nobody_wants(outbox, server):
    put(outbox, server)
    send(outbox)
    assert drain(outbox).accepted == 1
    (mail,) = server.mails
    assert set(mail.params) <= {"SIZE", "BODY"}
    assert mail.recipient_params.get("bob@example.net", {}) == {}


def test_nothing_is_said_to_a_relay_without(outbox, deaf):
    put(outbox, deaf)
    send(outbox, notify="never", ret="full")
    assert drain(outbox).accepted == 1
    (mail,) = deaf.mails
    assert set(mail.params) <= {"SIZE", "BODY"}


@pytest.mark.parametrize("keywords", MODES.values(), ids=MODES)
@pytest.mark.parametrize("offered", [True, False])
def test_whether_the_relay_will_tell(keywords, offered):
    """Whatever way mails travel, each knows whether its relay has taken the wish over."""
    wish = Wish("success", envelope_id="1@x")
    letters = [
        Letter(f"s{n}@x.org", (f"r{n}@x.org", f"no{n}@x.org"), b"Subject: x\n\nx\n", wish)
        for n in range(3)
    ]

    def rule(line, relay):
        return "550 no" if line.startswith("RCPT TO:<no") else None

    drive = Drive(Relay((*keywords, "DSN") if offered else keywords, rule), letters).run()
    told = {recipient: result.notifies for recipient, result in drive.done.items()}
    assert told == {f"{r}{n}@x.org": offered and r == "r" for r in ("r", "no") for n in range(3)}


# By us


@pytest.mark.parametrize("notify", ["never", "success", "delay"])
def test_nobody_is_told_of_a_failure_who_does_not_want_it(outbox, server, notify):
    put(outbox, server)
    server.on("RCPT", reply=NO_USER, match="bob@")
    send(outbox, notify=notify)
    assert drain(outbox).refused == 1
    assert notices(server) == []


@pytest.mark.parametrize(("notify", "told"), [("success,failure", 0), ("delay", 1)])
def test_a_delay_is_told_to_who_wants_it(outbox, server, notify, told):
    put(outbox, server)
    server.on("RCPT", reply="450 4.2.0 greylisted", match="bob@")
    send(outbox, notify=notify)
    drain(outbox)
    drain(outbox, 5 * HOUR)
    assert len(notices(server)) == told


def test_a_delay_says_until_when_it_is_tried(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply="450 4.2.0 greylisted", match="bob@")
    expires = int(time.time()) + DAY
    send(outbox, expires=expires)
    drain(outbox)
    drain(outbox, 5 * HOUR)
    (notice,) = notices(server)
    (bob,) = fields(notice)
    assert parsedate_to_datetime(bob["Will-Retry-Until"]).timestamp() == expires


def test_nobody_is_told_that_a_relay_is_down_who_does_not_want_it(outbox, server):
    with SMTPServer() as dead:
        put(outbox, dead)
    put(outbox, server, "*")
    send(outbox, notify="never")
    for day in (0, 1, 6, 7, 8, 9):
        drain(outbox, day * DAY)
    assert [each for each in notices(server) if each.is_multipart()] == []
    assert [entry.state for entry in outbox.spool.scan()] == ["refused"]


def test_the_whole_mail_comes_back(outbox, server):
    put(outbox, server)
    server.on("RCPT", reply=NO_USER, match="bob@")
    message_id = send(outbox, ret="full")
    drain(outbox)
    (notice,) = notices(server)
    part = notice.get_payload()[2]
    assert part.get_content_type() == "message/rfc822"
    (mail,) = part.get_payload()
    assert mail["Message-Id"] == f"<{message_id}>"
    assert mail.get_payload() == "hello\r\n"


def test_passed_on_is_said_when_the_relay_does_not(outbox, deaf):
    put(outbox, deaf)
    deaf.on("RCPT", reply=NO_USER, match="eve@")
    message_id = send(outbox, to=["bob@x.org", "eve@x.org"], notify="success,failure", ret="full")
    drain(outbox)
    relayed, failed = sorted(notices(deaf), key=lambda n: fields(n)[0]["Action"], reverse=True)
    about, bob = relayed.get_payload()[1].get_payload()
    assert about["Original-Envelope-Id"] == message_id
    assert bob["Original-Recipient"] == "rfc822; bob@x.org"
    assert (bob["Action"], bob["Status"][0]) == ("relayed", "2")
    assert bob["Remote-MTA"] == "dns; [127.0.0.1]"
    assert relayed.get_payload()[2].get_content_type() == "text/rfc822-headers"
    assert [group["Final-Recipient"] for group in fields(failed)] == ["rfc822; eve@x.org"]


def test_a_relay_with_dsn_says_it_itself(outbox):
    with SMTPServer() as server:
        put(outbox, server)
        send(outbox, notify="success")
        assert drain(outbox).accepted == 1
        assert notices(server) == []


def test_a_null_sender_is_not_told_of_success(outbox, deaf):
    put(outbox, deaf)
    send(outbox, "", mailbox=ALICE, notify="success")
    assert drain(outbox).accepted == 1
    assert len(deaf.mails) == 1


def test_a_crash_after_passed_on_makes_no_second_notice(outbox, deaf):
    """The mail is sent again, as the promise has it; the notice is not."""
    put(outbox, deaf)
    rule = deaf.on("MAIL", reply="451 4.3.0 later", match="<>")  # not before the crash
    message_id = send(outbox, notify="success")
    code = (
        "import os, sys\n"
        "from cpsmailaccess_delivery import Outbox\n"
        "from cpsmailaccess_delivery.spool.lease import Lease\n"
        "Lease.settle = lambda lease, settlement: os._exit(9)\n"
        "Outbox(sys.argv[1]).processor().run(forever=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, outbox.location], timeout=30)
    assert done.returncode == 9
    assert len(list(outbox.spool.scan())) == 2  # durable before the acceptance
    deaf.forget(rule)
    drain(outbox)
    assert [mail.message_id for mail in deaf.mails].count(message_id) == 2
    assert len(notices(deaf)) == 1


HOSTILE = {
    "8-bit": b"550 5.7.1 caf\xe9 \xff\xfe\r\n",
    "control characters": b"550 5.7.1 \x1b[31mred\x07\x00 \x0b\x0c\r\n",
    "long": b"550-5.7.1 " + b"x" * 1500 + b"\r\n550 5.7.1 " + b"word " * 380 + b"\r\n",
    "an injection": b"550-5.7.1 no\rX-Evil: 1\r\n550 5.7.1 \x85Action: x\xe2\x80\xa8X: y\r\n",
    "a boundary": b"550 5.7.1 --=_cpsmail_0123456789abcdef--\r\n",
    "digits of other scripts": "550 5.\u0661.\u0661 no\r\n".encode(),
}


@pytest.mark.parametrize("reply", HOSTILE.values(), ids=HOSTILE)
def test_hostile_replies(outbox, reply):
    """As a relay can say them, through the real session, read by a program."""

    def rule(line, relay):
        return reply.decode("latin-1")[:-2] if line.startswith("RCPT") else None

    drive = Drive(Relay(rule=rule), [Letter(ALICE, ("bob@example.net",), MESSAGE)]).run()
    result = drive.done["bob@example.net"]
    outcome = Outcome(State.REFUSED, result.text, 1_732_369_200.0)
    for to in (ALICE, "\u00e4@example.org"):
        notice = Notice(
            Action.FAILED, to, {"bob@example.net": outcome}, MESSAGE, "1@x", 1.7e9, 1.7e9
        )
        data = compose(notice, message_id="2@x", reporting_mta="me.example", remote_mta="r.example")
        read = email.message_from_bytes(data, policy=email.policy.default)
        assert all(not part.defects for part in read.walk())
        assert max(map(len, data.split(b"\n"))) <= 998
        assert [part.get_content_maintype() for part in read.iter_parts()] == [
            "text", "message", "text",
        ]  # fmt: skip
        text, status, _ = read.iter_parts()
        assert "bob@example.net" in text.get_content()
        if to == ALICE:
            assert data.isascii()
            _, bob = status.get_payload()
            assert bob.keys() == [
                "Original-Recipient", "Final-Recipient", "Action", "Status", "Remote-MTA",
                "Diagnostic-Code", "Last-Attempt-Date",
            ]  # fmt: skip
            assert bob["Action"] == "failed"
            assert bob["Status"] in ("5.7.1", "5.0.0")
            assert bob["Diagnostic-Code"].startswith("smtp; 550 5.")
            assert bob["Diagnostic-Code"].isprintable()
