"""What an account allows now: how fast, how much, and whether it has changed since."""

from __future__ import annotations

import math

import pytest

from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.envelope import Route, lane_key
from cpsmailaccess_delivery.errors import VaultError
from cpsmailaccess_delivery.terms import Terms

ALICE = "alice@example.org"
ROUTE = Route(ALICE, "smtp.example.org", 25)


class Accounts:
    """One account, which may be broken."""

    def __init__(self) -> None:
        self.account = Account(mailbox=ALICE, host="smtp.example.org", mails_per_minute=6)
        self.put = 1
        self.broken = False

    def current(self, mailbox: str) -> tuple[str, Account]:
        return self.version(mailbox), self.get(mailbox)

    def get(self, mailbox: str) -> Account:
        if self.broken:
            raise VaultError("its seal does not hold")
        return self.account

    def version(self, mailbox: str) -> str:
        return str(self.put)


@pytest.fixture
def accounts():
    return Accounts()


@pytest.fixture
def terms(accounts):
    terms = Terms(ROUTE, accounts, {})
    terms.load()
    return terms


def test_who_waits_spends_nothing(terms):
    assert terms.take(1000.0) == 0.0
    assert [terms.take(1000.0) for _ in range(3)] == [pytest.approx(10.0)] * 3
    assert terms.wait(1010.0) == 0.0
    assert terms.take(1010.0) == 0.0
    assert terms.take(1010.0) > 0.0


def test_a_leave_that_was_not_used_is_another_s(terms):
    assert terms.take(1000.0) == 0.0
    terms.give_back()
    assert terms.take(1000.0) == 0.0


def test_what_nobody_knows_is_waited_for_once(accounts):
    """The pace of a lane whose worker died, or of a clock that was put back."""
    terms = Terms(ROUTE, accounts, {lane_key(ROUTE): math.inf})
    terms.load()
    assert terms.take(1000.0) == pytest.approx(10.0)
    assert terms.take(1010.0) == 0.0


def test_what_a_relay_has_taught_us_stays_while_the_account_does(terms, accounts):
    limit = terms.limit
    accounts.put += 1
    terms.load()
    assert terms.limit is limit
    accounts.account = accounts.account.replace(connections=7)
    terms.load()
    assert terms.limit.most == 7


def test_an_account_changes_when_it_is_put_or_mended(accounts):
    terms = Terms(ROUTE, accounts, {})
    assert not terms.changed
    accounts.broken = True
    with pytest.raises(VaultError):
        terms.load()
    assert not terms.changed
    accounts.put, accounts.broken = 2, False
    assert terms.changed
    terms.load()
    assert not terms.changed
