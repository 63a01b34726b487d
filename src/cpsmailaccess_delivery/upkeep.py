"""What a processor does beside delivering: it tidies, and removes what nobody waits for.

A refused mail stays in the spool, for a person to look at and retry; but for as long as the
journal's events only, and not at all when it has no sender who could be told.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, Final

from .errors import OutboxError
from .interfaces import Entry, Outcome, Settlement, State
from .queue import REMOVED, events_of
from .verdicts import resolve
from .wording import counted

log = logging.getLogger(__name__)

#: Seconds that a refused mail is kept after its last attempt: as long as the journal's events.
KEPT: Final = 30 * 86400.0

#: Seconds between two looks for refused mails to remove, and how many at once.
_LOOK: Final = 3600.0
_STEP: Final = 1000


class Upkeep:
    """The upkeep of one outbox; not in the thread of the loop.

    `witness`: an `ITransactionWitness`, or None: see `verdicts`.
    `clock`: seconds since the epoch.
    """

    def __init__(
        self,
        spool: Any,
        accounts: Any,
        journal: Any,
        clock: Callable[[], float],
        witness: Any = None,
    ) -> None:
        self._spool = spool
        self._accounts = accounts
        self._journal = journal
        self._witness = witness
        self._clock = clock
        self._look_at = -math.inf  # by the monotonic clock

    def run(self) -> bool:
        """Do what is to be done now and then; see `sweep`.  Never raises."""
        decided = self.sweep()
        if time.monotonic() >= self._look_at:
            more = self.remove_refused()
            self._look_at = time.monotonic() + (0.0 if more else _LOOK)
        return decided

    def sweep(self) -> bool:
        """Tidy what dead processes left, and log what became of it.  Never raises.

        Return whether something was decided that was in doubt: such mails may go now.
        """
        recovered = self._journal.recover()
        if recovered:
            log.info("a process was killed here: its last %d events are in the journal", recovered)
        try:
            report = self._spool.sweep()
            changed = self._accounts.sweep()
        except (OutboxError, OSError) as error:
            log.error("cannot sweep %s: %s", self._spool.location, error)
            return False
        if report.removed or report.held:
            log.warning(
                "a process died here: %s removed, %d in doubt and held",
                counted(len(report.removed), "uncommitted mail", "uncommitted mails"),
                len(report.held),
            )
        for mailbox in changed:
            log.warning("account %s: its change was not committed: put it again", mailbox)
        return resolve(
            self._spool, self._accounts, self._journal, self._witness, self._clock, report.held
        )

    def remove_refused(self) -> bool:
        """Remove mails that were refused `KEPT` ago; return whether there are more.

        Never raises.
        """
        removed = 0
        entries: list[Entry] = []
        try:
            entries += islice(self._spool.refused_before(self._clock() - KEPT), _STEP)
            for entry in entries:
                lease = self._spool.claim(entry)
                if lease is not None:
                    lease.settle(self.leaving(lease, lease.outcomes, "refused 30 days ago"))
                    removed += 1
            if removed:
                log.info("%s refused 30 days ago: removed", counted(removed, "mail", "mails"))
                self._spool.sync()
        except (OutboxError, OSError):
            log.exception("cannot remove old refused mails of %s", self._spool.location)
            return False
        return len(entries) == _STEP

    def leaving(self, lease: Any, outcomes: Mapping[str, Outcome], why: str) -> Settlement:
        """Return how a refused mail leaves the spool; the journal says why."""
        now = self._clock()
        for event in events_of(lease.entry, lease.envelope, outcomes, REMOVED, now, why):
            self._journal.record(event)
        return Settlement(State.REFUSED, outcomes, keep=False)
