"""The circuit of a lane while the spool cannot be asked: no fault, and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest

from cpsmailaccess_delivery.circuit import Circuit
from cpsmailaccess_delivery.errors import SpoolError
from cpsmailaccess_delivery.interfaces import LaneNote
from cpsmailaccess_delivery.outcome import Trouble
from cpsmailaccess_delivery.retry import Schedule

LANE = "alice@example.org"


class Spool:
    """Keeps one note; for a while it can keep none."""

    def __init__(self) -> None:
        self.note: LaneNote | None = None
        self.is_away = False

    def lane_note(self, key: str) -> LaneNote | None:
        self.note_lane(key, self.note)
        return self.note

    def note_lane(self, key: str, note: LaneNote | None) -> None:
        if self.is_away:
            raise SpoolError("cannot connect")
        self.note = note


class Scene:
    def __init__(self) -> None:
        self.spool = Spool()
        self.now = 1000.0
        self.changes: list[bool] = []
        self.circuit = self.make()

    def make(self) -> Circuit:
        return Circuit(
            "lane",
            LANE,
            self.spool,
            schedule=Schedule(first=60, jitter=0),
            version=lambda: "1",
            now=lambda: self.now,
            chance=lambda: 0.0,
            tell=lambda note: self.circuit.told(),
            changed=lambda paused, why: self.changes.append(paused),
        )


def away() -> None:
    raise SpoolError("no space left on device")


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_who_waits_goes_on_waiting(scene: Scene) -> None:
    scene.circuit.open(Trouble.RELAY, "nobody listens")
    scene.spool.is_away = True
    for begins in (False, True):
        scene.circuit.look(begins=begins)
        assert scene.circuit.is_open
    scene.spool.is_away, scene.spool.note = False, None  # a person asks for a try
    scene.circuit.look()
    assert not scene.circuit.is_open


def test_what_could_not_be_noted_was_removed_by_nobody(scene: Scene) -> None:
    """A disk that is full is no reason to try a refused login again and again."""
    written = scene.spool.note_lane
    scene.spool.note_lane = lambda key, note: written(key, note) if note is None else away()
    scene.spool.lane_note = lambda key: scene.spool.note
    scene.circuit.open(Trouble.LOGIN, "535 no")
    for begins in (False, True):
        scene.circuit.look(begins=begins)
        assert scene.circuit.is_open
    scene.spool.note_lane = written
    scene.now += 61
    scene.circuit.open(Trouble.LOGIN, "535 no")
    assert scene.circuit.failures == 2
    scene.circuit.look()
    assert scene.circuit.is_open
    scene.spool.note = None  # a person asks for a try
    scene.circuit.look()
    assert not scene.circuit.is_open


def test_whose_circuit_is_closed_may_try(scene: Scene) -> None:
    scene.spool.is_away = True
    scene.circuit.look(begins=True)
    scene.circuit.recall(draining=False)
    assert not scene.circuit.is_open


def test_trouble_is_trouble(scene: Scene, caplog: Any) -> None:
    """It waits, and its owner is told when what is known can be kept again."""
    scene.spool.is_away = True
    scene.circuit.open(Trouble.LOGIN, "535 no")
    assert (scene.circuit.is_open, scene.changes) == (True, [True])
    assert "cannot keep why it waits" in caplog.text
    scene.now += 61
    scene.spool.is_away = False
    scene.circuit.open(Trouble.LOGIN, "535 no")
    assert (scene.spool.note.told, scene.changes) == (True, [True])
    scene.spool.is_away = True
    scene.circuit.close()
    assert not scene.circuit.is_open
    scene.spool.is_away = False
    again = scene.make()
    again.recall(draining=False)  # of another processor: the note is still there
    again.close()
    assert (scene.spool.note, scene.changes) == (None, [True, False])
