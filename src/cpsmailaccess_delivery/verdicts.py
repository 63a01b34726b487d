"""What dead processes have left in doubt: the witness is asked, and its verdicts carried out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from .errors import OutboxError
from .interfaces import Doubt, Record, State, Verdict
from .queue import events_for, events_of
from .wording import counted

log = logging.getLogger(__name__)

#: What the witness says of a mail in doubt, as it stands in the journal, of each recipient.
DECIDED: Final = {
    Verdict.COMMITTED: "committed",
    Verdict.ABORTED: "aborted",
    Verdict.UNKNOWN: "doubtful",
}


def resolve(
    spool: Any,
    accounts: Any,
    journal: Any,
    witness: Any,
    clock: Callable[[], float],
    held: Sequence[str],
) -> bool:
    """Ask about what is in doubt, and log what became of it; return whether any was decided.

    Never raises.

    Also about what earlier sweeps, or processors without a witness, have held.  `witness`: an
    `ITransactionWitness`, or None.  `held`: ids of the mails that a sweep has just held.
    """
    try:
        mails, changes = spool.doubts(), accounts.doubts()
        for entry_id in set(held).difference(doubt.entry.id for doubt in mails):
            record = spool.load(spool.look_up(entry_id))
            _tell(journal, record, Verdict.UNKNOWN, clock())
    except (OutboxError, OSError) as error:
        log.error("cannot look at what is in doubt in %s: %s", spool.location, error)
        return False
    if not mails and not changes:
        return False
    if witness is None:
        log.warning(
            "in doubt: %s; they wait for a processor that has the witness (the database) to ask",
            mails_and_changes(len(mails), len(changes)),
        )
        return False
    try:
        tokens = {doubt.token for doubt in mails}.union(token for _, token in changes)
        verdicts = witness.ask(sorted(tokens))
    except Exception as error:
        log.error(
            "still in doubt: %s: the witness cannot be asked now: %s: %s",
            *(mails_and_changes(len(mails), len(changes)), type(error).__name__, error),
        )
        return False
    try:
        _resolve_changes(accounts, changes, verdicts)  # first: the mails may need them
        _resolve_mails(spool, mails, verdicts, journal, clock())
    except (OutboxError, OSError) as error:
        log.error("what is in doubt in %s stays so, until later: %s", spool.location, error)
    return True


def mails_and_changes(mails: int, changes: int) -> str:
    """Return so many mails and changes of accounts in words."""
    accounts = counted(changes, "change of an account", "changes of accounts")
    return f"{counted(mails, 'mail', 'mails')} and {accounts}"


def _resolve_mails(
    spool: Any, mails: Sequence[Doubt], verdicts: Mapping[str, Verdict], journal: Any, now: float
) -> None:
    sends: Counter[Verdict] = Counter()
    cancels: Counter[Verdict] = Counter()
    for doubt in mails:
        verdict = verdicts.get(doubt.token, Verdict.UNKNOWN)
        record = spool.resolve(doubt, verdict)
        if record is None:
            continue
        (cancels if doubt.cancels else sends)[verdict] += 1
        _tell(journal, record, verdict, now)
        if doubt.cancels and verdict is Verdict.COMMITTED:
            entry, envelope, outcomes = record.entry, record.envelope, record.outcomes
            for event in events_of(entry, envelope, outcomes, State.CANCELLED, now):
                journal.record(event)
    if sends:
        log.warning(
            "mails in doubt after a crash: %d were committed and are delivered, %d were not and"
            " are removed, %d are held, because the witness does not know",
            *(sends[verdict] for verdict in Verdict),
        )
    if cancels:
        log.warning(
            "mails whose cancel was in doubt after a crash: %d are cancelled, %d are what they"
            " were before, %d are held, because the witness does not know",
            *(cancels[verdict] for verdict in Verdict),
        )


def _resolve_changes(accounts: Any, changes: Any, verdicts: Mapping[str, Verdict]) -> None:
    for change, token in changes:
        verdict = verdicts.get(token, Verdict.UNKNOWN)
        mailbox = accounts.resolve(change, verdict)
        if mailbox and verdict is Verdict.COMMITTED:
            log.warning("account %s: a crash left its change in doubt; it was committed", mailbox)
        elif mailbox:
            log.warning("account %s: its change was not committed: put it again", mailbox)


def _tell(journal: Any, record: Record, verdict: Verdict, now: float) -> None:
    entry, envelope, kind = record.entry, record.envelope, DECIDED[verdict]
    for event in events_for(envelope.recipients, entry, envelope, kind, now, record.reason):
        journal.record(event)
