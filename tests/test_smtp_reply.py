"""The reply parser: whatever arrives, in whatever pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.smtp.hello import parse_ehlo
from cpsmailaccess_delivery.smtp.reply import ProtocolError, Reply, ReplyParser

TALK = b"220 hi\r\n250-a\r\n250-b\r\n250 c\r\n250\r\n550-5.1.1 no\n550 5.1.1 user\n354 go\r\n"
REPLIES = [
    Reply(220, "hi"),
    Reply(250, "a b c"),
    Reply(250),
    Reply(550, "5.1.1 no user", "5.1.1"),
    Reply(354, "go"),
]


def test_split_anywhere():
    for first in range(len(TALK)):
        for second in range(first, len(TALK)):
            parser = ReplyParser()
            pieces = TALK[:first], TALK[first:second], TALK[second:]
            assert [r for piece in pieces for r in parser.feed(piece)] == REPLIES
            assert not parser.pending


@pytest.mark.parametrize(
    ("line", "enhanced"),
    [
        (b"451 4.7.1 wait", "4.7.1"),
        (b"451 4.7.1", "4.7.1"),
        (b"250 2.0.0", "2.0.0"),
        (b"451 5.7.1 wait", ""),  # another class than the code
        (b"451 4.7.1wait", ""),
        (b"451 4.7.1234 wait", ""),
        (b"354 3.0.0 go", ""),
        (b"451 from 4.7.1", ""),
    ],
)
def test_enhanced_code(line, enhanced):
    (reply,) = ReplyParser().feed(line + b"\r\n")
    assert reply.enhanced == enhanced
    assert str(reply).encode() == line


def test_hostile_text_is_tame():
    (reply,) = ReplyParser().feed(b"550 a\0b\x1b[31m\xff\xc2\x9b c\rd \xe2\x80\xae\r\n")
    assert reply.text.isprintable()
    assert reply.text.startswith("a\ufffdb\ufffd[31m")
    (reply,) = ReplyParser().feed("550 unbekannter Empfänger\r\n".encode())
    assert reply.text == "unbekannter Empfänger"


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\r\n", b"25\r\n", b"\r\n", b"2500 x\r\n", b"250_x\r\n", b"150 x\r\n", b"600 x\r\n",
        b"250-a\r\n550 b\r\n", b"250-a\r\nb\r\n", b"\xb2\xb5\xb0 x\r\n", b"25\xd9\xa0 x\r\n",
        b"250 " + b"x" * 3000, b"250 " + b"x" * 3000 + b"\r\n", b"HTTP/1.1 400 Bad Request\r\n",
        b"250-x\r\n" * 1001, (b"250-" + b"x" * 2000 + b"\r\n") * 40,
    ],
)  # fmt: skip
def test_garbage(garbage):
    with pytest.raises(ProtocolError):
        ReplyParser().feed(garbage)


def test_a_million_lines_are_not_kept():
    parser = ReplyParser()
    chunk = b"250-X\r\n" * 10_000
    for _ in range(100):
        with pytest.raises(ProtocolError):
            parser.feed(chunk)
    assert len(parser._lines) <= 1000


def test_replies_before_garbage_count():
    parser = ReplyParser()
    assert parser.feed(b"250 taken\r\ngarbage\r\n") == [Reply(250, "taken")]
    with pytest.raises(ProtocolError):
        parser.feed(b"")


@given(st.lists(st.binary(max_size=50)))
def test_never_another_error(pieces):
    parser = ReplyParser()
    try:
        for piece in pieces:
            for reply in parser.feed(piece):
                assert 200 <= reply.code < 600
                assert reply.text.isprintable()
    except ProtocolError:
        pass


@given(
    st.lists(st.tuples(st.integers(200, 599), st.text("abc 5.", max_size=20)), max_size=5),
    st.integers(1, 9),
)
def test_round_trip(replies, step):
    data = b"".join(f"{code} {text}\r\n".encode() for code, text in replies)
    parser = ReplyParser()
    found = [r for at in range(0, len(data), step) for r in parser.feed(data[at : at + step])]
    assert [(reply.code, reply.text) for reply in found] == [
        (code, text.strip()) for code, text in replies
    ]


@pytest.mark.parametrize(
    ("size", "limit"), [("SIZE", None), ("SIZE 0", None), ("SIZE 10", 10), ("size x", None)]
)
def test_size(size, limit):
    assert parse_ehlo(b"250-relay PIPELINING\n250 " + size.encode()).size == limit


def test_the_greeting_line_offers_nothing():
    assert not parse_ehlo(b"250 PIPELINING").keywords
