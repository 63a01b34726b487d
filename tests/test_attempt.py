"""What the results of an attempt mean for the mail."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.attempt import FINAL, Attempt, nobody_left, waiting_of, worst
from cpsmailaccess_delivery.envelope import Envelope, Route
from cpsmailaccess_delivery.errors import InvalidSettings
from cpsmailaccess_delivery.interfaces import Entry, Outcome, State
from cpsmailaccess_delivery.outcome import Phase, classify
from cpsmailaccess_delivery.results import (
    account_trouble,
    settlement_of,
    weigh,
    were_too_many,
)
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.smtp.events import Result
from cpsmailaccess_delivery.smtp.reply import Reply

NOW = 1_700_000_000.0
A, B, C = "a@example.net", "b@example.net", "c@example.net"
ACCEPTED = Result(Phase.BODY, Reply(250, "2.0.0 queued as 4711"))
REFUSED = Result(Phase.RCPT, Reply(550, "5.1.1 no such user"))
GREYLISTED = Result(Phase.RCPT, Reply(450, "4.7.1 greylisted"))
UNCLEAR = Result(Phase.BODY, error=ConnectionResetError())
TOO_MANY = Result(Phase.RCPT, Reply(452, "4.5.3 too many recipients"))
LOGIN = Result(Phase.AUTH, Reply(535, "5.7.8 bad credentials"))


def attempt(
    recipients=(A, B),
    *,
    earlier=None,
    attempts=0,
    staged=NOW - 60,
    entry_id=None,
    state=State.QUEUED,
) -> Attempt:
    lease = SimpleNamespace(
        entry=Entry(entry_id or f"{int(staged)}.1", "lane", state, attempts=attempts),
        envelope=Envelope("x@example.org", recipients, Route("*")),
        message=b"",
        outcomes=earlier or {},
    )
    return Attempt(lease)


def settled(mail: Attempt, results: dict, schedule: Schedule | None = None):
    schedule = schedule or Schedule()
    return settlement_of(
        mail,
        weigh(mail, results, NOW, doubts=schedule.doubts)[0],
        schedule=schedule,
        now=NOW,
        chance=0.0,
    )


def failed(results: dict) -> dict:
    return weigh(attempt(tuple(results)), results, NOW)[1]


def test_all_accepted_leaves_nothing():
    settlement = settled(attempt(), {A: ACCEPTED, B: ACCEPTED})
    assert settlement.state is State.ACCEPTED


def test_words_of_the_relay_are_kept():
    outcomes, failed = weigh(attempt(), {A: REFUSED, B: UNCLEAR}, NOW)
    assert [verdict.state for verdict in failed.values()] == [State.REFUSED, State.UNCLEAR]
    assert outcomes[A] == Outcome(State.REFUSED, "550 5.1.1 no such user", NOW)
    assert outcomes[B].state is State.UNCLEAR
    assert outcomes[B].reply
    assert "Result(" not in outcomes[A].reply + outcomes[B].reply


def test_only_the_deferred_are_tried_again():
    first = settled(attempt((A, B, C)), {A: ACCEPTED, B: REFUSED, C: GREYLISTED})
    assert first.state is State.DEFERRED
    assert (first.due, first.attempts) == (NOW + 60, 1)
    second = attempt((A, B, C), earlier=first.outcomes, attempts=1)
    assert second.recipients == (C,)
    last = settled(second, {C: ACCEPTED})
    assert last.state is State.REFUSED  # B's sender must learn of it
    assert {r: o.state for r, o in last.outcomes.items()} == {
        A: State.ACCEPTED,
        B: State.REFUSED,
        C: State.ACCEPTED,
    }


def test_the_last_accepted_ends_it():
    earlier = {A: Outcome(State.ACCEPTED), B: Outcome(State.DEFERRED)}
    settlement = settled(attempt(earlier=earlier, attempts=3), {B: ACCEPTED})
    assert (settlement.state, settlement.attempts) == (State.ACCEPTED, 4)


def test_unclear_is_tried_once_more_then_held():
    first = settled(attempt((A,)), {A: UNCLEAR})
    assert first.state is State.UNCLEAR
    assert first.due > NOW
    second = attempt((A,), earlier=first.outcomes, attempts=1)
    assert second.recipients == (A,)
    held = settled(second, {A: UNCLEAR})
    assert held.state is State.UNCLEAR
    assert held.due == 0
    assert held.outcomes[A].held
    assert "settle or release" in held.reason


def test_unclear_twice_with_a_deferral_in_between_is_twice():
    """Else a relay that says 450 now and then gets copy after copy."""
    first = settled(attempt((A,)), {A: UNCLEAR})
    second = settled(attempt((A,), earlier=first.outcomes, attempts=1), {A: GREYLISTED})
    assert second.state is State.DEFERRED
    third = settled(attempt((A,), earlier=second.outcomes, attempts=2), {A: UNCLEAR})
    assert third.due == 0
    assert third.outcomes[A].held


def test_unclear_twice_holds_no_neighbour():
    first = settled(attempt((A, B, C)), {A: UNCLEAR, B: GREYLISTED, C: ACCEPTED})
    assert (first.state, first.due) == (State.DEFERRED, NOW + 60)
    second = attempt((A, B, C), earlier=first.outcomes, attempts=1)
    assert second.recipients == (A, B)
    settlement = settled(second, {A: UNCLEAR, B: GREYLISTED})
    assert settlement.state is State.DEFERRED
    assert settlement.due > NOW
    assert "settle or release" in settlement.reason
    third = attempt((A, B, C), earlier=settlement.outcomes, attempts=2, state=State.DEFERRED)
    assert third.recipients == (B,)
    last = settled(third, {B: ACCEPTED})
    assert (last.state, last.due) == (State.UNCLEAR, 0)
    assert [last.outcomes[r].state for r in (A, B, C)] == ["unclear", "accepted", "accepted"]


def test_the_policy_hold_asks_at_once():
    hold = Schedule(unclear="hold")
    settlement = settled(attempt(), {A: UNCLEAR, B: GREYLISTED}, hold)
    assert settlement.outcomes[A].held
    assert (settlement.state, settlement.due) == (State.DEFERRED, NOW + 60)
    alone = settled(attempt((A,)), {A: UNCLEAR}, hold)
    assert (alone.state, alone.due) == (State.UNCLEAR, 0)


def test_the_policy_is_checked():
    with pytest.raises(InvalidSettings, match="unclear='ask'"):
        Schedule(unclear="ask")


def test_what_is_held_is_tried_when_a_person_asks_only():
    earlier = {A: Outcome(State.UNCLEAR, doubts=2, held=True), B: Outcome(State.REFUSED)}
    assert attempt(earlier=earlier, attempts=2, state=State.QUEUED).recipients == (A,)
    mail = attempt(earlier=earlier, attempts=2, state=State.DEFERRED)  # after a crash
    assert mail.recipients == ()
    left = nobody_left(mail)
    assert (left.state, left.outcomes, left.due) == (State.UNCLEAR, earlier, 0)


def test_given_up_or_expired_the_unclear_is_for_a_person():
    old = attempt((A, B), staged=NOW - 6 * 86400, attempts=9)
    settlement = settled(old, {A: GREYLISTED, B: UNCLEAR})
    assert settlement.outcomes[B].held
    again = attempt(earlier=settlement.outcomes, attempts=10, state=State.UNCLEAR)
    assert again.recipients == ()
    first = settled(attempt((A,)), {A: UNCLEAR})
    waiting = attempt((A,), earlier=first.outcomes, attempts=1)
    assert waiting_of(waiting, "down", now=NOW, expired=True).outcomes[A].held
    assert not waiting_of(waiting, "down", now=NOW, expired=False).outcomes[A].held


def test_giving_up():
    old = attempt((A, B, C), staged=NOW - 6 * 86400, attempts=9)
    settlement = settled(old, {A: GREYLISTED, B: ACCEPTED, C: UNCLEAR})
    assert settlement.state is State.UNCLEAR  # not refused: nobody knows about C
    assert settlement.due == 0
    assert settlement.outcomes[A].state is State.REFUSED
    assert "given up after 10 attempts; 450" in settlement.outcomes[A].reply
    assert settlement.outcomes[B].state is State.ACCEPTED
    assert settled(old, {A: GREYLISTED, B: ACCEPTED, C: ACCEPTED}).state is State.REFUSED


@pytest.mark.parametrize(
    ("results", "at_once"),
    [
        ({A: ACCEPTED, B: TOO_MANY}, True),
        ({A: ACCEPTED, B: Result(Phase.RCPT, Reply(552, "too many")), C: REFUSED}, True),
        ({A: TOO_MANY, B: TOO_MANY}, False),
        ({A: REFUSED, B: TOO_MANY}, False),  # nothing says that the relay takes anybody
        ({A: ACCEPTED, B: TOO_MANY, C: GREYLISTED}, False),
        ({A: UNCLEAR, B: TOO_MANY}, False),
        ({A: ACCEPTED, B: REFUSED}, False),
        ({}, False),
    ],
)
def test_recipients_that_were_too_many(results, at_once):
    assert were_too_many(results, failed(results)) is at_once


def test_recipients_that_were_too_many_do_not_wait_nor_expire():
    old = attempt((A, B), staged=NOW - 6 * 86400, attempts=30)
    outcomes, _ = weigh(old, {A: ACCEPTED, B: TOO_MANY}, NOW)
    settlement = settlement_of(
        old, outcomes, schedule=Schedule(), now=NOW, chance=0.0, at_once=True
    )
    assert (settlement.state, settlement.attempts) == (State.DEFERRED, 31)
    assert 0 < settlement.due <= NOW


def test_age_unknown_is_young():
    """A file that we did not name has no time in its name."""
    settlement = settled(attempt((A,), entry_id="foreign-name"), {A: GREYLISTED})
    assert settlement.due > NOW


@pytest.mark.parametrize(
    ("results", "found"),
    [
        ({A: ACCEPTED, B: REFUSED}, None),
        ({A: LOGIN, B: LOGIN}, LOGIN),
        ({A: ACCEPTED, B: Result(Phase.RCPT, Reply(530, "auth first"))}, None),  # A has it
        ({A: Result(Phase.RCPT, Reply(530, "auth first"))}, 530),
        ({}, None),
        ({A: UNCLEAR, B: UNCLEAR}, None),
    ],
)
def test_account_trouble(results, found):
    trouble = account_trouble(results, failed(results))
    assert (trouble.reply.code if isinstance(found, int) else trouble) == found


@pytest.mark.parametrize("state", list(State))
def test_worst_knows_every_state(state):
    assert worst({A: Outcome(state)}) is state
    assert worst({A: Outcome(state), B: Outcome(State.ACCEPTED)}) is state


result = st.sampled_from([ACCEPTED, REFUSED, GREYLISTED, UNCLEAR])


@given(
    st.dictionaries(st.sampled_from([A, B, C]), result, min_size=1),
    st.dictionaries(st.sampled_from([A, B, C]), st.sampled_from(list(State)[:6])),
    st.integers(0, 20),
    st.floats(0, 10 * 86400),
)
def test_nothing_is_forgotten(results, before, attempts, age):
    before = {r: Outcome(s) for r, s in before.items() if r in results and s is not State.HELD}
    mail = attempt(tuple(results), earlier=before, attempts=attempts, staged=NOW - age)
    if not mail.recipients:
        return
    settlement = settled(mail, results)
    if not before and settlement.state is State.ACCEPTED:
        return
    assert set(settlement.outcomes) == set(results)
    assert settlement.attempts == attempts + 1
    for recipient, outcome in before.items():  # what is final stays so
        if outcome.state in FINAL and recipient not in mail.recipients:
            assert settlement.outcomes[recipient] == outcome
    states = {outcome.state for outcome in settlement.outcomes.values()}
    if settlement.due:
        assert settlement.state in (State.DEFERRED, State.UNCLEAR)
        assert states - FINAL
    if settlement.state is State.ACCEPTED:
        assert states == {State.ACCEPTED}
    if settlement.state is State.DEFERRED:
        assert settlement.due > NOW
    if settlement.state is State.REFUSED:
        assert states <= FINAL


def test_one_result_of_all_recipients_is_classified_once(monkeypatch):
    seen = []

    def count(*result):
        seen.append(result)
        return classify(*result)

    monkeypatch.setattr("cpsmailaccess_delivery.results.classify", count)
    outcomes, failed = weigh(attempt((A, B, C)), dict.fromkeys((A, B, C), ACCEPTED), NOW)
    assert len(seen) == 1
    assert not failed
    assert set(outcomes.values()) == {Outcome(State.ACCEPTED, "250 2.0.0 queued as 4711", NOW)}


def test_what_was_unclear_before_is_remembered_of_each():
    earlier = {A: Outcome(State.UNCLEAR, doubts=1), B: Outcome(State.DEFERRED)}
    outcomes, _ = weigh(
        attempt((A, B, C), earlier=earlier), dict.fromkeys((A, B, C), ACCEPTED), NOW
    )
    assert [outcomes[r].doubts for r in (A, B, C)] == [1, 0, 0]
