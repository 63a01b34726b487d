"""The witness of a ZODB: its transaction records hold the token of the transaction.

::

    first send   mark     the last transaction so far: ours gets a higher id, whatever clocks say
    commit       expects  did a connection write?  (a transaction that changed no object leaves
                          no record, so the missing record would say nothing)
    after death  ask      wait until the dead client's commit has ended; then look through the
                          records from the mark on

A missing record means "aborted" only where records are kept: not in a storage without
history, and not when a pack has been there, which removes records whose objects have changed
since.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any, Final

from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IMVCCStorage
from ZODB.POSException import ReadOnlyError
from zope.component import getGlobalSiteManager
from zope.interface import implementer

from ..datamanager import TOKEN_NAME
from ..interfaces import ITransactionWitness, Verdict

_LENGTH: Final = 8  # bytes of a transaction id
_PACKED: Final = "p"
_MARKED: Final = 10.0  # seconds for which a mark is good: an older one costs a longer look


@implementer(ITransactionWitness)
class ZODBWitness:
    """See `ITransactionWitness`.  `db`: a `ZODB.DB` whose storage can be iterated.

    FileStorage, ZEO's ClientStorage (of a server that runs one), RelStorage.  One without
    history never tells more than that it does not know.
    """

    def __init__(self, db: Any) -> None:
        self._db = db
        self._marked = (-math.inf, "")  # when, by the monotonic clock; and the mark

    def __repr__(self) -> str:
        return f"<ZODBWitness {self._db.storage.getName()}>"

    def mark(self, transaction: Any) -> str:
        """See `ITransactionWitness`."""
        now = time.monotonic()
        at, mark = self._marked  # of several threads that set it, each is right
        if now - at > _MARKED:
            with self._storage() as storage:
                mark = storage.lastTransaction().hex()
            self._marked = (now, mark)
        transaction.set_data(self, mark)
        return mark

    def expects(self, transaction: Any) -> bool:
        """See `ITransactionWitness`."""
        try:
            transaction.data(self)
        except KeyError:
            return False  # the mark in the token is another database's
        # There is no public way to ask a connection what it has written.  Where these names
        # are gone, nothing is expected, and what is in doubt is held.
        return any(
            getattr(each, "_modified", None) or getattr(each, "_creating", None)
            for each in getattr(transaction, "_resources", ())
            if hasattr(each, "db") and each.db() is self._db
        )

    def ask(self, tokens: Sequence[str]) -> Mapping[str, Verdict]:
        """See `ITransactionWitness`."""
        marks = {token: _mark_of(token) for token in tokens}
        known = {token: mark for token, mark in marks.items() if mark is not None}
        if not known:
            return {}
        with self._storage() as storage:
            # Not before the dead have ended: a server may still have their last words to read.
            settled = _wait_for_others(storage) and _keeps_history(storage)
            found, packed, last = _look(storage, min(known.values()), set(known))
        verdicts = dict.fromkeys(found, Verdict.COMMITTED)
        for token, mark in known.items():
            # A database that ends before the mark is another one, or an old copy.
            if token not in found and settled and mark <= last and mark >= packed:
                verdicts[token] = Verdict.ABORTED
        return verdicts

    @contextmanager
    def _storage(self) -> Iterator[Any]:
        """One that no other thread uses, where the storage is made of connections (RelStorage)."""
        storage = self._db.storage
        if not IMVCCStorage.providedBy(storage):
            yield storage
            return
        storage = storage.new_instance()
        try:
            yield storage
        finally:
            storage.release()


def _mark_of(token: str) -> bytes | None:
    try:
        mark = bytes.fromhex(token.partition(".")[2])
    except ValueError:
        return None
    return mark if len(mark) == _LENGTH else None


def _look(storage: Any, start: bytes, wanted: set[str]) -> tuple[set[str], bytes, bytes]:
    """Return those tokens that have a record, the last id that a pack has touched, and the last."""
    found: set[str] = set()
    packed, last = bytes(_LENGTH), storage.lastTransaction()
    records = storage.iterator(start)
    with closing(records) if hasattr(records, "close") else nullcontext():
        for record in records:
            last = max(last, record.tid)
            if record.status == _PACKED:
                packed = record.tid
            token = record.extension.get(TOKEN_NAME)
            if token in wanted:
                found.add(token)
                if found == wanted:
                    break
    return found, packed, last


def _wait_for_others(storage: Any) -> bool:
    """Return when no commit that began before is under way; False: one may be.

    An empty transaction takes its turn, and writes nothing.
    """
    meta = TransactionMetaData()
    try:
        storage.tpc_begin(meta)
    except ReadOnlyError:
        return False
    try:
        storage.tpc_vote(meta)
    finally:
        storage.tpc_abort(meta)
    return True


def _keeps_history(storage: Any) -> bool:
    supports_undo = getattr(storage, "supportsUndo", None)
    return supports_undo is not None and bool(supports_undo())


def register(event: Any) -> None:
    """Handle `zope.processlifetime.IDatabaseOpenedWithRoot`: the database is the witness."""
    witness = ZODBWitness(event.database)
    getGlobalSiteManager().registerUtility(witness, ITransactionWitness)
