"""What a crash left in doubt: held, until a witness or a person decides.

::

    tmp/ (prepared, its process is dead) --hold--> cur/ held --resolve--> committed: queued
                                                     |                    aborted:   removed
                                                     |                    unknown:   held for good
                                                     `-- a person: released, held, cancelled

Which of the held ones a witness can tell of says the reason in their side file: whoever
decides replaces it.
"""

from __future__ import annotations

import logging
from typing import Final

from ..envelope import Envelope
from ..errors import InvalidEnvelope, NoSuchEntry, SpoolError
from ..interfaces import Entry, Record, State, Verdict
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

    def all(self) -> list[tuple[Entry, str]]:
        """See `ISpool.doubts`."""
        found = []
        for name in sorted(self._layout.listing("cur")):
            entry = names.parse(name, "cur") if f":1,{State.HELD}," in name else None
            if entry is None or not self._is_asked(entry):
                continue
            try:
                record = self._mails.read(entry)[0]
            except (FileNotFoundError, InvalidEnvelope):
                continue  # decided meanwhile; or no token to ask with
            found.append((entry, record.envelope.token))
        return found

    def resolve(self, entry: Entry, verdict: Verdict) -> tuple[Record, Entry | None] | None:
        """Decide; return what the mail was, and is.  None: somebody else has decided already."""
        locked = self._mails.lock(entry)
        if locked is None:
            return None
        try:
            if not self._is_asked(entry):
                return None
            record = self._mails.read(entry)[0]
            after = self._decide(entry, record.envelope, verdict)
        except (FileNotFoundError, InvalidEnvelope, NoSuchEntry):
            return None
        finally:
            unlock(locked[0])
        if after is None:
            self._mails.sync()
        return record, after

    def _decide(self, entry: Entry, envelope: Envelope, verdict: Verdict) -> Entry | None:
        if verdict is Verdict.COMMITTED:
            after = names.first_entry(entry.id, envelope)  # due when its sender wants it
            self._mails.rename(entry, after)
            return after
        if verdict is Verdict.ABORTED:
            self._mails.remove(entry, has_side=True)
            self._mails.free_key(entry, envelope)
            return None
        return self._mails.hold(entry, IN_DOUBT, sync=True)

    def _is_asked(self, entry: Entry) -> bool:
        try:
            side = self._sides.read(entry.id)
        except SpoolError as error:
            log.error("%s: stays held: %s", entry.id, error)
            return False
        return side is not None and side.reason == ASKED
