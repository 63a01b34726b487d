"""The soak itself: who runs, who is killed, and the quiet end."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import transaction

from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.errors import InvalidEnvelope, NoSuchEntry
from cpsmailaccess_delivery.interfaces import Entry, State

from .processes import MAILBOXES, commit, outbox_of, process
from .relay import Relay
from .verdict import Kill, Verdict, judge

PROCESSORS, COMMITTERS = 2, 4
_TESTS = Path(__file__).parents[1]
_DEADLINE = 120.0  # seconds that the quiet end may take


class Pack:
    """The processes that run; each has a name that none before it had."""

    def __init__(self, root: Path, chance: random.Random) -> None:
        self.kills: list[Kill] = []
        self._root, self._chance = root, chance
        self._context = ready_context()
        self._running: dict[str, Any] = {}
        self._count = 0

    def start(self, kind: str) -> None:
        self._count += 1
        name = f"{kind}{self._count}"
        args: tuple[Any, ...] = (self._root, name)
        if kind == "c":
            args = (*args, self._chance.getrandbits(32), self._count % 2 == 0)
        target: Callable[..., None] = process if kind == "p" else commit
        child = self._context.Process(target=target, args=args, daemon=True)
        child.start()
        self._running[name] = child

    def kill_one(self, look: Callable[[], frozenset[str]], kind: str = "") -> str:
        """Kill a random one; return its kind."""
        names = [name for name in self._running if name.startswith(kind)]
        name = self._chance.choice(names)
        child = self._running.pop(name)
        # The others stand still, so that the look shows what the dead one has left.
        others = [each.pid for each in self._running.values()] if name.startswith("p") else []
        for pid in others:
            _stop(pid)
        try:
            kill = Kill(name, time.time())
            child.kill()  # -9
            child.join()
            if name.startswith("p"):
                kill.spooled = look()
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)
        self.kills.append(kill)
        return name[0]

    def kill_all(self, look: Callable[[], frozenset[str]], kind: str = "") -> None:
        while any(name.startswith(kind) for name in self._running):
            self.kill_one(look, kind)

    @property
    def dead(self) -> list[str]:
        """Those that have died by themselves, which none should."""
        return [name for name, child in self._running.items() if not child.is_alive()]


def soak(root: Path, *, kills: int, seed: int, pause: tuple[float, float] = (0.05, 0.4)) -> Verdict:
    """Kill so often and judge.  `pause`: seconds between two kills, at least and at most."""
    chance = random.Random(seed)
    for name in ("truth", "plans"):
        (root / name).mkdir(parents=True)
    with Relay(random.Random(seed + 1)) as relay, outbox_of(root) as outbox:
        _put_accounts(outbox, relay)
        names = _Names(outbox)
        with _pack(root, chance, names.all) as pack:
            for kind in "p" * PROCESSORS + "c" * COMMITTERS:
                pack.start(kind)
            while len(pack.kills) < kills:
                time.sleep(chance.uniform(*pause))
                if pack.dead:
                    raise RuntimeError(f"{pack.dead} died by themselves")
                pack.start(pack.kill_one(names.all))
            pack.kill_all(names.all, "c")
            relay.behaves = True
            pack.kill_all(names.all)
            for _ in range(PROCESSORS):
                pack.start("p")  # the next start puts in order what the last deaths have left
            _wait_until_quiet(outbox)
        spool = {m: entry.state for m, entry in names.entries().items()}
        return judge(root, relay, pack.kills, spool)


def _stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + _DEADLINE
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "TZX":
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not stop")
        time.sleep(0.001)


def ready_context() -> Any:
    """Return what forks from a server that has imported everything: it does so in 10 ms.

    The server finds this package by the environment alone.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["soak.processes"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_TESTS), before)))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


@contextmanager
def _pack(root: Path, chance: random.Random, look: Callable[[], frozenset[str]]) -> Iterator[Pack]:
    pack = Pack(root, chance)
    try:
        yield pack
    finally:
        pack.kill_all(look)


def _put_accounts(outbox: Outbox, relay: Relay) -> None:
    with transaction.manager:
        for mailbox in MAILBOXES:
            outbox.accounts.put(
                Account(mailbox=mailbox, host="127.0.0.1", port=relay.port, security="plain")
            )


class _Names:
    """Message-Ids of the mails in the spool; a mail's is read once."""

    def __init__(self, outbox: Outbox) -> None:
        self._spool = outbox.spool
        self._known: dict[str, str] = {}

    def entries(self) -> dict[str, Any]:
        found = {}
        for entry in self._spool.scan():
            if entry.id not in self._known:
                try:
                    record = self._spool.load(entry)
                except (NoSuchEntry, InvalidEnvelope):
                    continue  # delivered meanwhile
                self._known[entry.id] = record.envelope.message_id
            found[self._known[entry.id]] = entry
        return found

    def all(self) -> frozenset[str]:
        return frozenset(self.entries())


def _wait_until_quiet(outbox: Outbox) -> None:
    deadline = time.monotonic() + _DEADLINE
    while time.monotonic() < deadline:
        clean = not outbox.spool.left_overs() and not outbox.spool.doubts()
        if clean and not any(_is_tried_again(entry) for entry in outbox.spool.scan()):
            return
        time.sleep(0.1)
    raise TimeoutError(f"after {_DEADLINE} s there are still mails to deliver")


def _is_tried_again(entry: Entry) -> bool:
    waiting = (State.QUEUED, State.DEFERRED)
    return entry.state in waiting or (entry.state is State.UNCLEAR and entry.due > 0)
