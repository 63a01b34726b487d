"""What `send` does to a message: Bcc out, Message-Id and Date in, and not one byte more."""

from __future__ import annotations

import email
import re
import tracemalloc
from email import policy
from email.errors import HeaderParseError
from email.header import Header
from email.message import EmailMessage, Message
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

import pytest
import transaction
from hypothesis import given
from hypothesis import strategies as st
from zope.sendmail.delivery import QueuedMailDelivery

from cpsmailaccess_delivery.errors import InvalidMessage, MessageTooLarge, SendError
from cpsmailaccess_delivery.message import MAX_HEADER, complete, find_message_id, to_bytes

NOW = 1_700_000_000.0
DATE = b"Date: Tue, 14 Nov 2023 22:13:20 +0000\n"
OWN = b"Message-Id: <1@example.org>\n" + DATE


def completed(data: bytes) -> bytes:
    return complete(data, sender="alice@example.org", now=NOW)[0]


# Bcc


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        (b"Bcc: eve@example.com\nSubject: x\n", b"Subject: x\n"),
        (b"Subject: x\nBcc: eve@example.com\n", b"Subject: x\n"),
        (b"Subject: x\nBCC: e@x.org,\n f@x.org,\n\tg@x.org\nTo: y@x.org\n", None),
        (b"Subject: x\nbcc :e@x.org\nTo: y@x.org\n", None),
        (b"Subject: x\nBcc\t: e@x.org\nTo: y@x.org\n", None),
        (b"Subject: x\nBcc:\nTo: y@x.org\n", None),
        (b"Bcc: a@x.org\nSubject: x\nBcc: b@x.org\nBcc: c@x.org\nTo: y@x.org\nBcc: d\n", None),
        (b"Subject: x\nResent-Bcc: e@x.org\nTo: y@x.org\n", None),
        (b"Subject: x\r\nBcc: e@x.org\r\n f@x.org\r\nTo: y@x.org\r\n", None),
        (
            b"Subject: x\r\nBcc: e@x.org\n f@x.org\rTo: y@x.org\r\n",
            b"Subject: x\r\nTo: y@x.org\r\n",
        ),
        (b"Subject: x\rBcc: e@x.org\rTo: y@x.org\r", b"Subject: x\rTo: y@x.org\r"),
        (b"Subject: x\nBcc: e@x.org\n \n f@x.org\nTo: y@x.org\n", None),
        (b"Bcc: \xff\xfe\nSubject: x\nTo: y@x.org\n", None),
    ],
)
@pytest.mark.parametrize("rest", [b"", b"\r", b"\rBcc: in the body\n", b"\r\n\r\nBcc: x\r\n"])
def test_bcc_goes(given_, kept, rest):
    if kept is None:
        kept = b"Subject: x\nTo: y@x.org\n"
        if b"\r" in given_:
            kept = kept.replace(b"\n", b"\r\n")
    assert completed(OWN + given_ + rest) == OWN + kept + rest


@pytest.mark.parametrize(
    "header",
    [
        b"bcc-foo: x\n",
        b"X-Bcc: x\n",
        b"Subject: Bcc: x\n",
        b"Subject: x\n Bcc: folded\n",
        b"Bccc: x\n",
        b"Bc: x\n",
    ],
)
def test_what_looks_like_bcc_stays(header):
    data = OWN + header + b"\nBcc: x\n\nbcc: y\n"
    assert completed(data) == data


def test_bcc_in_a_part_stays():
    data = OWN + b"Content-Type: multipart/mixed; boundary=b\n\n--b\nBcc: x\n\ny\n--b--\n"
    assert completed(data) == data


def test_bcc_alone_without_end():
    assert completed(OWN + b"Bcc: x@y.org") == OWN
    assert completed(OWN + b"Bcc: x@y.org\n z") == OWN


_field = st.sampled_from(
    [b"Bcc: a@b.org", b"bcc:", b"Resent-Bcc: x,\n y", b"Subject: x", b"To: y,\n\tz", b"bcc-foo: z"]
)
_eol = st.sampled_from([b"\n", b"\r\n", b"\r"])


