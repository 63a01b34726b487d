"""Wire form and 7-bit fallback."""

from __future__ import annotations

import email
import email.policy
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.smtp.sevenbit import CannotConvert, fit
from cpsmailaccess_delivery.smtp.wire import crlf, is_8bit, stuff

nasty = st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b".", b"..", b"a", b"\xe9", b"\0"])).map(
    b"".join
)


def normalised(message: bytes) -> bytes:
    lines = re.split(rb"\r\n|\r|\n", message)
    if lines[-1] == b"" and len(lines) > 1:
        lines.pop()
    return b"\r\n".join(lines) + b"\r\n"


@given(nasty)
def test_line_ends(message):
    assert crlf(message) == normalised(message)
    assert crlf(crlf(message)) == crlf(message)


@given(nasty)
def test_stuffing_round_trip(message):
    lines = crlf(message)
    wire = stuff(lines)
    assert b"".join(
        line[1:] if line.startswith(b".") else line for line in wire.splitlines(keepends=True)
    ) == lines  # fmt: skip
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", wire)
    assert b"\r\n.\r\n" not in b"\r\n" + wire


@pytest.mark.parametrize(
    "end",
    [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r", b"\r.\r\n", b"\n.\r", b"\r\n.\r\n",
     b"\r\r\n.\r\r\n", b"\n\r.\n\r"],
)  # fmt: skip
def test_no_smuggling(end):
    """Whatever a relay takes for the end of data, it is not in there."""
    wire = b"\r\n" + stuff(crlf(b"Subject: x\n\nhello" + end + b"MAIL FROM:<evil@example.com>\n"))
    for mark in (b"\r\n.\r\n", b"\n.\n", b"\n.\r", b"\r.\r", b"\r.\n"):
        assert mark not in wire


def test_nothing_is_copied_for_nothing():
    message = b"Subject: x\r\n\r\nhello\r\n"
    assert crlf(message) is message
    assert stuff(message) is message


PARTS = """\
From: Jörg Müller <joerg@bücher.example>, plain@example.net
To: bob@example.net
Subject: Größe
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="=_b"
Content-Transfer-Encoding: 8bit

préambule
--=_b
Content-Type: text/plain; charset="utf-8"
Content-Transfer-Encoding: 8bit

naïve = 1
 --=_b
.dot
--=_b
Content-Type: application/octet-stream; name="größe.bin"
Content-Disposition: attachment; filename="größe.bin"

ÿÿÿ
--=_b
Content-Type: text/plain; charset=us-ascii
X-Odd:   kept  as it is

plain
--=_b
Content-Type: message/rfc822

Subject: inner
Content-Type: text/plain; charset=utf-8

été
--=_b--
épilogue
""".encode()


def seven(message: bytes, **offers: bool) -> bytes:
    fitted, utf8 = fit(crlf(message), **{"eightbit": False, "smtputf8": False, **offers})
    assert fitted.isascii() or offers
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", fitted)
    assert not utf8 or offers.get("smtputf8")
    return fitted


def test_every_part_becomes_seven_bits():
    fitted = seven(PARTS)
    parsed = email.message_from_bytes(fitted, policy=email.policy.default)
    assert parsed["Subject"] == "Größe"
    assert parsed["From"].addresses[0].display_name == "Jörg Müller"
    assert parsed["From"].addresses[0].addr_spec == "joerg@xn--bcher-kva.example"
    assert parsed["Content-Transfer-Encoding"] == "7bit"
    text, binary, plain, nested = parsed.iter_parts()
    assert text.get_content().replace("\r\n", "\n") == "naïve = 1\n --=_b\n.dot"
    assert text["Content-Transfer-Encoding"] == "quoted-printable"
    assert binary.get_filename() == "größe.bin"
    assert binary.get_content() == "ÿÿÿ".encode()
    assert plain.get_content() == "plain"
    assert b"X-Odd:   kept  as it is\r\n\r\nplain\r\n" in fitted
    assert nested.get_content().get_content().rstrip() == "été"
    assert all(len(line) < 998 for line in fitted.split(b"\r\n"))


def test_header_alone_is_encoded_for_8bitmime():
    fitted = seven(PARTS, eightbit=True)
    header, body = fitted.split(b"\r\n\r\n", 1)
    assert header.isascii()
    assert body == crlf(PARTS).split(b"\r\n\r\n", 1)[1]


def test_smtputf8_takes_it_as_it_is():
    fitted, utf8 = fit(crlf(PARTS), eightbit=True, smtputf8=True)
    assert fitted == crlf(PARTS)
    assert utf8


def test_a_header_in_an_unknown_charset_is_changed_only_for_seven_bits():
    latin1 = crlf("Subject: Größe\n\nx\n".encode("latin-1"))
    for smtputf8 in (True, False):
        assert fit(latin1, eightbit=True, smtputf8=smtputf8) == (latin1, False)
    fitted, utf8 = fit(latin1, eightbit=False, smtputf8=False)
    assert not utf8
    assert email.message_from_bytes(fitted, policy=email.policy.default)["Subject"] == "Größe"


@pytest.mark.parametrize(
    "message",
    [
        b"DKIM-Signature: v=1\nSubject: x\n\n\xe9\n",
        b"Subject: x\ndkim-signature: v=1\n\n\xe9\n",
        b"Content-Type: multipart/signed; boundary=b\n\n--b\n\n\xe9\n--b\n\nsig\n--b--\n",
        b"Content-Type: application/pkcs7-mime; smime-type=signed-data\n\n\xe9\n",
        b"Content-Type: multipart/mixed; boundary=a\n\n--a\n"
        b"Content-Type: multipart/signed; boundary=b\n\n--b\n\n\xe9\n--b--\n--a--\n",
    ],
)
def test_signed_is_never_rewritten(message):
    with pytest.raises(CannotConvert):
        seven(message)


def test_signed_in_seven_bits_passes():
    message = b"DKIM-Signature: v=1\r\n\r\nx\r\n"
    assert seven(message) == message


@pytest.mark.parametrize(
    "message",
    [
        b"Content-Type: multipart/mixed\n\n\xe9\n",
        b"Content-Type: multipart/mixed; boundary=b\n\n\xe9\n",
        b"Content-Transfer-Encoding: x-uue\n\n\xe9\n",
        "From: jörg@example.net\n\nx\n".encode(),
    ],
)
def test_what_cannot_be_converted(message):
    with pytest.raises(CannotConvert):
        seven(message)


@pytest.mark.parametrize(
    "text", ["naïve\n", "привет мир\n" * 50, "é" * 3000 + "\n", "é", "\n\né \n"]
)
def test_text_survives(text):
    message = b"Content-Type: text/plain; charset=utf-8\n\n" + text.encode()
    parsed = email.message_from_bytes(seven(message), policy=email.policy.default)
    assert parsed.get_content().replace("\r\n", "\n").rstrip("\n") == text.rstrip("\n")
    assert parsed["MIME-Version"] == "1.0"


def test_encodings_that_lie():
    for encoding in ("quoted-printable", "base64"):
        seven(f"Content-Transfer-Encoding: {encoding}\n\nYWJjé\n".encode())


@given(nasty, nasty)
def test_only_one_error(header, body):
    try:
        seven(b"Subject: " + header + b"\n\n" + body)
    except CannotConvert:
        pass


def test_is_8bit():
    assert is_8bit(b"\x80")
    assert not is_8bit(b"\x7f")
