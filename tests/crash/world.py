"""A process that uses a spool and a vault, and what must be true of them at every moment.

`World` does what the package does, and marks in the recording what a power loss may leave
from then on.  `observe` is the next start: it tidies, lists and claims as a processor does.
`judge` compares the two.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recorder import BY_HAND, Call, Op, Recorder

from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.attempt import Attempt
from cpsmailaccess_delivery.envelope import Envelope, Route, digest
from cpsmailaccess_delivery.errors import KeyTaken, NoSuchAccount
from cpsmailaccess_delivery.interfaces import Entry, LaneNote, Outcome, Settlement, State, Verdict
from cpsmailaccess_delivery.key import KeySource
from cpsmailaccess_delivery.rekey import rekey
from cpsmailaccess_delivery.spool import Maildir, Presence, doubts, forks, keys
from cpsmailaccess_delivery.vault import Vault

BOB, CAROL = "bob@example.net", "carol@example.net"
BOTH = frozenset((BOB, CAROL))
NOBODY: frozenset[str] = frozenset()
MAILBOX = "alice@example.org"
ROUTE = Route(MAILBOX, "smtp.example.org", 587)
NOW = 1_700_000_000.0

ACCEPTED = Outcome(State.ACCEPTED, "250 2.0.0 ok", NOW)
DEFERRED = Outcome(State.DEFERRED, "450 4.2.1 later", NOW)
REFUSED = Outcome(State.REFUSED, "550 5.1.1 nobody", NOW)
UNCLEAR = Outcome(State.UNCLEAR, "", NOW)

_DOUBTS = (doubts.IN_DOUBT, doubts.ASKED, doubts.CANCEL_IN_DOUBT)

#: What may have become of a mail: not there, in doubt (a witness is asked), or its state.
ABSENT, DOUBT, ASKED, QUEUED, HELD = "absent", "in doubt", "asked", "queued", "held"

_chance = itertools.count(1)


def message(message_id: str) -> bytes:
    """Return what a mail says: nothing that occurs in it twice, so that no part is the whole."""
    return b"Subject: " + message_id.encode() + b"\n\n" + bytes(range(256)) * 2 + b"\nend\n"


@dataclass(frozen=True, slots=True)
class Expected:
    """Of one mail: what may have become of it, who must not get it again, who still must."""

    fates: frozenset[str]
    never: frozenset[str] = NOBODY
    must: frozenset[str] = BOTH


@dataclass(frozen=True, slots=True)
class Truth:
    """What holds at a moment."""

    mails: dict[str, Expected] = field(default_factory=dict)
    holders: dict[str, frozenset[str | None]] = field(default_factory=dict)  # by key
    #: by key: its mail; whether it is free when that is not there, and held when it is
    pairs: dict[str, tuple[str, bool, bool]] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)  # keys, until when at least
    passwords: dict[str, frozenset[str | None]] = field(default_factory=dict)  # by mailbox
    unreported: dict[str, frozenset[str | None]] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()  # paths that must not come back


@dataclass(slots=True)
class Observation:
    """What a start found."""

    mails: dict[str, list[tuple[str, frozenset[str], bool]]] = field(default_factory=dict)
    holders: dict[str, str | None] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    passwords: dict[str, str | None] = field(default_factory=dict)
    reported: tuple[str, ...] = ()
    paths: frozenset[str] = frozenset()  # of the files of the vault, and its keys
    troubles: list[str] = field(default_factory=list)


class World:
    """One process on one spool.  The truth of the one before it goes on."""

    def __init__(self, root: Path, recorder: Recorder, truth: Truth | None = None) -> None:
        self._recorder = recorder
        self.truth = truth or Truth()
        self.entries: dict[str, Entry] = {}
        self.keys: dict[str, str] = {}  # of the mails that have one
        self._prepared: set[str] = set()
        self.presence = Presence(root / "box" / "presence")
        clock = itertools.count(NOW)
        self.spool = Maildir(root / "box", self.presence, clock=lambda: next(clock), notify=False)
        self._source = KeySource(file=root / "box.key")
        self.vault = Vault(root / "box" / "accounts", self._source, self.presence)

    def die(self) -> Truth:
        """Leave everything as it is, as kill -9 does."""
        forks.drop(self.presence._fd)
        self.presence._fd = -1
        self.spool._staging._staged.clear()
        self.spool.close()
        return self.truth

    def rest(self) -> None:
        """Let the disk catch up: the kernel writes what is half a minute old."""
        self._recorder.ops.append(Op("settle", ()))

    @contextmanager
    def failing(self, name: str, where: str) -> Iterator[None]:
        """Let calls fail: the disk is full."""

        def fault(call: Call) -> OSError | None:
            return (
                OSError(errno.ENOSPC, "full") if call.name == name and where in call.what else None
            )

        self._recorder.fault = fault
        try:
            yield
        finally:
            self._recorder.fault = None

    @contextmanager
    def by_hand(self) -> Iterator[None]:
        """What others do is not ours to answer for: no power loss until it is on the disk."""
        before = len(self._recorder.ops)
        yield
        ops = self._recorder.ops
        ops[before:] = [op._replace(site=BY_HAND) for op in ops[before:]]
        self.rest()

    # What holds from now on

    def _holds(self, **parts: dict[str, Any]) -> None:
        changed = {name: {**getattr(self.truth, name), **part} for name, part in parts.items()}
        self.truth = replace(self.truth, **changed)
        self._recorder.mark(self.truth)

    def expect(
        self,
        ids: Iterable[str],
        *fates: str,
        never: frozenset[str] = NOBODY,
        must: frozenset[str] = BOTH,
    ) -> None:
        expected = Expected(frozenset(fates), never, must)
        self._holds(mails=dict.fromkeys(ids, expected))

    def expect_key(
        self,
        ids: Iterable[str],
        *,
        held: bool = False,
        free: bool = False,
        absent_free: bool = False,
        there_held: bool = False,
    ) -> None:
        """Say of the keys of mails: held by them; free; or as the mail is there or not."""
        for message_id in ids:
            if key := self.keys.get(message_id):
                holders = [message_id] * (not free) + [None] * (not held)
                pair = (message_id, absent_free, there_held)
                self._holds(holders={key: frozenset(holders)}, pairs={key: pair})

    # Transactions

    def stage(self, *ids: str, key: str = "", **wishes: Any) -> None:
        self.expect(ids, ABSENT)
        for message_id in ids:
            if key:
                self.keys[message_id] = key
            envelope = Envelope(
                sender=MAILBOX,
                recipients=(BOB, CAROL),
                route=ROUTE,
                message_id=message_id,
                key=key,
                **wishes,
            )
            self.entries[message_id] = self.spool.stage(envelope, message(message_id))

    def prepare(self, *ids: str, witnessed: bool = False, alone: bool = False) -> None:
        if alone:  # what it tells of is recorded when it is published
            self.spool.prepare([self.entries[i] for i in ids], alone=True)
            return
        doubt = ASKED if witnessed else DOUBT
        self.expect_key(ids, absent_free=True, there_held=True)
        self.expect(ids, ABSENT, doubt)
        self._prepared.update(ids)
        self.spool.prepare([self.entries[i] for i in ids], witnessed=witnessed)
        self.expect(ids, doubt)
        self.expect_key(ids, held=True)

    def publish(self, *ids: str) -> None:
        before = DOUBT if self._prepared.issuperset(ids) else ABSENT
        self.expect(ids, before, QUEUED)
        self.spool.publish([self.entries[i] for i in ids])
        self.expect(ids, QUEUED)

    def discard(self, *ids: str) -> None:
        self.expect(ids, ABSENT, *(DOUBT for i in ids if i in self._prepared))
        self.expect_key(ids, absent_free=True)
        self.spool.discard([self.entries[i] for i in ids])
        self.expect_key(ids, free=True)
        self.expect(ids, ABSENT)

    def commit(self, *ids: str, key: str = "", **wishes: Any) -> None:
        self.stage(*ids, key=key, **wishes)
        self.prepare(*ids)
        self.publish(*ids)

    # Attempts

    def settle(
        self,
        message_id: str,
        state: State,
        *fates: str,
        attempts: int = 1,
        reason: str = "",
        **outcomes: Outcome,
    ) -> None:
        """Settle a mail; `fates`: what it may be once that has returned."""
        before = self.truth.mails[message_id]
        lease = self.spool.claim(self.entries[message_id])
        assert lease is not None
        known = {f"{name}@example.net": outcome for name, outcome in outcomes.items()}
        final = {a for a, o in known.items() if o.state in (State.ACCEPTED, State.REFUSED)}
        gone = state in (State.ACCEPTED, State.CANCELLED)
        must = NOBODY if gone else before.must - final
        self.expect([message_id], *before.fates, *fates, never=before.never, must=must)
        settlement = Settlement(state, known, due=NOW, attempts=attempts, reason=reason)
        after = lease.settle(settlement)
        never = before.never if gone else before.never | final
        self.expect([message_id], *fates, never=never, must=must)
        if after is not None:
            self.entries[message_id] = after

    def set_aside(self, message_id: str, *fates: str, token: str = "") -> Any:
        """Return the lease of a mail that stays held, or in doubt, when this process dies."""
        before, after = self.truth.mails[message_id], ASKED if token else HELD
        lease = self.spool.claim(self.entries[message_id])
        assert lease is not None
        self._now(message_id, before, *fates, after)
        lease.set_aside("why", token)
        self._now(message_id, before, after)
        return lease

    def accept(self, *ids: str) -> None:
        """All is accepted; in doubt: its old name in tmp/ may come back."""
        for message_id in ids:
            self.settle(message_id, State.ACCEPTED, ABSENT, QUEUED, State.DEFERRED, DOUBT)

    def sync(self, *gone: str) -> None:
        self.spool.sync()
        self.expect(gone, ABSENT)

    # People

    def hold(self, message_id: str) -> None:
        before = self.truth.mails[message_id]
        self._now(message_id, before, *before.fates, HELD)
        self.entries[message_id] = self.spool.hold(self.entries[message_id], "why")
        self._now(message_id, before, HELD)

    def requeue(self, message_id: str) -> None:
        before = self.truth.mails[message_id]
        self._now(message_id, before, *before.fates, QUEUED)
        self.entries[message_id] = self.spool.requeue(self.entries[message_id])

    def cancel(self, message_id: str) -> None:
        before = self.truth.mails[message_id]
        self._now(message_id, before, *before.fates, ABSENT, DOUBT)
        self.expect_key([message_id], absent_free=True, there_held=True)
        self.spool.cancel(self.entries[message_id])
        self.expect_key([message_id], free=True)
        self._now(message_id, before, ABSENT)

    def _now(self, message_id: str, before: Expected, *fates: str) -> None:
        self._holds(mails={message_id: replace(before, fates=frozenset(fates))})

    # Accounts and lanes

    def put(self, password: str | None, *, end: str = "publish") -> None:
        """Change or (None) delete the account; `end`: publish, discard, or die in doubt."""
        before = self.truth.passwords.get(MAILBOX, frozenset((None,)))
        account = None
        if password is not None:
            account = Account(
                mailbox=MAILBOX, host="smtp.example.org", username="alice", password=password
            )
        token = self.vault.stage(MAILBOX, account, "a transaction" if end == "die" else "")
        self.vault.prepare([token], witnessed=end == "die")
        if end == "die":
            return
        if end == "discard":
            self.vault.discard([token])
            self._holds(passwords={MAILBOX: before})
            return
        after = frozenset((password,))
        # committed: what was before it may only be found by who is told of it
        self._holds(passwords={MAILBOX: before | after}, unreported={MAILBOX: after})
        self.vault.publish([token])
        self._holds(passwords={MAILBOX: after})

    def ask_about_accounts(self, verdict: Verdict, *passwords: str) -> None:
        """A witness decides; until that is on the disk it is asked again."""
        ((change, _),) = self.vault.doubts()
        after = frozenset(passwords[-1:])
        self._holds(passwords={MAILBOX: frozenset(passwords)}, unreported={MAILBOX: after})
        self.vault.resolve(change, verdict)

    def rekey(self) -> None:
        """Change the key of the vault; whatever happens, every account opens."""
        former = self._source.load()
        assert former is not None
        rekey(self.vault, self._source)
        self.truth = replace(
            self.truth, gone=frozenset(("box.key.former", f"box/accounts/register-{former.id}"))
        )
        self._recorder.mark(self.truth)

    def note(self, failures: int) -> None:
        """Note (0: no more) why a lane waits."""
        note = LaneNote("smtp.example.org", "relay", "no route", NOW, NOW, failures)
        self.spool.note_lane("0123456789abcdef", note if failures else None)


def observe(root: Path, truth: Truth) -> Observation:
    """Start on what was found; say what is there.  `truth`: what to look for."""
    found = Observation()
    try:
        presence = Presence(root / "box" / "presence")
        spool = Maildir(root / "box", presence, notify=False)
    except Exception as error:
        found.troubles.append(f"no start: {error!r}")
        return found
    vault = Vault(root / "box" / "accounts", KeySource(file=root / "box.key"), presence)
    here = (*root.glob("box.key*"), *root.glob("box/accounts/*"))
    found.paths = frozenset(str(path.relative_to(root)) for path in here)
    try:
        spool.sweep()
        found.reported = vault.sweep()
        in_doubt = {change.partition("-")[0] for change, _ in vault.doubts()}
        found.reported += tuple(m for m in truth.passwords if digest(m) in in_doubt)
        _observe_mails(spool, found)
        _observe_keys(spool, truth, found)
        _observe_accounts(vault, truth, found)
        spool.lane_notes()
        before = set(spool.scan())
        again = spool.sweep()
        if again.held or again.removed or set(spool.scan()) != before or spool.left_overs():
            found.troubles.append("a second sweep finds something")
    except Exception as error:
        found.troubles.append(f"recovery stops: {error!r}")
    finally:
        spool.close()
        presence.close()
    return found


def _observe_mails(spool: Maildir, found: Observation) -> None:
    for _ in range(3):
        followed = False
        for entry in spool.scan():
            lease = spool.claim(entry)
            if lease is None:  # held, or its name follows its side file
                followed = True
                continue
            lease.release()
        if not followed:
            break
    asked = {doubt.entry for doubt in spool.doubts()}
    for entry in spool.scan():
        lease = spool.claim(entry)
        if lease is None:
            found.troubles.append(f"{entry} cannot be claimed: {spool.load(entry).reason}")
            continue
        message_id = lease.envelope.message_id
        doubt = entry.state is State.HELD and spool.load(entry).reason in _DOUBTS
        fate = ASKED if entry in asked else DOUBT if doubt else str(entry.state)
        whole = lease.message == message(message_id)
        recipients = frozenset(Attempt(lease).recipients)
        if entry.state is State.REFUSED:  # tried by a person's wish only
            recipients -= lease.outcomes.keys()
        found.mails.setdefault(message_id, []).append((fate, recipients, whole))
        lease.release()


def _observe_keys(spool: Maildir, truth: Truth, found: Observation) -> None:
    for key in truth.holders:
        try:
            holder = spool.key_holder(key)
        except KeyTaken:  # a witness decides whether its mail stays
            note = spool._keys.holder(key)
            holder = note.message_id if note is not None else None
        found.holders[key] = holder
        if holder is not None:
            path = Path(spool.location, "keys", keys.digest_of(key))
            found.kept[key] = os.stat(path).st_mtime
        envelope = Envelope(
            sender=MAILBOX, recipients=(BOB,), route=ROUTE, message_id="new@x", key=key
        )
        entry = spool.stage(envelope, b"")
        try:
            spool.prepare([entry])
            taken = False
        except KeyTaken:
            taken = True
        spool.discard([entry])
        if taken is (holder is None):
            found.troubles.append(f"the key of {holder} is{'' if taken else ' not'} taken")


def _observe_accounts(vault: Vault, truth: Truth, found: Observation) -> None:
    for mailbox in truth.passwords:
        try:
            found.passwords[mailbox] = vault.get(mailbox).secret.reveal()  # type: ignore[union-attr]
        except NoSuchAccount:
            found.passwords[mailbox] = None


def judge(truth: Truth, found: Observation) -> Iterator[str]:
    """Yield what is wrong."""
    yield from found.troubles
    for message_id in found.mails.keys() - truth.mails.keys():
        yield f"{message_id}: is there and was never sent"
    for message_id, expected in truth.mails.items():
        seen = found.mails.get(message_id, [])
        if len(seen) > 1:
            yield f"{message_id}: is there {len(seen)} times"
        if not seen and ABSENT not in expected.fates:
            yield f"{message_id}: lost; {_fates(expected)}"
        for fate, recipients, whole in seen:
            if fate not in expected.fates:
                yield f"{message_id}: is {fate}; {_fates(expected)}"
            if not whole:
                yield f"{message_id}: is not whole"
            if again := recipients & expected.never:
                yield f"{message_id}: would be sent to {sorted(again)} again"
            if missing := expected.must - recipients:
                yield f"{message_id}: would not be sent to {sorted(missing)}"
    for key, holders in truth.holders.items():
        if key in found.holders and found.holders[key] not in holders:
            yield f"the key {key} is held by {found.holders[key]}, not by one of {list(holders)}"
        message_id, absent_free, there_held = truth.pairs.get(key, ("", False, False))
        if absent_free and found.holders.get(key) and message_id not in found.mails:
            yield f"the key {key} is held by {message_id}, which is not there"
        if there_held and message_id in found.mails and not found.holders.get(key):
            yield f"the key {key} is free, and {message_id} is there"
        if found.kept.get(key, truth.kept.get(key, 0)) < truth.kept.get(key, 0):
            yield f"the key {key} is forgotten too early"
    for path in truth.gone & found.paths:
        yield f"{path}: has come back"
    for mailbox, passwords in truth.passwords.items():
        if mailbox not in found.passwords:
            continue
        if found.passwords[mailbox] not in passwords:
            yield f"{mailbox}: has another password than {list(passwords)}"
        allowed = truth.unreported.get(mailbox, passwords)
        if found.passwords[mailbox] not in allowed and mailbox not in found.reported:
            yield f"{mailbox}: a committed change is lost, and nobody is told"


def _fates(expected: Expected) -> str:
    return f"may be {' or '.join(sorted(expected.fates))}"