@given(st.lists(st.tuples(_field, _eol), min_size=1, max_size=8), st.binary(max_size=30))
def test_bcc_by_another_way(fields, body):
    """Compare with the plainest way: a list of fields without those."""
    fields = [(field.replace(b"\n", end) + end) for field, end in fields]
    wanted = b"".join(f for f in fields if not re.match(rb"(?i)(resent-)?bcc:", f))
    end = b"\r" if fields[-1].endswith(b"\r") else b"\n"
    # What stood between a CR and an LF must leave the empty line one.
    joint = b"\n" if end == b"\n" and wanted.endswith(b"\r") else b""
    assert completed(OWN + b"".join(fields) + end + body) == OWN + wanted + joint + end + body


def test_bcc_between_a_cr_and_an_lf_leaves_the_end_of_the_header():
    data = OWN + b"To: a@x.org\rBcc: b@x.org\n\nbody\rbcc: c@x.org"
    assert completed(data) == OWN + b"To: a@x.org\r\n\nbody\rbcc: c@x.org"


# Message-Id and Date


@pytest.mark.parametrize("eol", [b"\n", b"\r\n", b"\r"])
def test_missing_are_added_with_the_own_line_end(eol):
    data = b"Subject: x" + eol + eol + b"body\n\r\n\r"
    stored, message_id = complete(data, sender="alice@example.org", now=NOW)
    added = stored.removesuffix(data)
    assert added.count(eol) == 2
    assert added.count(b"\n") + added.count(b"\r") == 2 * len(eol)
    assert added.startswith(b"Message-Id: <" + message_id.encode() + b">" + eol + b"Date: ")
    assert message_id.endswith("@example.org")
    assert email.message_from_bytes(stored)["Subject"] == "x"


def test_only_what_is_missing():
    with_id = b"MESSAGE-ID: <1@x.org>\n\n"
    assert re.fullmatch(rb"Date: [^\n]+\nMESSAGE-ID: <1@x.org>\n\n", completed(with_id))
    with_date = b"date: yesterday\n\n"
    assert re.fullmatch(rb"Message-Id: <[^\n]+>\ndate: yesterday\n\n", completed(with_date))
    assert completed(OWN + b"\n") == OWN + b"\n"


def test_in_the_body_does_not_count():
    data = b"Subject: x\n\nMessage-Id: <evil@x.org>\nDate: never\n"
    stored, message_id = complete(data, sender="a@example.org", now=NOW)
    assert message_id != "evil@x.org"
    assert stored.count(b"Date: ") == 2


@pytest.mark.parametrize("sender", ["", "a@bücher.example", "a@[192.0.2.1]", '"a@b"@x.org'])
def test_made_ids_are_valid_and_differ(sender):
    ids = {complete(b"S: x\n\n", sender=sender, now=NOW)[1] for _ in range(20)}
    assert len(ids) == 20
    for message_id in ids:
        assert re.fullmatch(r"[!-;=?-~]+@[A-Za-z0-9._-]+", message_id)


@pytest.mark.parametrize(
    ("header", "message_id"),
    [
        (b"Message-Id: <1@x.org>", "1@x.org"),
        (b"message-id:<1@x.org>  ", "1@x.org"),
        (b"Message-Id:\r\n <1@x.org>", "1@x.org"),
        (b"Message-Id : <1@x.org>", "1@x.org"),
        ("Message-Id: <é@x.org>".encode(), "é@x.org"),
        (b"Message-Id: <no-at>", "no-at"),
        (b"Message-Id: <1@x.org>\nMessage-Id: <2@x.org>", "1@x.org"),
    ],
)
def test_own_id(header, message_id):
    data = DATE + header + b"\n\nbody"
    assert complete(data, sender="a@x.org", now=NOW) == (data, message_id)
    assert find_message_id(data) == message_id


@pytest.mark.parametrize(
    "value",
    [
        b"1@x.org",
        b"<1@x.org",
        b"1@x.org>",
        b"<>",
        b"<1@x.org> <2@x.org>",
        b"<1@x.org>x",
        b"<1\n @x.org>",
        b"<1@x.org>\n X-Zope-Hostname: evil",
        b"<1\0@x.org>",
        "<1\u2028@x.org>".encode(),
        b"<" + b"x" * 5000 + b">",
    ],
)
def test_malformed_id(value):
    data = b"Message-Id: " + value + b"\n\nbody"
    with pytest.raises(InvalidMessage, match="Malformed Message-Id") as caught:
        completed(data)
    assert isinstance(caught.value, ValueError)  # as in zope.sendmail
    assert isinstance(caught.value, SendError)
    assert len(str(caught.value)) < 500
    assert find_message_id(data) is None


