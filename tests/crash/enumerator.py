"""Every state that a power loss may leave of every story, each started from, each judged."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from disk import Disk, State, lay_out
from recorder import BY_HAND, Op
from stories import NAMES, record
from world import Observation, Truth, judge, observe

from cpsmailaccess_delivery.spool import durable


@dataclass(slots=True)
class Count:
    """What was looked at."""

    moments: int = 0  # of a story, at which the power may fail
    cases: int = 0  # states with what had been promised by then
    violations: list[str] = field(default_factory=list)


class Enumerator:
    """`workplace`: an empty directory, best in memory.  Observations are kept.

    `keeps_names`: the spool takes the file system for one whose fsync of a file keeps its name.
    """

    def __init__(self, workplace: Path, *, keeps_names: bool = False) -> None:
        self._workplace = workplace
        self._keeps_names = keeps_names
        self._stories: dict[tuple[str, bool], list[Op]] = {}
        self._seen: dict[tuple[State, int], Observation] = {}
        self._looks: dict[tuple[Any, ...], int] = {}

    @property
    def states(self) -> int:
        """How many different states were started from."""
        return len(self._seen)

    def story(self, name: str, *, syncfs: bool) -> list[Op]:
        """Return what a story does, the same in every run."""
        if (name, syncfs) not in self._stories:
            root = Path(tempfile.mkdtemp(dir=self._workplace))
            with (
                _no_chance(),
                mock.patch.object(durable, "_quiet", return_value=syncfs),
                mock.patch.object(durable, "_keeps_names", return_value=self._keeps_names),
            ):
                self._stories[name, syncfs] = record(name, root)
            shutil.rmtree(root)
        return self._stories[name, syncfs]

    def sites(self, name: str, *, syncfs: bool) -> set[str]:
        """Return the syncs of a story, by where they are called."""
        return {op.site for op in self.story(name, syncfs=syncfs) if op.kind in ("sync", "syncfs")}

    def run(
        self,
        name: str,
        model: str,
        *,
        syncfs: bool,
        without: str = "",
        stop: bool = False,
        states: set[State] | None = None,
    ) -> Count:
        """Judge every state of a story.

        `without`: a site whose syncs are taken for not having happened.  `stop`: at the
        first violation.  `states`: gets the states.
        """
        count = Count()
        disk, truth = Disk(model), Truth()
        judged: set[tuple[State, int]] = set()
        for number, op in enumerate(self.story(name, syncfs=syncfs)):
            if op.site and op.site == without:
                continue
            disk.apply(op)
            if op.kind == "mark":
                (truth,) = op.args
            elif op.kind in ("sync", "syncfs", "settle") or op.site == BY_HAND:
                continue  # leaves nothing that was not possible before
            count.moments += 1
            for state in disk.states():
                case = (state, id(truth))
                if case in judged:
                    continue
                judged.add(case)
                count.cases += 1
                if states is not None:
                    states.add(state)
                for wrong in judge(truth, self._observe(state, truth)):
                    count.violations.append(f"{name}, {model}, after {number} {op.kind}: {wrong}")
                    if stop:
                        return count
        return count

    def _observe(self, state: State, truth: Truth) -> Observation:
        look = self._looks.setdefault(
            (tuple(truth.holders), tuple(truth.passwords)), len(self._looks)
        )
        found = self._seen.get((state, look))
        if found is None:
            root = Path(tempfile.mkdtemp(dir=self._workplace))
            lay_out(state, root)
            found = self._seen[state, look] = observe(root, truth)
            shutil.rmtree(root)
        return found


@contextmanager
def _no_chance() -> Iterator[None]:
    """Names that are otherwise random are the same in every run."""
    numbers = iter(range(1, 1 << 30))

    def chance(size: int | None = None) -> bytes:
        return next(numbers).to_bytes(size or 32, "big")

    with (
        mock.patch.object(os, "urandom", chance),
        mock.patch.object(secrets, "token_bytes", chance),
    ):
        yield


def all_sites(enumerator: Enumerator) -> dict[str, list[tuple[str, bool]]]:
    """Return every sync of every story: where it is called, and in which stories.

    Those come first that are short.
    """
    found: dict[str, list[tuple[str, bool]]] = {}
    for name in reversed(NAMES):
        for syncfs in (False, True):
            for site in enumerator.sites(name, syncfs=syncfs):
                found.setdefault(site, []).append((name, syncfs))
    return found


def is_missed(enumerator: Enumerator, site: str, model: str) -> str:
    """Return the first violation when the syncs of a site do not happen; "": none."""
    for name, syncfs in all_sites(enumerator)[site]:
        count = enumerator.run(name, model, syncfs=syncfs, without=site, stop=True)
        if count.violations:
            return count.violations[0]
    return ""
