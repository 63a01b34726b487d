"""A lane in trouble looks at its old mails, and keeps no other lane waiting meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from cpsmailaccess_delivery.aging import Aging
from cpsmailaccess_delivery.interfaces import Entry
from cpsmailaccess_delivery.ready import Ready
from cpsmailaccess_delivery.retry import Schedule

NOW = 1_700_000_000.0
HOUR = 3600


class Loop:
    """Calls what should be called soon when it is told to."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, work: Callable[[], None]) -> None:
        self.soon.append(work)

    def step(self) -> None:
        soon, self.soon = self.soon, []
        for work in soon:
            work()


class Lane:
    """What `Aging` wants of one: nothing of its mails is ever to be settled."""

    def __init__(self, count: int, *, age: int, expires: Callable[[int], float]) -> None:
        self.loop = Loop()
        self.now = NOW
        self.opened = 0
        self.ready = Ready()
        self.circuit = SimpleNamespace(failures=1)
        shared = SimpleNamespace(schedule=Schedule(), now=lambda: self.now, loop=self.loop)
        notices = SimpleNamespace(delay_is_due=lambda mail: False)
        self.aging = Aging(
            self,  # type: ignore[arg-type]
            shared,  # type: ignore[arg-type]
            SimpleNamespace(full=False, notices=notices),  # type: ignore[arg-type]
            claim=self.claim,  # type: ignore[arg-type]
            changed=lambda: None,
        )
        for number in range(count):
            entry = Entry(f"{NOW - age:.0f}.{number}", "lane", expires=expires(number))
            self.ready.append(entry)
            if entry.expires:
                self.aging.expect(entry)

    def claim(self, entry: Entry, lane: object) -> SimpleNamespace:
        self.opened += 1
        return SimpleNamespace(lease=SimpleNamespace(entry=entry, release=lambda: None))

    def work(self) -> None:
        self.aging.look()


@pytest.fixture
def pops(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """What was taken from the front of a lane."""
    taken: list[Entry] = []
    popleft = Ready.popleft

    def watched(self: Ready) -> Entry:
        taken.append(popleft(self))
        return taken[-1]

    monkeypatch.setattr(Ready, "popleft", watched)
    return taken


def never(number: int) -> float:
    return 0.0


def test_each_mail_is_looked_at_once_however_many_are_opened(pops: list[Entry]) -> None:
    lane = Lane(2000, age=5 * HOUR, expires=never)
    order = list(lane.ready)
    lane.work()
    steps = 1
    while lane.aging.busy:
        opened = lane.opened
        lane.loop.step()
        assert lane.opened - opened <= 100
        steps += 1
    assert (lane.opened, steps) == (2000, 20)
    assert len(pops) <= 2000 + steps
    assert list(lane.ready) == order


def test_a_step_is_short_though_all_are_young(pops: list[Entry]) -> None:
    lane = Lane(12_000, age=60, expires=never)
    order = list(lane.ready)
    lane.work()
    assert len(pops) == 5000
    lane.work()  # something else happened in the lane: that schedules no second walk
    assert len(lane.loop.soon) == 1
    assert len(lane.aging.entries()) + len(lane.ready) == 12_000
    lane.loop.step()
    assert not lane.aging.busy
    assert list(lane.ready) == order


def test_there_is_no_walk_for_each_mail_that_expires(pops: list[Entry]) -> None:
    lane = Lane(20_000, age=60, expires=lambda number: NOW + 1 + number / 1000)
    lane.work()
    while lane.aging.busy:
        lane.loop.step()
    assert len(pops) == 20_000
    assert lane.aging.next == NOW + 1
    for lane.now in (NOW + 1, NOW + 1.001, NOW + 1.5):
        lane.work()
        while lane.aging.busy:
            lane.loop.step()
    assert len(pops) < 2 * 20_000 + 100
    assert NOW + 1.9 < lane.aging.next < NOW + 2.1


def test_what_was_looked_at_goes_first_when_the_lane_may_send() -> None:
    lane = Lane(12_000, age=60, expires=never)
    order = list(lane.ready)
    lane.work()
    lane.aging.give_back()
    assert list(lane.ready) == order
    assert not lane.aging.walking
