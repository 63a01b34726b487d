"""The soak itself: who runs, who is killed, and the quiet end."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transaction

from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.errors import InvalidEnvelope, NoSuchEntry
from cpsmailaccess_delivery.interfaces import Entry, State

from .processes import MAILBOXES, commit, is_database, outbox_of, process
from .relay import Relay
from .verdict import Kill, Verdict, judge

if TYPE_CHECKING:
    from postgres_server import Server

#: Of a PostgreSQL that dies: it waits for all of its processes, and one may wait for a client that
#: stands still while it connects.
SETTINGS = {"authentication_timeout": "1s"}

PROCESSORS, COMMITTERS = 2, 4
_TESTS = Path(__file__).parents[1]
_DEADLINE = 120.0  # seconds that the quiet end may take

#: Seconds for which a server that was killed is away at most.
_AWAY = 0.5

#: Seconds: others have the mails of who was killed soon, and nobody loses a lease by our looks.
_LEASE = 3


class Pack:
    """The processes that run; each has a name that none before it had."""

    def __init__(self, root: Path, location: str, chance: random.Random) -> None:
        self.kills: list[Kill] = []
        self._root, self._location, self._chance = root, location, chance
        self._context = ready_context()
        self._running: dict[str, Any] = {}
        self._count = 0

    def start(self, kind: str) -> None:
        self._count += 1
        name = f"{kind}{self._count}"
        args: tuple[Any, ...] = (self._root, self._location, name)
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
        with self._standing_still() if name.startswith("p") else nullcontext():
            kill = Kill(name, time.time())
            child.kill()  # -9
            child.join()
            if name.startswith("p"):
                kill.spooled = look()
        self.kills.append(kill)
        return name[0]

    def kill_server(self, server: Server, look: Callable[[], frozenset[str]]) -> None:
        """Let the database die, all of it or one of its processes, and come again."""
        self._count += 1
        kill = Kill(f"s{self._count}", time.time())
        die = self._chance.choice((server.kill, server.stop, server.kill_one))
        die()
        if die != server.kill_one:  # else it is back at once, and nothing may go on before we look
            time.sleep(self._chance.uniform(0.0, _AWAY))
        with self._standing_still():
            server.recover()
            kill.spooled = look()
            kill.until = time.time()
        self.kills.append(kill)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        pids = [each.pid for each in self._running.values()]
        for pid in pids:
            _stop(pid)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def kill_all(self, look: Callable[[], frozenset[str]], kind: str = "") -> None:
        while any(name.startswith(kind) for name in self._running):
            self.kill_one(look, kind)

    @property
    def dead(self) -> list[str]:
        """Those that have died by themselves, which none should."""
        return [name for name, child in self._running.items() if not child.is_alive()]


def soak(
    root: Path,
    *,
    kills: int,
    seed: int,
    pause: tuple[float, float] = (0.05, 0.4),
    server: Server | None = None,
    servers: float = 0.1,
) -> Verdict:
    """Kill so often and judge.

    `pause`: seconds between two kills, at least and at most.  `server`: the outbox is on this
    PostgreSQL, which is killed, too: so large a share of the kills, `servers`, are its own; else in
    a directory.
    """
    chance = random.Random(seed)
    for name in ("truth", "plans"):
        (root / name).mkdir(parents=True)
    location = f"{server.new_database()}?lease={_LEASE}" if server else str(root / "outbox")
    with (
        _all_is_in_doubt(location),
        Relay(random.Random(seed + 1)) as relay,
        outbox_of(root, location) as outbox,
    ):
        _put_accounts(outbox, relay)
        names = _Names(outbox)
        with _pack(root, location, chance, names.all) as pack:
            for kind in "p" * PROCESSORS + "c" * COMMITTERS:
                pack.start(kind)
            while len(pack.kills) < kills:
                time.sleep(chance.uniform(*pause))
                if pack.dead:
                    raise RuntimeError(f"{pack.dead} died by themselves")
                if server and chance.random() < servers:
                    pack.kill_server(server, names.all)
                else:
                    pack.start(pack.kill_one(names.all))
            pack.kill_all(names.all, "c")
            relay.behaves = True
            pack.kill_all(names.all)
            for _ in range(PROCESSORS):
                pack.start("p")  # the next start puts in order what the last deaths have left
            _wait_until_quiet(outbox)
            pack.kill_all(names.all)
        spool = {m: entry.state for m, entry in names.entries().items()}
        accepted = None if server else _accepted(outbox)
        return judge(root, relay, pack.kills, spool, accepted)


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
    # What is not installed is passed over.
    context.set_forkserver_preload(["soak.processes", "cpsmailaccess_delivery.pg.backend"])
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
def _all_is_in_doubt(location: str) -> Iterator[None]:
    """On PostgreSQL what is staged counts as in doubt for us at once: it is not quiet yet."""
    if not is_database(location):
        yield
        return
    from cpsmailaccess_delivery.pg import staging

    before, staging.DOUBT_AFTER = staging.DOUBT_AFTER, 0.0
    try:
        yield
    finally:
        staging.DOUBT_AFTER = before


@contextmanager
def _pack(
    root: Path, location: str, chance: random.Random, look: Callable[[], frozenset[str]]
) -> Iterator[Pack]:
    pack = Pack(root, location, chance)
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


def _accepted(outbox: Outbox) -> set[str]:
    """Return the mails of which the journal says that a relay took them."""
    outbox.journal.recover()
    with closing(sqlite3.connect(outbox.journal.path)) as connection:
        rows = connection.execute("SELECT message_id FROM events WHERE kind = 'accepted'")
        return {row[0] for row in rows}


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
