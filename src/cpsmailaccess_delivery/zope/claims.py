"""Which user has taken which mailbox for himself, and since when: kept in the ZODB.

An account knows its owner.  This adds what happens over time: two users who want the same mailbox
at the same moment conflict, and one of them begins again; a mailbox that was one user's is
another's only when the administrator gives it to him; and who takes one sees no mails from before.
"""

from __future__ import annotations

from BTrees.OOBTree import OOBTree
from persistent import Persistent

from ..errors import InvalidAccount


class Claims(Persistent):
    """By mailbox, as `Account.mailbox` writes it; owners as `Account.owner` does."""

    def __init__(self) -> None:
        self._taken: OOBTree = OOBTree()

    def check(self, mailbox: str, owner: str) -> None:
        """Raise `InvalidAccount` when the mailbox was another's."""
        if self._taken.get(mailbox, (owner,))[0] != owner:
            raise InvalidAccount(
                f"mailbox {mailbox}: belongs, or belonged, to somebody else: ask the administrator"
            )

    def take(self, mailbox: str, owner: str, now: float) -> None:
        """Note that a user has it from now on (seconds since the epoch)."""
        self._taken[mailbox] = (owner, now)

    def since(self, mailbox: str, owner: str) -> float:
        """Return since when he has it; 0: the administrator gave it to him."""
        holder, since = self._taken.get(mailbox, ("", 0.0))
        return since if holder == owner else 0.0
