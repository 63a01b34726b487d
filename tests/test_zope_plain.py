"""What the pages are made of, without a Zope: paging, header, chart."""

from __future__ import annotations

import pytest

from cpsmailaccess_delivery.zope.chart import HEIGHT, WIDTH, chart
from cpsmailaccess_delivery.zope.header import header_of
from cpsmailaccess_delivery.zope.paging import SIZE, Page


@pytest.mark.parametrize(
    ("total", "start", "begin", "number"),
    [
        (0, "", 0, 0),
        (3, "0", 0, 3),
        (SIZE, "", 0, SIZE),
        (SIZE + 1, str(SIZE), SIZE, 1),
        (SIZE + 1, str(SIZE + 7), SIZE, 1),
        (SIZE, str(SIZE), 0, SIZE),
        (3 * SIZE, "999999", 2 * SIZE, SIZE),
        (3, "-1", 0, 3),
        (3, "x" * 99, 0, 3),
        (3, "\N{ARABIC-INDIC DIGIT THREE}", 0, 3),
    ],
)
def test_page(total, start, begin, number):
    page = Page.of(iter(range(total)), start)
    assert (page.start, page.total) == (begin, total)
    assert list(page.items) == list(range(begin, begin + number))


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (b"Subject: x\r\n\r\nBody: y\r\n", [("Subject", "x")]),
        (b"Subject: x\n\nBody: y\n", [("Subject", "x")]),
        (b"Subject: a\r\n b\r\n\tc\r\n\r\n", [("Subject", "a b c")]),
        (b"Subject: =?utf-8?q?=C3=BC?= x\r\n\r\n", [("Subject", "ü x")]),
        (b"Subject: \xc3\xbc\r\n\r\n", [("Subject", "ü")]),
        (b"Subject: \xff\r\n\r\n", [("Subject", "\\xff")]),
        (b"Subject: =?no-such?q?x?=\r\n\r\n", [("Subject", "=?no-such?q?x?=")]),
        (b"Subject: =?utf-8?b?abcde?=\r\n\r\n", [("Subject", "=?utf-8?b?abcde?=")]),
        (b"Subject: =?rot13?q?x?=\r\n\r\n", [("Subject", "=?rot13?q?x?=")]),
        (b"Subject: =?utf-8?q?=E2=80=AE=0D=0AA:b?=\r\n\r\n", [("Subject", "\\u202e\\x0d\\x0aA:b")]),
        (b"no field\r\n\r\n", [("", "no field")]),
        (b"\r\nbody: x\r\n", []),
        (b"", []),
    ],
)  # fmt: skip
def test_header(message, fields):
    assert header_of(message) == fields


def test_a_huge_header_is_shortened():
    fields = header_of(b"X: " + b"y" * 1_000_000 + b"\r\n" + b"A: b\r\n" * 10_000)
    assert len(fields) == 200
    assert len(fields[0][1]) < 2100


def test_chart():
    made = chart([(0, "accepted", 3), (0, "unclear", 1), (1, "paused", 9), (99, "refused", 2)],
                 4, "step {}".format, "step")  # fmt: skip
    assert [(bar.kind, bar.label) for bar in made.bars] == [
        ("accepted", "step 0: 3 accepted"),
        ("failed", "step 0: 1 refused or unclear"),
        ("failed", "step 3: 2 refused or unclear"),
    ]
    assert made.top == 4
    assert made.words == (
        "Since step 0: 3 accepted, 0 deferred, 3 refused or unclear."
        " Most in one step: 4, at step 0."
    )
    assert made.rows == (("step 0", (3, 0, 1)), ("step 3", (0, 0, 2)))
    for bar in made.bars:
        assert 0 <= bar.x <= bar.x + bar.width <= WIDTH
        assert 0 <= bar.y <= bar.y + bar.height <= HEIGHT
    lower, upper = made.bars[:2]
    assert upper.y + upper.height == pytest.approx(lower.y, abs=0.02), "stacked"


def test_an_empty_chart():
    made = chart([], 4, str, "step")
    assert made.bars == ()
    assert made.words == "Nothing was sent since 0."


@pytest.mark.parametrize(("number", "top"), [(0, 1), (1, 1), (7, 8), (9, 10), (11, 20), (244, 300)])
def test_scale(number, top):
    assert chart([(0, "accepted", number)], 1, str, "x").top == top
