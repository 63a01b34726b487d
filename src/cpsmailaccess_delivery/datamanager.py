"""How a change of the outbox takes part in a transaction: one data manager per change.

::

    send/put      commit            vote     finish            what a crash leaves
    --------      ------            ----     ------            -------------------
    store.stage   store.prepare     check    store.publish
    |<-- gone: cannot be committed --><-- in doubt ---->|<-- there for ever -->

One data manager per change makes savepoints right by construction: the transaction
package aborts and unjoins what joined after the savepoint.  All changes of one transaction
to one store share a `Batch`, so that their fsyncs happen together, in the `commit`
of the last of them: before any participant votes.

What a crash leaves in doubt is decided by a *witness* (`ITransactionWitness`): it gives the token
a mark, says at the end of the first phase whether it will know, and is asked by the next sweep.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from transaction.interfaces import IDataManagerSavepoint, ISavepointDataManager
from zope.interface import implementer

log = logging.getLogger(__name__)

#: Under this name the token stands in the transaction's extended info, for a witness.
TOKEN_NAME = "cpsmailaccess_delivery"  # noqa: S105 (a name, no password)

_sequence = itertools.count()

_T = TypeVar("_T")


class TwoPhaseStore(Protocol):
    """What spool and account store have in common."""

    def prepare(self, items: Sequence[Any], /, *, witnessed: bool) -> None: ...
    def publish(self, items: Sequence[Any], /) -> None: ...
    def discard(self, items: Sequence[Any], /) -> None: ...


class Batch:
    """What one transaction changes in one store.  Items are hashable."""

    def __init__(self, store: TwoPhaseStore, witness: Any = None) -> None:
        self._store = store
        self._witness = witness
        self._begun = 0
        self._ready: dict[Any, None] = {}  # what `prepare` got, or gets, in this order
        self.prepared = False
        self.published = False
        self._discarded = False

    def begin(self) -> None:
        self._begun += 1

    def commit(self, item: Any, transaction: Any) -> None:
        """Prepare everything when the last change has come: one batch of fsyncs."""
        self._ready[item] = None
        if len(self._ready) == self._begun:
            witnessed = self._witness is not None and self._is_expected(transaction)
            self._store.prepare(list(self._ready), witnessed=witnessed)
            self.prepared = True

    def _is_expected(self, transaction: Any) -> bool:
        try:
            return bool(self._witness.expects(transaction))
        except Exception:
            log.exception("the witness fails: a crash of this transaction would leave it in doubt")
            return False

    def finish(self) -> None:
        """Publish everything with the first change that finishes."""
        if not self.published:
            self.published = True
            self._store.publish(list(self._ready))

    def discard(self, item: Any) -> None:
        """Discard what joined after a savepoint; once all are ready, all: one fsync."""
        if self.published:
            return
        if item not in self._ready:
            self._store.discard([item])
        elif not self._discarded:
            self._discarded = True
            self._store.discard(list(self._ready))


@implementer(IDataManagerSavepoint)
class _Savepoint:
    """A change that joined before the savepoint stays when it is rolled back."""

    def rollback(self) -> None:
        pass


@implementer(ISavepointDataManager)
class Change:
    """The data manager of one staged change.  See `ISavepointDataManager`."""

    def __init__(
        self, manager: Any, batch: Batch, item: Any, rank: int, on_abort: Callable[[], None]
    ) -> None:
        self.transaction_manager = manager
        self._batch = batch
        self._item = item
        self._on_abort = on_abort
        # After ZODB, and after zope.sqlalchemy with its "~sqlalchemy": what the others may
        # refuse is decided when our turn comes, and the window of doubt is one rename.
        self._sort_key = f"~~~cpsmailaccess_delivery:{rank}:{next(_sequence):020d}"

    def sortKey(self) -> str:
        return self._sort_key

    def savepoint(self) -> _Savepoint:
        return _Savepoint()

    def tpc_begin(self, transaction: Any) -> None:
        self._batch.begin()

    def commit(self, transaction: Any) -> None:
        self._batch.commit(self._item, transaction)

    def tpc_vote(self, transaction: Any) -> None:
        if not self._batch.prepared:
            raise RuntimeError("tpc_vote without commit: the transaction manager is broken")

    def tpc_finish(self, transaction: Any) -> None:
        """Publish.  This must never fail: other participants have committed already."""
        try:
            self._batch.finish()
        except Exception:
            log.critical(
                "cannot publish %r; the next start finds it in doubt", self._item, exc_info=True
            )

    def abort(self, transaction: Any) -> None:
        # Also called after a successful commit, when after-commit hooks ran.
        self._on_abort()
        self._batch.discard(self._item)

    tpc_abort = abort


def join(
    manager: Any,
    store: TwoPhaseStore,
    stage: Callable[[str], Any],
    *,
    rank: int,
    on_abort: Callable[[], None] = lambda: None,
    witness: Any = None,
) -> Any:
    """Stage a change and let it follow the current transaction of a manager; return it.

    `stage`: called with the token of the transaction, returns the staged item.
    `rank`: lower ones are published first.  `witness`: ITransactionWitness.  Raises what
    `stage` raises, and `transaction.interfaces.NoTransaction` in explicit mode; nothing is left
    then.
    """
    transaction = manager.get()
    batch, token = _batch(transaction, store, witness)
    item = stage(token)
    try:
        transaction.setExtendedInfo(TOKEN_NAME, token)
        transaction.join(Change(manager, batch, item, rank, on_abort))
    except BaseException:
        store.discard([item])
        raise
    return item


def kept_for(transaction: Any, owner: object, make: Callable[[], _T]) -> _T:
    """Return what a transaction keeps for an object, made at the first time.

    The object lives as long, too: the transaction knows it by its `id`, which is another one's as
    soon as it is gone.
    """
    try:
        kept: _T = transaction.data(owner)[1]
    except KeyError:
        kept = make()
        transaction.set_data(owner, (owner, kept))
    return kept


def _batch(transaction: Any, store: TwoPhaseStore, witness: Any) -> tuple[Batch, str]:
    token: str = transaction.extension.get(TOKEN_NAME) or _new_token(transaction, witness)
    return kept_for(transaction, store, lambda: Batch(store, witness)), token


def _new_token(transaction: Any, witness: Any) -> str:
    token = secrets.token_hex(16)
    try:
        mark = witness.mark(transaction) if witness is not None else ""
    except Exception:
        log.exception("the witness fails: a crash of this transaction would leave it in doubt")
        mark = ""
    return f"{token}.{mark}" if mark else token
