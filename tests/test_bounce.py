"""Notifications are read back by the email package, whatever the relay or the sender wrote."""

from __future__ import annotations

import email
import email.policy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.bounce import (
    GIVEN_UP,
    Action,
    Notice,
    age_text,
    compose,
    compose_trouble,
    notice_id,
    original_header,
)
from cpsmailaccess_delivery.interfaces import Outcome, State

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
)
def test_hostile_text_changes_no_structure(reply, message, message_id, at, recipient, mta, action):
    hostile = notice(
        action,
        recipients={recipient: Outcome(State.REFUSED, reply, at)},
        message=message,
        message_id=message_id,
    )
    data = compose(hostile, message_id="dsn@example.org", reporting_mta=mta)
    read = email.message_from_bytes(data, policy=email.policy.compat32)
    assert set(read.keys()) - {"References"} == {
        "From", "To", "Date", "Message-Id", "Subject", "Auto-Submitted", "MIME-Version",
        "Content-Type",
    }  # fmt: skip
    _, _, header = read.get_payload()
    about, one = groups(read)
    assert set(about.keys()) == {"Reporting-MTA", "Arrival-Date"}
    assert set(one.keys()) <= {
        "Final-Recipient", "Action", "Status", "Diagnostic-Code", "Last-Attempt-Date",
        "Will-Retry-Until",
    }  # fmt: skip
    assert one["Action"] == action
    assert header.get_payload(decode=True).rstrip(b"\n") == original_header(message).rstrip(b"\n")
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
