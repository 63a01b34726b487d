"""Notifications are read back by the email package, whatever the relay or the sender wrote."""

from __future__ import annotations

import email
import email.policy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.bounce import (
    age_text,
    compose,
    compose_trouble,
    notice_id,
    original_header,
)
from cpsmailaccess_delivery.interfaces import Outcome, State
from cpsmailaccess_delivery.report import EXPIRED, GIVEN_UP, Action, Notice

NOW = 1_732_369_200.0
NO_USER = Outcome(State.REFUSED, "550 5.1.1 no such user", NOW)
MESSAGE = b"From: alice@example.org\r\nSubject: hello\r\n\r\nsecret body\r\n"


def notice(action=Action.FAILED, **changes):
    values = {
        "to": "alice@example.org",
        "recipients": {"bob@example.net": NO_USER},
        "message": MESSAGE,
        "message_id": "1@example.org",
        "queued_at": NOW - 3600,
        "now": NOW,
        "give_up_at": NOW + 86400,
        **changes,
    }
    return Notice(action, **values)


def parsed(notice):
    data = compose(notice, message_id="dsn@example.org", reporting_mta="host.example")
    return email.message_from_bytes(data), data


def groups(message):
    return message.get_payload()[1].get_payload()


def test_a_failure():
    message, data = parsed(notice())
    assert message.get_content_type() == "multipart/report"
    assert message.get_param("report-type") == "delivery-status"
    assert message["Message-Id"] == "<dsn@example.org>"
    assert message["References"] == "<1@example.org>"
    assert message["Auto-Submitted"] == "auto-replied"
    assert message["To"] == "<alice@example.org>"
    text, status, header = message.get_payload()
    assert "bob@example.net" in text.get_payload()
    assert "550 5.1.1 no such user" in text.get_payload()
    assert status.get_content_type() == "message/delivery-status"
    about, bob = groups(message)
    assert about["Reporting-MTA"] == "dns; host.example"
    assert about["Arrival-Date"]
    assert bob["Final-Recipient"] == "rfc822; bob@example.net"
    assert (bob["Action"], bob["Status"]) == ("failed", "5.1.1")
    assert bob["Diagnostic-Code"] == "smtp; 550 5.1.1 no such user"
    assert bob["Original-Recipient"] == bob["Final-Recipient"]
    assert about["Original-Envelope-Id"] == "1@example.org"
    assert bob["Remote-MTA"] is None
    assert bob["Will-Retry-Until"] is None
    assert header.get_content_type() == "text/rfc822-headers"
    assert header.get_payload() == "From: alice@example.org\nSubject: hello\n"
    assert b"secret body" not in data
    assert message.defects == []


def test_a_delay():
    later = Outcome(State.DEFERRED, "450 4.2.0 greylisted", NOW)
    message, _ = parsed(notice(Action.DELAYED, recipients={"bob@example.net": later}))
    assert "delayed" in message["Subject"]
    (bob,) = groups(message)[1:]
    assert (bob["Action"], bob["Status"]) == ("delayed", "4.2.0")
    assert bob["Will-Retry-Until"]
    assert "need not send it" in message.get_payload()[0].get_payload()


@pytest.mark.parametrize(
    ("reply", "status", "diagnostic"),
    [
        (f"{GIVEN_UP}9 attempts; 450 4.2.0 later", "5.4.7", "smtp; 450 4.2.0 later"),
        (f"{EXPIRED}; 450 4.2.0 later", "5.4.7", "smtp; 450 4.2.0 later"),
        (EXPIRED, "5.4.7", "x-cpsmail; expired"),
        ("553 no such address", "5.1.3", "smtp; 553 no such address"),
        ("550 5.1.1", "5.1.1", "smtp; 550 5.1.1"),
        ("550 5.1.1.9 no", "5.0.0", "smtp; 550 5.1.1.9 no"),
        ("550 5.\u0661.1 no", "5.0.0", "smtp; 550 5.?.1 no"),
        ("550 5.1.1 two  spaces", "5.1.1", "smtp; 550 5.1.1 two spaces"),
        ("550 no", "5.0.0", "smtp; 550 no"),
        ("550 4.1.1 no", "5.0.0", "smtp; 550 4.1.1 no"),
        ("nothing listens", "5.0.0", "x-cpsmail; nothing listens"),
        ("", "5.0.0", "x-cpsmail; no reply"),
        ("550 5.1.1\r\n\r\nX: y\0\u2028z", "5.1.1", "smtp; 550 5.1.1 X: y z"),
        ("550 caf\u00e9", "5.0.0", "smtp; 550 caf?"),
    ],
)
def test_what_programs_read(reply, status, diagnostic):
    message, _ = parsed(notice(recipients={"b@x.org": Outcome(State.REFUSED, reply, NOW)}))
    (bob,) = groups(message)[1:]
    assert (bob["Status"], bob["Diagnostic-Code"]) == (status, diagnostic)


