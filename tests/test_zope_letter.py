"""A letter that somebody has typed: whatever it is, it is one mail with the headers we gave it."""

from __future__ import annotations

import time
from contextlib import suppress
from email import policy
from email.parser import BytesParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery import InvalidAddress, InvalidMessage, NoRecipients
from cpsmailaccess_delivery.account import mailbox_key
from cpsmailaccess_delivery.address import check_address
from cpsmailaccess_delivery.message import authors, to_bytes
from cpsmailaccess_delivery.zope.letter import Attachment, letter, recipients_of

ALICE, BOB = "alice@example.org", "bob@example.net"


def parsed(message):
    return BytesParser(policy=policy.default).parsebytes(to_bytes(message))


def test_a_letter():
    read = parsed(letter(ALICE, [BOB], "Grüße", "Hallo\r\nBob\rund\nalle.\n"))
    assert (read["From"], read["To"], read["Subject"]) == (ALICE, BOB, "Grüße")
    assert read.get_content().splitlines() == ["Hallo", "Bob", "und", "alle."]


@pytest.mark.parametrize(
    "subject", ["a\nBcc: x@example.net", "a\r\n\r\nx", "\0", "x" * 901, "\ud800"]
)
def test_a_subject_is_one_line(subject):
    with pytest.raises(InvalidMessage, match="is one line"):
        letter(ALICE, [BOB], subject, "x")


@given(subject=st.text(max_size=60), text=st.text(max_size=200), name=st.text(max_size=60))
def test_nothing_typed_adds_a_header(subject, text, name):
    attachment = Attachment(name, "text/plain\r\nBcc: x@example.net", b"From: me\n\nx")
    try:
        message = letter(ALICE, [BOB], subject, text, [attachment])
    except InvalidMessage:
        return
    try:
        read = parsed(message)
    except InvalidMessage:  # lone surrogates: said by `send`
        return
    allowed = {"from", "to", "subject", "mime-version", "content-type"}
    assert {name.lower() for name in read.keys()} <= allowed  # noqa: SIM118
    assert authors(to_bytes(message)) == (ALICE,)
    _, attached = read.iter_parts()
    assert {name.lower() for name in attached.keys()} <= {  # noqa: SIM118
        "content-type",
        "content-transfer-encoding",
        "content-disposition",
        "mime-version",
    }
    assert attached.get_content_type() == "application/octet-stream"
    assert attached.get_payload(decode=True) == b"From: me\n\nx"
    assert "/" not in attached.get_filename()


@pytest.mark.parametrize(
    ("name", "type", "expected"),
    [
        ("C:\\temp\\a b.pdf", "application/pdf", ("a b.pdf", "application/pdf")),
        ("../../etc/passwd", "text/html", ("passwd", "text/html")),
        ("", "image/png", ("attachment", "image/png")),
        ("x.eml", "message/rfc822", ("x.eml", "application/octet-stream")),
        ("x", "multipart/mixed", ("x", "application/octet-stream")),
        ("ü.txt", "TEXT/Plain", ("ü.txt", "text/plain")),
    ],
)
def test_attachments(name, type, expected):
    (_, attached) = parsed(
        letter(ALICE, [BOB], "x", "x", [Attachment(name, type, b"\0\xff")])
    ).iter_parts()
    assert (attached.get_filename(), attached.get_content_type()) == expected
    assert attached.get_payload(decode=True) == b"\0\xff"


def test_addresses_beyond_ascii():
    read = parsed(letter("jörg@example.org", ["bücher@example.net"], "x", "x"))
    assert read["From"] == "jörg@example.org"


def test_recipients():
    assert recipients_of(f"{BOB}, Carol <carol@example.net>;{BOB}") == (BOB, "carol@example.net")
    assert recipients_of(f'"Doe, John" <{BOB}>, carol@example.net') == (BOB, "carol@example.net")
    for typed, error in (
        ("", NoRecipients),
        ("nobody", InvalidAddress),
        (f"{BOB}\nBcc: x@example.net", InvalidAddress),
        (f"{BOB}, x y@example.net", InvalidAddress),
    ):
        with pytest.raises(error):
            recipients_of(typed)


@pytest.mark.parametrize(
    ("header", "found"),
    [
        (b"From: Alice <alice@example.org>\n", (ALICE,)),
        (b"from : alice@example.org\r\n", (ALICE,)),
        (b"From: a@x.org,\n\t b@x.org\nSender: c@x.org\n", ("a@x.org", "b@x.org", "c@x.org")),
        (
            b"From: a@x.org\nFrom: b@x.org\nResent-From: c@x.org\n",
            ("a@x.org", "b@x.org", "c@x.org"),
        ),
        (b'From: "bob@x.org" <a@x.org>\n', ("a@x.org",)),
        (b"From: <<bob@x.org\n", ("bob@x.org",)),
        (b"To: bob@x.org\nSubject: From: bob@x.org\n", ()),
        (b"From: " + b"(" * 20_000 + b" bob@x.org\n", ("bob@x.org",)),
    ],
)
def test_whom_a_message_says_it_is_from(header, found):
    assert authors(header + b"\nFrom: body@x.org\n") == found


@pytest.mark.parametrize(
    "header",
    [
        b"a\0lice@example.org",
        b"alice@example.org.",
        b"=?utf-8?q?alice?=@example.org",
        b"=?utf-8?q?alice=40example=2Eorg?=",
        b"x@x.org\r alice@example.org",
        b"x@x.org alice@example.org",
        b'"alice"@example.org',
        b'"al\\ice"@example.org',
    ],
)
def test_what_a_reader_may_take_for_an_address(header):
    """None is one of RFC 5322, or the usual way to write it: readers show alice's."""
    found = authors(b"From: " + header + b"\r\n\r\n")
    assert ALICE in [mailbox_key(check_address(address)) for address in found if fits(address)]


def fits(address: str) -> bool:
    try:
        check_address(address)
    except InvalidAddress:
        return False
    return True


@pytest.mark.parametrize(
    "text",
    [b"a", b"a@b,", b"a@b.example,", b"=?utf-8?q?a?= ", b"<", b"a ", b"@", b"a@", b'"', b"(a)"],
)
@pytest.mark.parametrize("begin", [b"", b"=?utf-8?q?"])
def test_long_fields_take_no_time(begin, text):
    """Each would have a thread of Zope, and with it all of them, for minutes or hours."""
    header = b"From: " + begin + text * (60_000 // len(text)) + b"\r\n\r\n"
    before = time.thread_time()
    with suppress(InvalidMessage):
        authors(header)
    assert time.thread_time() - before < 15


def test_too_many_authors():
    for value in (b"x" * 70_000, b",".join(b"a%d@x.org" % number for number in range(201))):
        with pytest.raises(InvalidMessage, match="at most"):
            authors(b"From: " + value + b"\n\n")
