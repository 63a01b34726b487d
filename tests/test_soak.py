"""The short form of the soak (``make soak`` is the long one), and what its judge notices."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import pytest

from cpsmailaccess_delivery.interfaces import State
from cpsmailaccess_delivery.testing import Command
from soak.recovery import measure
from soak.relay import Delivery, Relay
from soak.run import SETTINGS, soak
from soak.truth import Appender
from soak.verdict import Kill, judge


def test_killed_again_and_again(tmp_path: Path) -> None:
    verdict = soak(tmp_path / "soak", kills=12, seed=7, pause=(0.1, 0.3))
    print(verdict)
    assert verdict.good, str(verdict)
    assert verdict.numbers["kills"] >= 12
    assert verdict.numbers["  delivered"] > 10


def test_killed_again_and_again_on_postgresql(tmp_path: Path) -> None:
    """And the server, too: of its own, for others would not like that."""
    pytest.importorskip("psycopg", reason="needs the extra [postgres]")
    from postgres_server import FOR_TESTS, Server, why_none

    if reason := why_none():
        pytest.skip(reason)
    server = Server({**FOR_TESTS, **SETTINGS})
    try:
        root = tmp_path / "soak"
        verdict = soak(root, kills=12, seed=7, pause=(0.1, 0.5), servers=0.25, server=server)
    finally:
        server.remove()
    print(verdict)
    assert verdict.good, str(verdict)
    assert verdict.numbers["kills"] >= 12
    assert verdict.numbers["  of the database"] > 0
    assert verdict.numbers["  delivered"] > 10


def test_recovery(tmp_path: Path) -> None:
    """The time itself is measured by ``make soak``: here, that there is an end at all."""
    recovery = measure(tmp_path / "recovery", 300)
    assert 0 < recovery.processor < 60.0


# The judge


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


class Case:
    """What was committed, taken and killed; each mail is named by one letter."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("truth", "plans"):
            (root / name).mkdir()
        self.relay = Relay(random.Random(0))
        self.kills: list[Kill] = []
        self.spool: dict[str, State] = {}
        self.accepted: set[str] | None = None

    def committed(self, sent: str, cancelled: str = "", key: str | None = None) -> None:
        line = {"token": "t", "sent": list(sent), "cancelled": list(cancelled), "key": key}
        for where, what in (("truth", line), ("plans", {"mails": list(sent)})):
            with closing(Appender(self.root / where / "c1")) as appender:
                appender.write(what)

    def taken(self, mail: str, at: float, client: str = "p1", *, replied: bool = True) -> None:
        session = int(client[1:])
        self.relay.commands.append(Command(session, 0, f"EHLO {client}.soak.test"))
        self.relay.deliveries.append(Delivery(mail, session, at, replied))

    def wrong(self) -> dict[str, int]:
        """Return what the judge finds wrong: how often, by the first word."""
        verdict = judge(self.root, self.relay, self.kills, self.spool, self.accepted)
        return {name.strip(): len(mails) for name, mails in verdict.wrong.items() if mails}


def test_nothing_is_wrong(case: Case) -> None:
    case.committed("abcd", cancelled="d")
    case.taken("a", 1.0)
    case.spool = {"b": State.HELD, "c": State.QUEUED, "x": State.HELD}
    assert case.wrong() == {}


def test_a_lost_mail(case: Case) -> None:
    case.committed("ab")
    case.taken("a", 1.0)
    assert case.wrong() == {"mails lost": 1}


def test_a_mail_of_whose_fate_nobody_knows(case: Case) -> None:
    case.committed("abc")
    case.taken("a", 1.0)
    case.taken("b", 1.0)
    case.taken("c", 1.0)
    case.spool = {"c": State.UNCLEAR}
    case.accepted = {"a"}
    assert case.wrong() == {"mails delivered of which the journal does not say so": 1}


def test_an_aborted_mail_that_was_sent(case: Case) -> None:
    case.committed("a")
    case.taken("a", 1.0)
    case.taken("b", 1.0)
    assert case.wrong() == {"mails delivered that were not committed": 1}


def test_duplicates(case: Case) -> None:
    case.committed("abcdef")
    case.kills = [Kill("p1", 5.0, frozenset("b"))]
    case.taken("a", 1.0, replied=False)  # nobody told the processor
    case.taken("b", 4.9)  # killed, and it was still there
    case.taken("c", 5.1)  # read by the relay after the death
    case.taken("d", 4.9)  # killed, but it was recorded
    case.taken("e", 1.0, "p2")  # never killed
    case.taken("f", 1.0)
    for mail in "abcde":
        case.taken(mail, 9.0, "p2")
    assert case.wrong() == {"not explained": 2}


def test_duplicates_when_the_database_dies(case: Case) -> None:
    case.committed("abcd")
    case.kills = [Kill("s1", 5.0, frozenset("abc"), until=6.0)]
    case.taken("a", 4.5)  # recorded, but not on the disk
    case.taken("b", 6.5)  # on its way meanwhile
    case.taken("c", 1.0)  # long before
    case.taken("d", 4.5)  # and that stayed recorded
    for mail in "abcd":
        case.taken(mail, 9.0, "p2")
    assert case.wrong() == {"not explained": 2}


def test_a_cancelled_mail_that_was_sent(case: Case) -> None:
    case.committed("ab", cancelled="a")
    case.committed("c")
    for mail in "abc":
        case.taken(mail, 1.0)
    assert case.wrong() == {"cancelled mails delivered all the same": 1}


def test_cancelled_in_the_commit_that_was_killed(case: Case) -> None:
    case.committed("ab", cancelled="a")
    case.kills = [Kill("c1", 2.0)]
    for mail in "ab":
        case.taken(mail, 1.0)
    assert case.wrong() == {}


def test_a_key_that_was_committed_twice(case: Case) -> None:
    case.committed("a", key="k")
    case.committed("b", key="k")
    case.spool = {"a": State.QUEUED, "b": State.QUEUED}
    assert case.wrong() == {"keys committed twice": 1}
