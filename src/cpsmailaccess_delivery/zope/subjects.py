"""The subjects of mails that users have written here, so that they know what has left again.

The spool has the subject of a mail as long as it has the mail.  The journal has none: it is for
operators, and has nothing of what a mail says.  These are kept in the root of the ZODB, by the
transaction that sends the mail, for who wrote it alone, and as long as the journal goes back.
"""

from __future__ import annotations

from typing import Any, Final

from BTrees.IOBTree import IOBTree
from BTrees.OOBTree import OOBTree

_KEY: Final = "cpsmailaccess_delivery.subjects"
_DAY: Final = 86_400.0  # seconds
_KEPT: Final = 31  # days: those of the journal, and the one that has begun


class Subjects:
    """By day, owner as `Account.owner` says it, and Message-Id.

    `place`: any object in the tree of the site.
    """

    def __init__(self, place: Any) -> None:
        self._root = place.getPhysicalRoot()._p_jar.root()

    def note(self, owner: str, message_id: str, subject: str, now: float) -> None:
        """Keep the subject of a mail that is sent now; one that is known stays as it is."""
        if not subject:
            return
        if _KEY not in self._root:
            self._root[_KEY] = IOBTree()
        days, today = self._root[_KEY], int(now // _DAY)
        for old in list(days.keys(max=today - _KEPT)):
            del days[old]
        if today not in days:
            days[today] = OOBTree()
        days[today].setdefault((owner, message_id), subject)

    def of(self, owner: str, message_id: str, queued_at: float) -> str:
        """Return the subject of a mail that was queued then; "": it is not known."""
        days, day = self._root.get(_KEY, {}), int(queued_at // _DAY)
        for each in (day, day - 1):  # queued after midnight, but noted before
            subject: str = days.get(each, {}).get((owner, message_id), "")
            if subject:
                return subject
        return ""
