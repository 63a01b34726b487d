"""The claim of one processor on one mail: a token in its row, good until a time.

::

    claim --beat, beat--> settle | release          the token still stands: done
          \\-- no beat for a lease: another's claim  the token does not: nothing is changed

The time is the server's.  Whoever was stopped or cut off for longer than that may have sent a
mail that another one sends, too; but what he records afterwards changes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from typing import Final

from zope.interface import implementer

from ..envelope import Envelope
from ..errors import SpoolError
from ..interfaces import Entry, ILease, Outcome, Record, Settlement, State
from ..spool import forks
from ..spool.doubts import is_in_doubt
from ..spool.names import normal
from ..spool.outcomes import Side, load_side, side_aside
from .connections import Connections
from .engine import beat
from .mails import MAILS, Mails, Row

log = logging.getLogger("cpsmailaccess_delivery.spool")

_GONE: Final = (State.ACCEPTED, State.CANCELLED)
_SETTLED: Final = (State.DEFERRED, State.HELD, State.UNCLEAR, State.REFUSED)

#: Of the length of a lease: how often it is renewed.
_BEATS: Final = 3

#: Seconds for which many that are to be settled wait for those that are renewed.
_TURN: Final = 0.5

#: Seconds until leases are renewed that could not be: some have few left.
_AGAIN: Final = 1.0


@implementer(ILease)
class Lease:
    """See `ILease`."""

    __slots__ = (
        "__weakref__",
        "_before",
        "_generation",
        "_held",
        "_known",
        "_leases",
        "_message",
        "_side",
        "_tried",
        "entry",
        "envelope",
        "job",
        "outcomes",
        "taken_at",
        "token",
    )

    def __init__(
        self, leases: Leases, row: Row, token: uuid.UUID, envelope: Envelope, side: Side
    ) -> None:
        self._leases = leases
        self._generation = forks.generation()
        self._before: Entry | None = None  # the entry as it was before `set_aside`
        self._known = side
        self._side = row.side
        self._message = row.message
        self._held = True
        self._tried = False  # to settle it; the answer may have been lost
        self.job = row.job
        self.token = token
        self.taken_at = time.monotonic()  # or renewed
        self.entry = row.entry
        self.envelope = envelope
        self.outcomes: Mapping[str, Outcome] = side.outcomes

    def __repr__(self) -> str:
        return f"<Lease {self.entry.id}{'' if self._held else ' ended'}>"

    @property
    def message(self) -> bytes:
        """See `ILease`.  A large one is read now.  Raises `SpoolError`."""
        return self.read_message() if self._message is None else self._message

    def forget_message(self) -> None:
        """See `ILease`."""
        self._message = b""

    def read_message(self) -> bytes:
        """See `ILease`.  Raises `SpoolError`."""
        self._check()
        return self._message or self._leases.mails.message(self.entry.id)

    def record(self) -> Record | None:
        """Return what `ISpool.load` says of the mail; None: that is not known here."""
        if not self._message:  # large, or forgotten
            return None
        reason = "" if self.entry.state is State.QUEUED else load_side(self._side).reason
        return Record(self.entry, self.envelope, self.outcomes, len(self._message), reason)

    @property
    def is_sure(self) -> bool:
        """Whether nobody else can have it: it was renewed within its time, by our clock."""
        return self._held and time.monotonic() - self.taken_at < self._leases.seconds

    @property
    def is_ours(self) -> bool:
        """Whether it has not ended, and is not of the process that forked us."""
        return self._held and self._generation == forks.generation()

    def settle(self, settlement: Settlement) -> Entry | None:
        """See `ILease`."""
        try:
            return self._settle(settlement)
        except SpoolError:
            self.was_tried()
            raise

    def was_tried(self) -> None:
        """Know that it may have been settled: nobody has heard that it was not."""
        self._tried = True

    def _settle(self, settlement: Settlement) -> Entry | None:
        self._check()
        mails, state = self._leases.mails, settlement.state
        if state in _GONE or not settlement.keep:
            free_key = state is State.CANCELLED and not self.entry.attempts
            done = mails.remove(self.entry.id, self.token, free_key=free_key, again=self._tried)
            self.is_done(done)
            return None
        if state not in _SETTLED:
            raise SpoolError(f"{self.entry.id}: a mail is not settled as {state}")
        due, attempts = settlement.due, settlement.attempts
        after = normal(self.entry._replace(state=state, due=due, attempts=attempts))
        outcomes = {**self.outcomes, **settlement.outcomes}
        side = Side(after.state, after.due, after.attempts, settlement.reason, outcomes)
        done = mails.record(after, side, self.token, again=self._tried)
        return after if self.is_done(done) else None

    def set_aside(self, reason: str, token: str = "") -> None:
        """See `ILease`."""
        self._check()
        held = self.entry._replace(state=State.HELD, due=0.0)
        side = side_aside(self.entry, self._known, reason, token)
        if not self._leases.mails.set_aside(held, side, self.token):
            self.leave()
            raise SpoolError(f"{self.entry.id}: the lease was lost; another one has it")
        self._before, self.entry = self.entry, held

    def release(self) -> None:
        """See `ILease`."""
        if not self.is_ours:
            return
        mails = self._leases.mails
        try:
            if self._before is None:
                mails.release(self.entry, self._side, self.token)
            else:
                doubt = is_in_doubt(self._known)
                mails.put_back(self._before, self._side, self.token, doubt=doubt)
                self._before = None
        except SpoolError as error:  # as if we had died: it is free when its time is over
            log.error("%s: free in %.0f s: %s", self.entry.id, self._leases.seconds, error)
        self.leave()

    def leave(self) -> None:
        """See `ILease`.  What was set aside is nobody's at once."""
        if not self.is_ours:
            return
        self._held = False
        self._leases.forget(self)
        if self._before is not None:
            self._leases.expire(self)

    def _check(self) -> None:
        if not self.is_ours:
            raise SpoolError(f"{self.entry.id}: the lease has ended, or is another process's")

    def is_done(self, done: bool) -> bool:
        """Know that it was settled, or lost."""
        self._held = False
        self._leases.forget(self)
        if not done and self._tried:
            log.warning(
                "%s: recorded already, before a connection was lost; or its lease was lost since",
                self.entry.id,
            )
        elif not done:
            log.error(
                "%s: its lease was lost: this process, its host or the network stood still for"
                " more than %.0f s; another worker has the mail, which may be sent twice",
                self.entry.id,
                self._leases.seconds,
            )
        return done