def test_addresses_beyond_ascii():
    message, _ = parsed(notice(recipients={"j\u00f6rg@example.net": NO_USER}))
    assert groups(message)[1]["Final-Recipient"] == "utf-8; j\\x{F6}rg@example.net"
    international = notice(to="\u00e4@example.org", recipients={"j\u00f6rg@example.net": NO_USER})
    message, data = parsed(international)
    status = message.get_payload()[1]
    assert status.get_content_type() == "message/global-delivery-status"
    assert message.get_param("report-type") == "global-delivery-status"
    assert "Final-Recipient: utf-8; j\u00f6rg@example.net\n".encode() in data


def test_the_raw_header_is_kept_readable():
    raw = b"Subject: caf\xe9 \x00\r\nX-Long: " + b"a" * 2000 + b"\r\n\r\nbody"
    message, data = parsed(notice(message=raw))
    part = message.get_payload()[2]
    assert part["Content-Transfer-Encoding"] == "quoted-printable"
    assert part.get_payload(decode=True) == original_header(raw)
    assert b"Subject: caf=E9 =00\n" in data


@pytest.mark.parametrize(
    ("action", "reply", "status"),
    [
        (Action.DELAYED, "552 too much mail", "4.2.2"),
        (Action.DELAYED, "552 5.2.2 mailbox full", "4.2.2"),
        (Action.DELAYED, "451 try again", "4.3.0"),
        (Action.DELAYED, "nothing listens", "4.0.0"),
        (Action.RELAYED, "250 2.6.0 queued as 1", "2.6.0"),
        (Action.RELAYED, "250 OK", "2.0.0"),
    ],
)
def test_the_class_of_a_status_follows_from_the_action(action, reply, status):
    outcome = Outcome(State.DEFERRED, reply, NOW)
    message, _ = parsed(notice(action, recipients={"bob@example.net": outcome}))
    (bob,) = groups(message)[1:]
    assert (bob["Action"], bob["Status"]) == (action, status)


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("smtp.example.net", "dns; smtp.example.net"),
        ("192.0.2.1", "dns; [192.0.2.1]"),
        ("2001:db8::1", "dns; [IPv6:2001:db8::1]"),
    ],
)
def test_whose_words_they_are(host, said):
    for reply, named in (("550 no", said), ("nothing listens", None)):
        recipients = {"bob@example.net": Outcome(State.REFUSED, reply, NOW)}
        data = compose(
            notice(recipients=recipients), message_id="2@x", reporting_mta="x", remote_mta=host
        )
        assert groups(email.message_from_bytes(data))[1]["Remote-MTA"] == named


def test_a_long_reply_is_folded():
    reply = "550 5.7.1 " + "no spam please, see https://relay.example/why " * 9
    _, data = parsed(notice(recipients={"b@x.org": Outcome(State.REFUSED, reply, NOW)}))
    assert max(map(len, data.split(b"\n\n")[3].split(b"\n"))) <= 78
    read = email.message_from_bytes(data, policy=email.policy.default)
    assert groups(read)[1]["Diagnostic-Code"] == f"smtp; {reply.strip()}"


ORIGINAL = b"From: alice@example.org\r\nSubject: caf\xc3\xa9\r\n\r\nbody\r\n"


@pytest.mark.parametrize(
    ("message", "kind", "content"),
    [
        (MESSAGE, "message/rfc822", b"secret body\n"),
        (MESSAGE.replace(b"body", b"b\xf6dy"), "message/rfc822", b"secret b\xf6dy\n"),
        (ORIGINAL, "message/global", b"body\n"),
        (ORIGINAL.replace(b"\xc3", b""), "text/rfc822-headers", None),
        (MESSAGE + b"x" * 999, "text/rfc822-headers", None),
        (MESSAGE + b"\0", "text/rfc822-headers", None),
        (MESSAGE + b"x\r\n" * 2_000_000, "text/rfc822-headers", None),
    ],
    ids=["plain", "8-bit", "utf-8", "latin-1 header", "long line", "nul", "large"],
)
def test_the_whole_mail(message, kind, content):
    read, data = parsed(notice(message=message, full=True))
    text, _, original = read.get_payload()
    assert original.get_content_type() == kind
    assert ("Your mail is attached" in text.get_payload()) is (content is not None)
    if content:
        assert original.get_payload()[0].get_payload(decode=True) == content
    assert len(data) < 20_000


