"""What a crash left in doubt: held, until a witness or a person decides.

::

    tmp/ (prepared, its process is dead) --hold--> cur/ held --resolve--> committed: queued
                                                     |                    aborted:   removed
                                                     |                    unknown:   held for good
                                                     `-- a person: released, held, cancelled

    set aside by who cancels it, and is dead:  cur/ held --resolve--> committed: removed
                                                     |                aborted:   what it was
                                                     |                unknown:   held for good
                                                     `-- a person: the same

Which of the held ones a witness can tell of says their side file, by the reason or by what it
has of the cancel: whoever decides replaces it.
"""

from __future__ import annotations

import logging
from typing import Final

from ..errors import InvalidEnvelope, KeyTaken, NoSuchEntry, SpoolError
from ..interfaces import Doubt, Entry, Record, State, Verdict
from . import names
from .layout import Layout
from .lease import unlock
from .mails import Mails
from .outcomes import NOTHING, DamagedSide, Side, SideFiles

log = logging.getLogger("cpsmailaccess_delivery.spool")

IN_DOUBT: Final = (
    "in doubt: a process died between the vote and the end of its transaction, and nobody can"
    " tell whether that committed; release it if it did, cancel it if not"
)
ASKED: Final = (
    "in doubt: a process died between the vote and the end of its transaction; whether that"
    " committed, the next processor that has the witness (the database) asks"
)
CANCEL_IN_DOUBT: Final = (
    "in doubt: a process died between the vote and the end of a transaction that cancels it, and"
    " nobody can tell whether that committed; cancel it if it did, release it if not"
)
CANCEL_ASKED: Final = (
    "in doubt: a process died between the vote and the end of a transaction that cancels it;"
    " whether that committed, the next processor that has the witness (the database) asks"
)


def is_in_doubt(side: Side) -> bool:
    """Tell whether nobody has seen the end of the transaction that sends or cancels the mail."""
    return side.cancel is not None or side.reason in (ASKED, IN_DOUBT)


def doubt_of(entry: Entry, side: Side, token: str) -> Doubt | None:
    """Return the doubt about a mail that is held, or None: a witness cannot tell.

    `token`: of the transaction that sends it.
    """
    if side.cancel is not None:
        return Doubt(entry, side.cancel.token, cancels=True)
    return Doubt(entry, token) if side.reason == ASKED else None


def is_asked_about(side: Side) -> bool:
    """Tell whether a witness says what becomes of the mail, as long as it is held for that."""
    return side.cancel is not None or side.reason == ASKED


def key_in_doubt(key: str) -> KeyTaken:
    """Return what is raised while a witness has still to tell whether the mail with a key stays.

    Who relied on that mail would have committed without one.
    """
    return KeyTaken(
        f"idempotency_key={key!r}: the mail that has it is in doubt, and the witness (the database)"
        " is asked: begin again later"
    )


class Doubts:
    """The mails in doubt of a spool."""

    def __init__(self, layout: Layout, mails: Mails, sides: SideFiles) -> None:
        self._layout = layout
        self._mails = mails
        self._sides = sides

    def hold(self, name: str, entry: Entry, witnessed: bool) -> bool:
        """Move a file of tmp/ to the held mails; return whether this call did."""
        after = names.held(entry)
        reason = ASKED if witnessed else IN_DOUBT
        try:
            # It may have been published, and tried: then its old name came back.
            outcomes = (self._sides.read(entry.id) or NOTHING).outcomes
            side = Side(after.state, reason=reason, outcomes=outcomes)
            self._sides.write(entry.id, side, sync=True)
        except DamagedSide as error:
            log.error("%s: %s", entry.id, error)  # left as it is: evidence
        except SpoolError as error:
            log.error("%s: stays in tmp/, in doubt: %s", entry.id, error)
            return False
        try:
            self._layout.move("tmp", name, "cur", names.file_name(after))
        except FileNotFoundError:
            return False  # another sweep was faster
        except OSError as error:
            log.error("%s: stays in tmp/, in doubt: %s", entry.id, error)
            return False
        return True

    def has(self, entry_id: str) -> bool:
        """Tell whether a mail is one of `all`; it may be gone."""
        try:
            side = self._sides.read(entry_id) or NOTHING
        except DamagedSide:
            return False
        # What a side file says of a mail that is held no more is not looked for often.
        return is_asked_about(side) and any(doubt.entry.id == entry_id for doubt in self.all())

    def all(self) -> list[Doubt]:
        """See `ISpool.doubts`."""
        found = []
        for name in sorted(self._layout.listing("cur")):
            entry = names.parse(name, "cur") if f":1,{State.HELD}," in name else None
            doubt = self._look(entry) if entry is not None else None
            # Leased: who cancels it lives, and its transaction has not ended.
            if doubt is not None and not self._mails.leased(doubt.entry):
                found.append(doubt)
        return found

    def resolve(self, doubt: Doubt, verdict: Verdict) -> tuple[Record, Entry | None] | None:
        """Decide; return what the mail was, and is.  None: somebody else has decided already."""
        locked = self._mails.lock(doubt.entry)
        if locked is None:
            return None
        try:
            if self._look(doubt.entry) != doubt:
                return None
            record = self._mails.read(doubt.entry)[0]
            after = self._decide(doubt, record, verdict)
        except (FileNotFoundError, InvalidEnvelope, NoSuchEntry):
            return None
        finally:
            unlock(locked[0])
        if after is None:
            self._mails.sync()
        return record, after

    def _decide(self, doubt: Doubt, record: Record, verdict: Verdict) -> Entry | None:
        entry = doubt.entry
        if verdict is Verdict.UNKNOWN:
            reason = CANCEL_IN_DOUBT if doubt.cancels else IN_DOUBT
            return self._mails.hold(entry, reason, sync=True)
        if (verdict is Verdict.COMMITTED) is doubt.cancels:
            self._mails.cancel(entry, record.envelope, has_side=True)
            return None
        if doubt.cancels:
            side = (self._sides.read(entry.id) or NOTHING).restored()
            after = names.normal(entry._replace(state=side.state, due=side.due))
            trivial = side == Side(side.state, side.due)
            self._mails.put_back(entry, after, None if trivial else side)
            return after
        after = names.first_entry(entry.id, record.envelope)  # due when its sender wants it
        self._mails.rename(entry, after)
        return after

    def _look(self, entry: Entry) -> Doubt | None:
        try:
            side = self._sides.read(entry.id) or NOTHING
            if not is_in_doubt(side):
                return None
            return doubt_of(entry, side, self._mails.read(entry)[0].envelope.token)
        except (FileNotFoundError, InvalidEnvelope):
            return None  # decided meanwhile; or no token to ask with
        except SpoolError as error:
            log.error("%s: stays held: %s", entry.id, error)
            return None