class Leases:
    """The leases of this process: renewed by a thread, while there are any that last.

    `seconds`: how long a lease is good after its last renewal.
    """

    def __init__(self, connections: Connections, mails: Mails, seconds: float) -> None:
        self.mails = mails
        self.seconds = seconds
        self._connections = connections
        self._begin()

    def _begin(self) -> None:
        self._generation = forks.generation()
        self._held: dict[int, weakref.ref[Lease]] = {}  # by `id`; what nobody has any more ends
        self._lock = threading.Lock()
        self._jobs = threading.Lock()  # of many at once, in no order: else we wait for ourselves
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def add(self, lease: Lease) -> None:
        """Renew a lease from now on.  Raises RuntimeError: there is no room for a thread."""
        if self._generation != forks.generation():
            self._begin()  # the parent's are the parent's
        if self._thread is None:
            with self._lock:
                if self._thread is None and not self._closed.is_set():
                    thread = threading.Thread(target=self._run, name="cpsmail-leases", daemon=True)
                    thread.start()
                    self._thread = thread
        held, key = self._held, id(lease)
        held[key] = weakref.ref(lease, lambda ref: held.pop(key, None))

    def held(self) -> list[Lease]:
        """Return those that have not ended; from any thread."""
        return [lease for ref in list(self._held.values()) if (lease := ref()) is not None]

    def forget(self, lease: Lease) -> None:
        """Renew it no more."""
        self._held.pop(id(lease), None)

    def settle_accepted(self, leases: Sequence[Lease]) -> list[Lease]:
        """See `ISettlesTogether`."""
        ours = [lease for lease in leases if lease.is_ours]
        if not self._jobs.acquire(timeout=_TURN):
            return list(leases)
        try:
            removed = self.mails.remove_all([(lease.entry.id, lease.token) for lease in ours])
        except SpoolError:
            for lease in ours:
                lease.was_tried()
            raise
        finally:
            self._jobs.release()
        for lease in ours:
            if lease.entry.id in removed:
                lease.is_done(True)
        return [lease for lease in leases if lease.entry.id not in removed]

    def expire(self, lease: Lease) -> None:
        """End a lease without a change of its mail.  Never raises."""
        try:
            with self._connections.use(f"leave {lease.entry.id}") as connection:
                self.mails.free(connection, lease.entry.id, lease.token)
        except SpoolError as error:
            log.error("%s: free in %.0f s: %s", lease.entry.id, self.seconds, error)

    def close(self) -> None:
        """Renew nothing more.  Twice is fine."""
        self._closed.set()
        if self._thread is not None and self._generation == forks.generation():
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        pause = self.seconds / _BEATS
        while not self._closed.wait(pause):
            try:
                self.renew()
                pause = self.seconds / _BEATS
            except SpoolError as error:
                log.error("leases cannot be renewed: %s", error)
                pause = min(_AGAIN, self.seconds / _BEATS)

    def renew(self) -> None:
        """Renew those that were not claimed just now.  Raises `SpoolError`."""
        begun = time.monotonic()
        old = [lease for lease in self.held() if begun - lease.taken_at >= self.seconds / _BEATS]
        if not old:
            return
        query = (
            f"UPDATE {MAILS} SET leased_until = clock_timestamp() + make_interval(secs => %s)"  # noqa: S608
            f" WHERE id IN (SELECT mails.id FROM {MAILS}"
            " JOIN unnest(%s::text[], %s::uuid[]) each (id, lease) USING (id, lease)"
            " FOR UPDATE OF mails SKIP LOCKED) RETURNING lease, id"  # none waits for another's
        )
        ids, tokens = [lease.entry.id for lease in old], [lease.token for lease in old]
        with self._connections.use("renew leases") as connection:
            kept = set(connection.execute(query, [self.seconds, ids, tokens]))
            renewed = [lease for lease in old if (lease.token, lease.entry.id) in kept]
            with self._jobs:
                beat(connection, [lease.job for lease in renewed if lease.job is not None])
        for lease in renewed:
            lease.taken_at = begun
