"""When a mail is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.retry import Schedule

chances = st.floats(0, 1, exclude_max=True)


def test_defaults():
    schedule = Schedule()
    assert [schedule.delay(n, 0) for n in range(1, 5)] == [60, 120, 240, 480]
    assert schedule.delay(1, 0.5) == 60 * 1.125
    assert 4 * 86400 <= schedule.give_up <= 5 * 86400  # RFC 5321 section 4.5.4.1


@given(st.integers(-5, 10**9), chances)
def test_bounds(attempts, chance):
    schedule = Schedule()
    delay = schedule.delay(attempts, chance)
    assert schedule.first <= delay <= schedule.longest * (1 + schedule.jitter)
    assert schedule.delay(attempts + 1, chance) >= delay


@given(st.integers(1, 100), st.floats(-1e6, 1e6), st.floats(0, 2e9), chances)
def test_next_try(attempts, age, now, chance):
    schedule = Schedule()
    due = schedule.next_try(attempts, age, now, chance)
    if age >= schedule.give_up and attempts >= 5:
        assert due is None
    else:
        assert due is not None
        assert due > now


def test_a_mail_that_waited_for_its_account_still_gets_a_few_tries():
    assert Schedule().next_try(1, 30 * 86400, 0, 0) == 60
    assert Schedule().next_try(5, 30 * 86400, 0, 0) is None


@pytest.mark.parametrize("age", [0, 5 * 86400 - 1])
def test_not_yet(age):
    assert Schedule().next_try(50, age, 0, 0) is not None


def test_a_steady_schedule():
    schedule = Schedule(first=5, factor=1, longest=5, jitter=0)
    assert {schedule.delay(n, 0.9) for n in range(1, 100)} == {5}
