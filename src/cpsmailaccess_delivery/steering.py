"""Decide on many mails at once: what was done, and what could not be done and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

from .errors import EntryBusy, InvalidEnvelope, NoSuchEntry, NotHeld, NotUnclear, OutboxError
from .interfaces import Entry, Record, State
from .queue import Queue

Act = Callable[[str | Entry], list[Record]]

#: What concerns one mail: the next one is tried all the same.
_OF_ONE_MAIL: Final = (NoSuchEntry, EntryBusy, InvalidEnvelope, NotHeld, NotUnclear)

#: What `release` lets go; `Queue.retry` is for the others, but takes these too.
_RELEASABLE: Final = (State.HELD, State.UNCLEAR, State.REFUSED)


@dataclass(slots=True)
class Steered:
    """``records``: the mails as they were.  ``failures``: their names, and why not."""

    records: list[Record] = field(default_factory=list)
    failures: list[tuple[str, OutboxError]] = field(default_factory=list)


def steer(mails: Iterable[str | Entry], act: Act, *, gone_is_fine: bool = False) -> Steered:
    """Do the same to many mails, one after another.

    `gone_is_fine`: a mail that has left meanwhile is no failure.  A failure that is not about
    one mail, a full disk, ends it: it is the last of the failures.
    """
    steered = Steered()
    for mail in mails:
        name = mail.id if isinstance(mail, Entry) else mail
        try:
            steered.records += act(mail)
        except OutboxError as error:
            if isinstance(error, NoSuchEntry) and gone_is_fine:
                continue
            steered.failures.append((name, error))
            if not isinstance(error, _OF_ONE_MAIL):
                break
    return steered


def release(queue: Queue, mail: str | Entry) -> list[Record]:
    """Release a mail as `Queue.release` does, but only what was set aside.

    Raises `NotHeld`, `NoSuchEntry`, `EntryBusy`.
    """
    for record in queue.find(mail):
        if record.entry.state not in _RELEASABLE and not is_unclear(record):
            raise NotHeld(f"{record.entry.id} is {record.entry.state}, not held: see retry")
    return queue.release(mail)


def is_unclear(record: Record) -> bool:
    """Tell whether of any recipient nobody knows whether he has got the mail."""
    return any(outcome.state is State.UNCLEAR for outcome in record.outcomes.values())


def entries_of(queue: Queue, ids: Collection[str]) -> list[str | Entry]:
    """Return the entries of many ids with one look at the spool.

    An id that is not there stays as it is: whoever looks for it says so.
    """
    wanted = dict.fromkeys(ids)
    found = {entry.id: entry for entry in queue.entries() if entry.id in wanted}
    return [found.get(each, each) for each in wanted]
