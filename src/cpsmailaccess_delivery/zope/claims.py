"""Which user has taken which mailbox for himself, and since when: kept in the ZODB.

An account knows its owner.  This adds what happens over time: two users who want the same mailbox
at the same moment conflict, and one of them begins again; a mailbox that was one user's is
another's only when the administrator gives it to him; and who takes one sees no mails from before.
"""

from __future__ import annotations

from typing import Any, Final

from Acquisition import aq_base
from BTrees.OOBTree import OOBTree
from persistent import Persistent

from ..errors import InvalidAccount

#: The attribute of the root that has them, by the name of the delivery utility: all objects that
#: show an outbox have the same ones, and none takes them along when it is deleted.
_PLACE: Final = "_cpsmailaccess_delivery_claims"


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


def claims_of(root: Any, delivery_name: str) -> Claims:
    """Return the claims on mailboxes of an outbox, to look at."""
    kept = getattr(aq_base(root), _PLACE, {})
    found: Claims = kept.get(delivery_name) or Claims()
    return found


def claims_to_change(root: Any, delivery_name: str) -> Claims:
    """Return the same, to change: kept from now on."""
    if not hasattr(aq_base(root), _PLACE):
        setattr(root, _PLACE, OOBTree())
    kept = getattr(aq_base(root), _PLACE)
    if delivery_name not in kept:
        kept[delivery_name] = Claims()
    made: Claims = kept[delivery_name]
    return made
