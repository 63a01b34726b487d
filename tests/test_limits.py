"""Limits of providers, and the token bucket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.limits import Share, TokenBucket, mails_per_minute


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


def test_burst_then_rate():
    bucket = TokenBucket(per_minute=60, at=1000.0)
    assert [bucket.take(1000.0) for _ in range(10)] == [0.0] * 10
    wait = bucket.take(1000.0)
    assert wait == pytest.approx(1.0)
    assert bucket.take(1000.5) == pytest.approx(0.5)
    assert bucket.take(1001.0) == 0.0


def test_slow_accounts_send_one_at_once():
    bucket = TokenBucket(per_minute=1, at=0.0)
    assert bucket.take(0.0) == 0.0
    assert bucket.take(0.0) == pytest.approx(60.0)


@given(st.integers(1, 6000), st.lists(st.floats(0, 10), max_size=200), st.floats(0, 2e9))
def test_never_more_than_burst_and_rate(per_minute, steps, start):
    bucket = TokenBucket(per_minute, start)
    now, taken = start, 0
    for step in steps:
        now += step
        taken += bucket.take(now) == 0.0
    assert taken <= max(1.0, per_minute / 6) + (now - start) * per_minute / 60 + 1e-3


@given(st.integers(1, 6000), st.floats(0, 2e9))
def test_who_waits_as_told_gets_one(per_minute, start):
    """A tiny rest of waiting is rounding, and must end."""
    bucket = TokenBucket(per_minute, start)
    now = start
    for _ in range(30):
        for _ in range(5):
            wait = bucket.take(now)
            if not wait:
                break
            now += max(wait, 1e-6)
        else:
            raise AssertionError("waited as told, five times over")


def test_a_clock_that_goes_back():
    bucket = TokenBucket(per_minute=6, at=1000.0)
    assert bucket.take(1000.0) == 0.0
    assert 0 < bucket.take(10.0) <= 10.0
    assert bucket.take(20.0) == 0.0


def test_idle_hours_are_not_saved_up():
    bucket = TokenBucket(per_minute=60, at=0.0)
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