@pytest.mark.parametrize("value", [b"", b" ", b"\n ", b"\t"])
def test_empty_id_is_missing(value):
    assert complete(b"Message-Id:" + value + b"\n\n", sender="a@x.org", now=NOW)[1]


@pytest.mark.parametrize(
    "message",
    [
        b"Message-Id: <1.2.3@example.org>\nSubject: x\n\nbody",
        b"Message-Id: <1.2.3@example.org>\r\nSubject: x\r\n\r\nbody",
        b"Subject: x\nMESSAGE-ID: <1.2.3@example.org>\n\nbody",
        "Subject: é\nMessage-ID: <1.2.3@example.org>\n\né",
    ],
)
def test_same_id_as_zope_sendmail(tmp_path, message):
    with transaction.TransactionManager():
        theirs = QueuedMailDelivery(str(tmp_path / "queue")).send("a@x.org", ["b@x.org"], message)
        transaction.abort()
    assert (
        complete(to_bytes(message), sender="a@x.org", now=NOW)[1] == theirs == "1.2.3@example.org"
    )


# Signed mail

DKIM = (
    b"DKIM-Signature: v=1; a=rsa-sha256; c=simple/simple; d=example.org; s=s1;\r\n"
    b"\th=from:to:subject:date:message-id; bh=47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=;\r\n"
    b"        b="
    + b"A" * 200
    + b"\r\n"
    + OWN.replace(b"\n", b"\r\n")
    + b"From:  a@example.org \r\n"
    b"Subject: =?utf-8?q?" + b"x" * 100 + b"?=\r\nTo: b@example.net\r\n\r\n"
    b"body  \r\n.\r\n..\r\n\r\n\r\n"
)
SMIME = (
    OWN + b"MIME-Version: 1.0\nContent-Type: multipart/signed; micalg=sha-256;\n"
    b' protocol="application/pkcs7-signature"; boundary="b"\n\n--b\n'
    b"Content-Type: text/plain\n\nFrom here \xff\t \nBcc: stays\n--b\n"
    b"Content-Type: application/pkcs7-signature\nContent-Transfer-Encoding: base64\n\nMIIB\n--b--\n"
)


@pytest.mark.parametrize("data", [DKIM, SMIME, DKIM.replace(b"\r\n", b"\n")])
def test_signed_stay(data):
    assert completed(data) == data
    bcc = data.replace(b"To: b@example.net\r\n", b"To: b@example.net\r\nBcc: c@example.net\r\n")
    assert completed(bcc) == data


@pytest.mark.parametrize("data", [DKIM, SMIME])
@pytest.mark.parametrize("kind", [policy.compat32, policy.default, policy.SMTP, policy.SMTPUTF8])
def test_signed_stay_as_parsed_messages(data, kind):
    """The line ends are the policy's; the wire has CRLF in any case."""
    data = data.replace(b"From:  ", b"From: ")  # the email package forgets the second space
    parsed = email.message_from_bytes(data, policy=kind)
    assert completed(to_bytes(parsed)).replace(b"\r\n", b"\n") == data.replace(b"\r\n", b"\n")


# Kinds of messages


def test_bytes_and_str():
    assert to_bytes(b"\xff\n") == b"\xff\n"
    assert to_bytes(bytearray(b"x")) == b"x"
    assert to_bytes(memoryview(b"x")) == b"x"
    assert to_bytes("Subject: é\r\n\r\nü\n") == "Subject: é\r\n\r\nü\n".encode()
    with pytest.raises(InvalidMessage, match="surrogate"):
        to_bytes("Subject: \udce9\n\n")


@pytest.mark.parametrize("bad", [None, 7, object(), [b"x"], {"Subject": "x"}, Message])
def test_no_message_at_all(bad):
    with pytest.raises(InvalidMessage, match="give bytes, str or email"):
        to_bytes(bad)