@pytest.mark.parametrize(
    "reply", ["552 5.3.4 too large", "554 5.6.3 cannot convert", "550 5.2.3 x"]
)
def test_what_the_relay_did_not_take_is_not_sent_back_through_it(reply):
    outcome = Outcome(State.REFUSED, reply, NOW)
    message, _ = parsed(notice(full=True, recipients={"bob@example.net": outcome}))
    assert message.get_payload()[2].get_content_type() == "text/rfc822-headers"


def test_an_international_header():
    data = parsed(notice(to="\u00e4@example.org", message=ORIGINAL))[1]
    read = email.message_from_bytes(data, policy=email.policy.default)
    part = list(read.iter_parts())[2]
    assert part.get_content_type() == "message/global-headers"
    assert part.get_payload()[0]["Subject"] == "caf\u00e9"


def test_many_recipients_and_a_huge_header_are_bounded():
    many = {f"r{n}@example.net": Outcome(State.REFUSED, "5" * 9999, NOW) for n in range(10_000)}
    header = b"".join(b"X-%d: y\n" % n for n in range(100_000))
    message, data = parsed(notice(recipients=many, message=header))
    assert len(data) < 2_000_000
    assert len(groups(message)) == 1001
    assert "and 9900 more recipients" in message.get_payload()[0].get_payload()
    assert message.get_payload()[2].get_payload().splitlines()[-1].endswith(": y")


@given(
    reply=st.text(),
    message=st.binary(),
    message_id=st.text(),
    at=st.floats(),
    recipient=st.text(min_size=1),
    mta=st.text(),
    action=st.sampled_from(Action),
    full=st.booleans(),
)
def test_hostile_text_changes_no_structure(
    reply, message, message_id, at, recipient, mta, action, full
):
    hostile = notice(
        action,
        recipients={recipient: Outcome(State.REFUSED, reply, at)},
        message=message,
        message_id=message_id,
        full=full,
    )
    data = compose(hostile, message_id="dsn@example.org", reporting_mta=mta, remote_mta=mta)
    read = email.message_from_bytes(data, policy=email.policy.compat32)
    assert set(read.keys()) - {"References"} == {
        "From", "To", "Date", "Message-Id", "Subject", "Auto-Submitted", "MIME-Version",
        "Content-Type",
    }  # fmt: skip
    _, _, header = read.get_payload()
    about, one = groups(read)
    assert set(about.keys()) - {"Original-Envelope-Id"} == {"Reporting-MTA", "Arrival-Date"}
    assert set(one.keys()) <= {
        "Original-Recipient", "Final-Recipient", "Action", "Status", "Remote-MTA",
        "Diagnostic-Code", "Last-Attempt-Date", "Will-Retry-Until",
    }  # fmt: skip
    assert one["Action"] == action
    if header.get_content_maintype() == "message":
        assert full
    else:
        assert header.get_payload(decode=True).rstrip(b"\n") == original_header(message).rstrip(
            b"\n"
        )
    assert b"\r" not in data
    assert b"\0" not in data
    assert max(map(len, data.split(b"\n"))) <= 998


def test_the_owner_of_a_mailbox_is_told():
    data = compose_trouble(
        mailbox="alice@example.org",
        reason="535 wrong\r\nX: y",
        now=NOW,
        message_id="t@example.org",
        give_up=5 * 86400,
    )
    message = email.message_from_bytes(data)
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["X"] is None
    assert "535 wrong X: y" in message.get_payload()
    assert "5 days" in message.get_payload()


def test_the_same_notice_has_the_same_id():
    first = notice_id("failed", "1732369200.M1", 2, "alice@example.org")
    assert first == notice_id("failed", "1732369200.M1", 2, "alice@example.org")
    assert first.endswith("@example.org")
    assert notice_id("failed", "1", 2, "").endswith("@localhost")
    assert len({notice_id(a, k, n, "x") for a in "ab" for k in "cd" for n in (1, 2)}) == 8


def test_time_spans():
    assert [age_text(s) for s in (5 * 86400, 3600, 90, 7)] == [
        "5 days", "1 hour", "2 minutes", "7 seconds",
    ]  # fmt: skip
