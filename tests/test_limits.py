"""Limits of providers, and the pace of an account."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.limits import (
    Pace,
    SessionLimit,
    asks_for_less,
    mails_per_minute,
)
from cpsmailaccess_delivery.outcome import Phase
from cpsmailaccess_delivery.share import Share
from cpsmailaccess_delivery.smtp.reply import Reply


@pytest.mark.parametrize(
    ("host", "own", "limit"),
    [
        ("smtp.office365.com", None, 30),
        ("smtp.office365.com", 5, 5),
        ("smtp.office365.com", 500, 500),
        ("example-org.mail.protection.outlook.com", None, 30),
        ("smtp.example.org", None, None),
        ("smtp.example.org", 7, 7),
        ("evilsmtp.office365.com.example.org", None, None),
        ("notsmtp.office365.com", None, None),
    ],
)
def test_limits(host, own, limit):
    assert mails_per_minute(host, own) == limit


class Bucket:
    """Who keeps what is spent."""

    def __init__(self, per_minute: int, spent: float = 0.0) -> None:
        self._pace = Pace(per_minute)
        self.spent = spent

    def take(self, now: float) -> float:
        self.spent = self._pace.believed(self.spent, now)
        wait = self._pace.wait(self.spent, now)
        if not wait:
            self.spent = self._pace.spend(self.spent, now)
        return wait

    def give_back(self) -> None:
        self.spent = self._pace.give_back(self.spent)


def test_burst_then_rate():
    bucket = Bucket(60)
    assert [bucket.take(1000.0) for _ in range(10)] == [0.0] * 10
    wait = bucket.take(1000.0)
    assert wait == pytest.approx(1.0)
    assert bucket.take(1000.5) == pytest.approx(0.5)
    assert bucket.take(1001.0) == 0.0


def test_slow_accounts_send_one_at_once():
    bucket = Bucket(1)
    assert bucket.take(0.0) == 0.0
    assert bucket.take(0.0) == pytest.approx(60.0)


@given(st.integers(1, 6000), st.lists(st.floats(0, 10), max_size=200), st.floats(0, 2e9))
def test_never_more_than_burst_and_rate(per_minute, steps, start):
    bucket = Bucket(per_minute)
    now, taken = start, 0
    for step in steps:
        now += step
        taken += bucket.take(now) == 0.0
    assert taken <= max(1.0, per_minute / 6) + (now - start) * per_minute / 60 + 1e-3


@given(st.integers(1, 6000), st.floats(0, 2e9))
def test_who_waits_as_told_gets_one(per_minute, start):
    """A tiny rest of waiting is rounding, and must end."""
    bucket = Bucket(per_minute)
    now = start
    for _ in range(30):
        if wait := bucket.take(now):
            now += wait
            assert bucket.take(now) == 0.0


def test_a_clock_that_goes_back():
    bucket = Bucket(6)
    assert bucket.take(1000.0) == 0.0
    assert 0 < bucket.take(10.0) <= 10.0
    assert bucket.take(20.0) == 0.0


def test_idle_hours_are_not_saved_up():
    bucket = Bucket(60)
    assert sum(bucket.take(36_000.0) == 0.0 for _ in range(100)) == 10


@given(st.integers(1, 16), st.text("0123456789abcdef", min_size=16, max_size=16))
def test_every_lane_has_one_worker(of, lane):
    assert sum(Share(index, of).owns(lane) for index in range(of)) == 1


@given(st.integers(1, 16), st.integers(1, 10_000))
def test_parts_make_the_limit(of, limit):
    parts = [Share(index, of).part(limit) for index in range(of)]
    assert min(parts) >= 1
    assert sum(parts) == max(limit, of)
    assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize(("index", "of"), [(-1, 2), (2, 2), (0, 0)])
def test_no_such_worker(index, of):
    with pytest.raises(ValueError, match="the first is 0"):
        Share(index, of)


def test_halved_then_one_more_a_minute():
    limit = SessionLimit(8)
    assert (limit.allowed(0.0), limit.learned) == (8, False)
    limit.refused(100.0, working=7)
    assert (limit.allowed(100.0), limit.learned) == (4, True)
    assert limit.paused(104.9)
    assert limit.next_step(100.0) == 105.0
    assert not limit.paused(105.0)
    assert limit.next_step(105.0) == 165.0
    assert [limit.allowed(now) for now in (159.0, 160.0, 219.0, 220.0, 1000.0)] == [4, 5, 5, 6, 7]
    assert [limit.allowed(now) for now in (1060.0, 1120.0)] == [8, 8]
    assert not limit.learned


def test_refusals_at_once_have_one_cause():
    """Ten at once, and the relay takes three."""
    limit = SessionLimit(10)
    for working in (9, 8, 7, 6, 5, 4, 3):
        limit.refused(0.0, working)
    assert limit.allowed(1.0) == 3
    limit.refused(61.0, 3)
    assert limit.allowed(61.0) == 1


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.sampled_from("ra"), st.floats(-10, 100), st.integers(0, 50))),
)
def test_always_one_and_never_more_than_the_account_allows(most, steps):
    limit, now = SessionLimit(most), 1000.0
    for what, step, working in steps:
        now += step
        if what == "r":
            limit.refused(now, working)
        before = limit.current
        assert 1 <= limit.allowed(now) <= most
        assert limit.current <= before + 1


@pytest.mark.parametrize(
    ("phase", "reply", "delivered", "less"),
    [
        (Phase.GREETING, "421 4.7.0 busy", False, True),
        (Phase.AUTH, "454 4.7.0 Too many login attempts", False, True),
        (Phase.MAIL, "450 4.7.1 later", False, True),
        (Phase.MAIL, "452 4.3.1 too many mails", False, True),
        (Phase.HELLO, "432 4.3.2 Too many concurrent sessions", False, True),
        (Phase.MAIL, "432 4.7.12 a password transition is needed", False, False),
        (Phase.AUTH, "535 5.7.8 wrong password", False, False),
        (Phase.GREETING, "554 too many of you, for ever", False, False),
        (Phase.RCPT, "450 4.2.0 greylisted", False, False),
        (Phase.RCPT, "452 4.5.3 too many recipients", False, False),
        (Phase.MAIL, "421 4.7.0 too many messages in this session", True, False),
        (Phase.MAIL, "421 4.7.0 too many connections from you", True, True),
        (Phase.MAIL, "451 4.7.500 Server busy: rate limit", True, True),
    ],
)
def test_who_asks_for_less(phase, reply, delivered, less):
    code, _, text = reply.partition(" ")
    assert asks_for_less(phase, Reply(int(code), (text,)), delivered=delivered) is less


def test_silence_asks_for_nothing():
    assert not asks_for_less(Phase.CONNECT, None)


@pytest.mark.parametrize("gap", [0.0, 3.0, 60.0])
def test_one_worker_goes_on_from_another(gap):
    """However often the lane of an account moves, no more than before passes."""
    one = Bucket(60)
    taken = sum(one.take(1000.0) == 0.0 for _ in range(7))
    other = Bucket(60, one.spent)
    taken += sum(other.take(1000.0 + gap) == 0.0 for _ in range(100))
    assert taken == min(10 + gap, 7 + 10)


def test_what_nobody_knows_counts_as_spent():
    """A worker that was killed has told nobody what it sent last."""
    bucket = Bucket(30, math.inf)
    assert bucket.take(1000.0) == pytest.approx(2.0)
    assert bucket.take(1002.0) == 0.0


def test_what_did_not_pass_may_pass_again():
    bucket = Bucket(60)
    assert [bucket.take(1000.0) for _ in range(10)] == [0.0] * 10
    bucket.give_back()
    assert bucket.take(1000.0) == 0.0
    assert bucket.take(1000.0) > 0.0