def test_email_message_8bit_and_from_lines():
    message = EmailMessage(policy=policy.SMTP.clone(cte_type="8bit"))
    message["Subject"] = "Grüße"
    message.set_content("From the top\nüber\n\nFrom below\n.\n", cte="8bit")
    data = to_bytes(message)
    assert b"\r\nFrom the top\r\n\xc3\xbcber\r\n\r\nFrom below\r\n.\r\n" in data
    assert b">From" not in data


def test_from_lines_of_old_message_objects():
    """Their policy would write >From."""
    assert to_bytes(MIMEText("From me\n")).endswith(b"\nFrom me\n")


def made_email_message() -> EmailMessage:
    message = EmailMessage()
    message["To"] = ", ".join(f"user{i}@example.org" for i in range(300))
    message["Subject"] = "é" * 300
    message.set_content("x")
    return message


def made_mime_text() -> Message:
    message = MIMEText("x")
    message["To"] = ", ".join(f"user{i}@example.org" for i in range(300))
    message["Subject"] = Header("é" * 300, "utf-8")
    return message


@pytest.mark.usefixtures("charsets")
@pytest.mark.parametrize("make", [made_email_message, made_mime_text])
def test_long_headers_of_made_messages_travel(make):
    data = to_bytes(make())
    assert max(map(len, data.split(b"\n"))) <= 998
    assert all(len(word) <= 76 for word in re.findall(rb"=\?\S+\?=", data))
    read = email.message_from_bytes(data, policy=policy.default)
    assert read["Subject"] == "é" * 300
    assert len(read["To"].addresses) == 300


def test_long_tokens_are_not_encoded():
    message = EmailMessage()
    message["In-Reply-To"] = f"<{'x' * 90}@example.org>"
    message["List-Unsubscribe"] = f"<https://example.org/{'y' * 200}>"
    message.set_content("x")
    assert b"In-Reply-To: <xxx" in to_bytes(message)
    assert b"=?" not in to_bytes(message)


class Raises(policy.EmailPolicy):
    """As email of Python 3.12.5 and later does with line ends in headers."""

    def fold_binary(self, name, value):
        raise HeaderParseError("x")


def broken_messages():
    wrong_payload = Message()
    wrong_payload.set_payload([Message()])
    wrong_payload["Content-Type"] = "text/plain"
    yield wrong_payload
    surrogate = EmailMessage()
    surrogate["Subject"] = "x"
    surrogate.set_content("x")
    surrogate.set_payload("\ud800")
    yield surrogate
    raises = EmailMessage(policy=Raises())
    raises["Subject"] = "x"
    yield raises
    deep = MIMEMultipart()
    inner = deep
    for number in range(3000):
        part = MIMEMultipart(boundary=f"b{number}")
        inner.attach(part)
        inner = part
    yield deep


@pytest.mark.parametrize("number", range(4), ids=["payload", "surrogate", "raises", "deep"])
def test_broken_message_objects(number):
    message = list(broken_messages())[number]
    with pytest.raises(InvalidMessage):
        completed(to_bytes(message))


def test_many_parts():
    message = MIMEMultipart(boundary="b")
    for _ in range(10_000):
        message.attach(MIMEText("x"))
    assert completed(to_bytes(message)).count(b"--b\n") == 10_000


# What is no message

NO_MESSAGES = {
    "empty": b"",
    "only a body": b"Dear Bob, the password is hunter2",
    "body without header": b"my secret plan\nis this\n",
    "html": b"<html>hunter2</html>",
    "BOM": b"\xef\xbb\xbfSubject: hunter2\n\n",
    "mbox": b"From a@x.org Tue Nov 14 22:13:20 2023\nSubject: hunter2\n\n",
    "leading space": b" Subject: hunter2\n\n",
    "broken line": b"Subject: x\nhunter2 is secret\n\nbody",
    "empty line with a space": b"Subject: x\n \nhunter2 is secret\n",
    "empty name": b": hunter2\n\n",
    "8-bit name": b"Subj\xe9ct: hunter2\n\n",
    "nul": b"\0hunter2",
}


