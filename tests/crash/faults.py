"""Each call of the commit and of the settle path fails, in every way, once or from then on.

After it the fault goes, and what is found must be one of the ends that were promised.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recorder import Call, Recorder
from transaction import TransactionManager
from world import (
    ABSENT,
    ACCEPTED,
    BOB,
    BOTH,
    CAROL,
    DEFERRED,
    DOUBT,
    HELD,
    MAILBOX,
    NOBODY,
    NOW,
    QUEUED,
    REFUSED,
    ROUTE,
    UNCLEAR,
    Expected,
    Truth,
    World,
    judge,
    message,
    observe,
)

from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.attempt import Attempt
from cpsmailaccess_delivery.datamanager import join
from cpsmailaccess_delivery.envelope import Envelope
from cpsmailaccess_delivery.errors import OutboxError, SpoolError
from cpsmailaccess_delivery.interfaces import Entry, Settlement, State, Verdict
from cpsmailaccess_delivery.outgoing import Removal, Removals

ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EMFILE", "EACCES", "EROFS")

_ADDS = ("create", "mkdir", "write", "writev", "pwrite", "rename", "replace", "link")
_CHANGES = (*_ADDS, "unlink", "rmdir", "chmod", "fchmod", "utime")

#: Which calls a fault that lasts stops; the others go on as before.
LASTING = {
    "ENOSPC": _ADDS,
    "EDQUOT": _ADDS,
    "EIO": (*_CHANGES, "fsync", "syncfs", "open", "read", "stat", "fstat", "listdir"),
    "EMFILE": ("create", "open"),
    "EACCES": ("create", "open", "mkdir", "rename", "replace", "link", "unlink", "chmod"),
    "EROFS": _CHANGES,
}

A, B = "a@x", "b@x"
KEY = "k"


class Fault:
    """Fails call number `at`, or all from then on that such a fault stops, until it goes."""

    def __init__(self, at: int, name: str, *, lasting: bool) -> None:
        self._at = at
        self._name = name
        self._lasting = lasting
        self.seen = 0
        self.hit: list[Call] = []

    def __call__(self, call: Call) -> OSError | None:
        number, self.seen = self.seen, self.seen + 1
        if number < self._at or (number > self._at and not self._lasting):
            return None
        if self._lasting and call.name not in LASTING[self._name]:
            return None
        self.hit.append(call)
        code = getattr(errno, self._name)
        return OSError(code, os.strerror(code))


Play = Callable[[World, Callable[[], None]], list[str]]
PATHS: dict[str, Play] = {}

#: Of the paths that begin with a mail, whether that has a side file from an earlier attempt.
TRIED: dict[str, bool] = {}


def path(function: Play) -> Play:
    PATHS[function.__name__] = function
    return function


class Participant:
    """The database of the application: whether it has committed is what counts."""

    def __init__(self, manager: Any) -> None:
        self.transaction_manager = manager
        self.committed = False

    def sortKey(self) -> str:
        return "a database"

    def tpc_begin(self, transaction: Any) -> None: ...

    def commit(self, transaction: Any) -> None: ...

    def tpc_vote(self, transaction: Any) -> None: ...

    def tpc_finish(self, transaction: Any) -> None:
        self.committed = True

    def abort(self, transaction: Any) -> None: ...

    tpc_abort = abort


class Veto(Participant):
    """It is asked last, and will not."""

    def sortKey(self) -> str:
        return "~~~~ a database that will not"

    def tpc_vote(self, transaction: Any) -> None:
        raise SpoolError("a veto")


def _commit(
    world: World,
    fault_goes: Callable[[], None],
    *,
    key: str = "",
    account: bool = False,
    database: type[Participant] = Participant,
    witness: Any = None,
) -> list[str]:
    manager = TransactionManager()
    database = database(manager)
    old = Account(mailbox=MAILBOX, host="smtp.example.org", username="alice", password="old")
    bad = []
    try:
        with manager as transaction:
            transaction.join(database)
            for message_id in (A, B):
                envelope = Envelope(
                    sender=MAILBOX,
                    recipients=(BOB, CAROL),
                    route=ROUTE,
                    message_id=message_id,
                    key=key if message_id == A else "",
                )
                join(
                    manager,
                    world.spool,
                    lambda _, e=envelope: world.spool.stage(e, message(e.message_id)),
                    rank=1,
                    witness=witness,
                )
            if account:
                new = old.replace(password="new")

                def stage(token: str) -> str:
                    return world.vault.stage(MAILBOX, new, token)

                join(manager, world.vault, stage, rank=0, witness=witness)
    except OutboxError:
        pass
    except Exception as error:
        bad.append(f"fails with {error!r}")
    fault_goes()
    done = database.committed
    world.truth = Truth(
        mails=dict.fromkeys((A, B), Expected(frozenset((QUEUED if done else ABSENT,)))),
        holders={key: frozenset((A if done else None,))} if key else {},
        passwords={MAILBOX: frozenset(("old", "new") if done else ("old",))} if account else {},
        unreported={MAILBOX: frozenset(("new" if done else "old",))} if account else {},
    )
    world.spool.sweep()
    if not done and list(world.spool.scan()):
        bad.append("aborted, and visible")
    return bad


@path
def commit(world: World, fault_goes: Callable[[], None]) -> list[str]:
    return _commit(world, fault_goes)


@path
def commit_with_key(world: World, fault_goes: Callable[[], None]) -> list[str]:
    return _commit(world, fault_goes, key="k")


@path
def commit_with_account(world: World, fault_goes: Callable[[], None]) -> list[str]:
    return _commit(world, fault_goes, account=True)


class Knowing:
    """A witness that will know."""

    def mark(self, transaction: Any) -> str:
        return ""

    def expects(self, transaction: Any) -> bool:
        return True


@path
def commit_witnessed_with_key_and_account(
    world: World, fault_goes: Callable[[], None]
) -> list[str]:
    return _commit(world, fault_goes, key="k", account=True, witness=Knowing())


@path
def abort_with_key_and_account(world: World, fault_goes: Callable[[], None]) -> list[str]:
    return _commit(world, fault_goes, key="k", account=True, database=Veto)


def _commit_that_cancels(name: str, witness: Any) -> None:
    """Add the path of a transaction that takes a mail back."""

    def path(world: World, fault_goes: Callable[[], None]) -> list[str]:
        manager = TransactionManager()
        database = Participant(manager)
        removals = Removals(world.spool, None, time.time)
        bad = []
        try:
            with manager as transaction:
                transaction.join(database)
                removal = Removal(world.entries[A])
                join(manager, removals, removal.begin, rank=2, witness=witness)
        except OutboxError:
            pass
        except Exception as error:
            bad.append(f"fails with {error!r}")
        fault_goes()
        verdict = Verdict.COMMITTED if database.committed else Verdict.ABORTED
        world.spool.sync()
        _resolve(world, verdict)
        fates = {ABSENT if database.committed else QUEUED}
        if witness is None:
            fates.add(DOUBT)  # where neither commit nor abort could be recorded
        world.truth = Truth(mails={A: Expected(frozenset(fates))})
        return bad

    PATHS[name] = path
    TRIED[name] = False


def _settling(
    name: str, state: State, fate: str, *, tried: bool = False, reason: str = "", **outcomes: Any
) -> None:
    """Add the path that claims a mail and settles it; what failed is done again."""
    known = {f"{who}@example.net": outcome for who, outcome in outcomes.items()}
    final = frozenset(a for a, o in known.items() if o.state in (State.ACCEPTED, State.REFUSED))

    def path(world: World, fault_goes: Callable[[], None]) -> list[str]:
        entry = world.entries[A]
        settlement = Settlement(state, known, due=NOW, attempts=entry.attempts + 1, reason=reason)
        bad = []
        lease = _try(lambda: world.spool.claim(entry), bad)
        if lease is not None:
            if tried and BOB in Attempt(lease).recipients:
                bad.append("would be sent to bob again")
            if not _try(lambda: lease.settle(settlement) or True, bad):
                fault_goes()
                if not world.spool.leased(entry):
                    bad.append("not settled, and not leased any more")
                lease.settle(settlement)
            _try(lambda: world.spool.sync() or True, bad)
        fault_goes()
        if lease is None:
            for found in world.spool.scan():
                if (again := world.spool.claim(found)) is not None:
                    again.settle(settlement)
        world.spool.sync()
        gone = fate == ABSENT
        expected = Expected(
            frozenset((fate,)), NOBODY if gone else final, NOBODY if gone else BOTH - final
        )
        world.truth = Truth(mails={A: expected})
        return bad

    PATHS[name] = path
    TRIED[name] = tried


_commit_that_cancels("commit_that_cancels", None)
_commit_that_cancels("commit_witnessed_that_cancels", Knowing())
_settling("accepted", State.ACCEPTED, ABSENT)
_settling("accepted_at_last", State.ACCEPTED, ABSENT, tried=True)
_settling("deferred", State.DEFERRED, State.DEFERRED, bob=DEFERRED, carol=DEFERRED)
_settling("one_accepted", State.DEFERRED, State.DEFERRED, bob=ACCEPTED, carol=DEFERRED)
_settling("deferred_again", State.DEFERRED, State.DEFERRED, tried=True, bob=ACCEPTED)
_settling("refused", State.REFUSED, State.REFUSED, bob=REFUSED, carol=ACCEPTED)
_settling("unclear", State.UNCLEAR, State.UNCLEAR, bob=UNCLEAR, carol=UNCLEAR)
_settling("held", State.HELD, HELD, reason="a fault")
_settling("cancelled", State.CANCELLED, ABSENT)


def _person(
    name: str, act: Callable[[World, Entry], object], fate: str, holder: str | None = A
) -> None:
    """Add the path of what a person does; what failed is done again."""

    def do(world: World, fault_goes: Callable[[], None]) -> list[str]:
        bad: list[str] = []
        done = _try(lambda: act(world, world.entries[A]) or True, bad)
        fault_goes()
        if not done:
            for entry in world.spool.scan():
                act(world, entry)
        world.spool.sync()
        world.truth = Truth(
            mails={A: Expected(frozenset((fate,)))}, holders={KEY: frozenset((holder,))}
        )
        return bad

    PATHS[name] = do
    TRIED[name] = False


_person("person_holds", lambda world, entry: world.spool.hold(entry, "why"), HELD)
_person("person_cancels", lambda world, entry: world.spool.cancel(entry), ABSENT, None)
_person("person_retries", lambda world, entry: world.spool.requeue(entry), QUEUED)


def _asked(name: str, verdict: Verdict, fate: str) -> None:
    """Add the path of what a witness says of a cancel in doubt; each sweep asks again."""

    def path(world: World, fault_goes: Callable[[], None]) -> list[str]:
        bad: list[str] = []
        _try(lambda: _resolve(world, verdict), bad)
        fault_goes()
        _resolve(world, verdict)
        world.spool.sync()
        world.truth = Truth(mails={A: Expected(frozenset((fate,)))})
        return bad

    PATHS[name] = path
    TRIED[name] = False


def _resolve(world: World, verdict: Verdict) -> None:
    for doubt in world.spool.doubts():
        world.spool.resolve(doubt, verdict)


_asked("witness_says_cancelled", Verdict.COMMITTED, ABSENT)
_asked("witness_says_not_cancelled", Verdict.ABORTED, QUEUED)


def _try(act: Callable[[], Any], bad: list[str]) -> Any:
    """Return what a step returns; None: it failed as it may."""
    try:
        return act()
    except SpoolError:
        return None
    except Exception as error:
        bad.append(f"fails with {error!r}")
        return None


def play(name: str, workplace: Path, fault: Fault | None = None) -> tuple[int, list[str]]:
    """Play a path in a directory of its own; return how many calls, and what went wrong."""
    root = Path(tempfile.mkdtemp(dir=workplace))
    recorder = Recorder(root)
    bad = []
    calls: list[int] = []
    before = _open_files()
    with recorder.recording():
        world = World(root, recorder)
        if name.endswith("_account"):
            world.put("old")
        if name in TRIED:
            world.commit(A, key=KEY if name.startswith("person_") else "")
        if name.startswith("witness_"):
            world.set_aside(A, QUEUED, token="a transaction").leave()
        if TRIED.get(name):
            world.settle(A, State.DEFERRED, State.DEFERRED, bob=ACCEPTED, carol=DEFERRED)
        recorder.calls.clear()
        recorder.fault = fault

        def fault_goes() -> None:
            calls.append(len(recorder.calls))
            recorder.fault = None

        try:
            bad += PATHS[name](world, fault_goes)
        except Exception as error:
            bad.append(f"does not recover: {error!r}")
        finally:
            fault_goes()
        truth = world.die()
    if _open_files() > before:
        bad.append("leaves files open")
    bad += judge(truth, observe(root, truth))
    shutil.rmtree(root)
    return calls[0], bad


def faults(calls: int, *, full: bool) -> Iterator[tuple[int, str, bool]]:
    """Yield every fault that a path with so many calls may meet: number, error, lasting.

    Not `full`: a third of the errors for each call, taking turns.
    """
    for at in range(calls):
        for number, error in enumerate(ERRORS):
            if full or (number - at) % 3 == 0:
                yield at, error, False
                yield at, error, True
        if full or at % 3 == 0:
            yield at, "EINTR", False  # which does not last


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