@pytest.mark.parametrize("name", NO_MESSAGES)
def test_no_message(name):
    with pytest.raises(InvalidMessage) as caught:
        completed(NO_MESSAGES[name])
    for text in ("hunter2", "secret", "plan"):
        assert text not in str(caught.value)
        assert text not in repr(caught.value)


def test_the_line_is_named():
    with pytest.raises(InvalidMessage, match="line 4 "):
        completed(b"Subject: x\r\nTo: y\n folded\rhunter2 is secret\n")


def test_header_only_and_body_only():
    assert completed(OWN) == OWN
    assert completed(OWN[:-1]) == OWN[:-1]
    stored = completed(b"\r\nbody")
    assert re.fullmatch(rb"Message-Id: [^\r\n]+\r\nDate: [^\r\n]+\r\n\r\nbody", stored)


@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode))
def test_any_bytes(data):
    try:
        stored, message_id = complete(data, sender="a@x.org", now=NOW)
    except InvalidMessage:
        assert find_message_id(data) is None
        return
    assert complete(stored, sender="a@x.org", now=NOW) == (stored, message_id)
    assert not re.match(rb"(?i)(resent-)?bcc[ \t]*:", stored)


_headers = st.lists(
    st.sampled_from([b"Bcc", b"Subject", b"Message-Id", b":", b" ", b"\t", b"\r", b"\n", b"<1@x>"]),
    max_size=25,
).map(b"".join)


@given(_headers)
def test_no_bcc_survives_any_parser(data):
    """What email, or a reader that takes any line end, sees as Bcc is gone."""
    try:
        stored = complete(OWN + data, sender="a@x.org", now=NOW)[0]
    except InvalidMessage:
        return
    normal = re.sub(rb"\r\n|\r|\n", b"\r\n", stored)
    assert email.message_from_bytes(normal)["bcc"] is None


# Size


def test_size_limit():
    data = OWN + b"\n"
    assert complete(data, sender="a@x.org", now=NOW, size_limit=len(data))[0] == data
    with pytest.raises(MessageTooLarge, match="raise size_limit") as caught:
        complete(data, sender="a@x.org", now=NOW, size_limit=len(data) - 1)
    assert isinstance(caught.value, SendError)


MEGA = 1_000_000
HUGE = {
    "one line": b"Subject: " + b"x" * 10 * MEGA,
    "lines": b"".join(b"X-%d: y\n" % number for number in range(100_000)),
    "folded": b"Subject: x" + b"\n y" * 3 * MEGA,
    "Bcc": b"Bcc: x@y.org\n" * 100_000,
    "no colon": b"x" * 10 * MEGA,
    "spaces": b"x" + b" " * 10 * MEGA,
    "space lines": b"Subject:" + b"\n " * 5 * MEGA,
    "carriage returns": b"Subject:" + b"\r " * 5 * MEGA,
    "id": b"Message-Id: <" + b"x" * 10 * MEGA + b">",
    "brackets": b"Message-Id: " + b"<" * 10 * MEGA,
    "id spaces": b"Message-Id: <" + b" " * 10 * MEGA + b">",
}


@pytest.mark.parametrize("name", HUGE)
def test_hostile_headers_take_linear_time(name):
    """Quadratic behaviour would take hours here; so nothing is timed.  All are refused."""
    data = HUGE[name].rstrip(b"\n") + b"\n\nbody\n"
    with pytest.raises(InvalidMessage) as caught:
        completed(data)
    assert len(str(caught.value)) < 500


def test_largest_header():
    head = OWN + b"Subject: "
    most = head + b"x" * (MAX_HEADER - len(head) - 1) + b"\n"
    assert completed(most + b"\nbody\n") == most + b"\nbody\n"
    with pytest.raises(InvalidMessage, match=r"has 1,048,577 bytes, and at most 1,048,576"):
        completed(b"X" + most + b"\nbody\n")


def test_a_folded_header_takes_no_memory_to_speak_of():
    """It took 240 bytes for each continuation line; tracemalloc sees what `re` allocates."""
    data = OWN + b"Subject: x" + b"\n y" * (MEGA // 3) + b"\n\n"
    tracemalloc.start()
    try:
        completed(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(data)
