"""Who may send as which mailbox, in Zope: see `ISendingPolicy`.

::

    account of a user     its owner, and whoever manages the accounts
    account of the site   whoever has the permission "Send as the site": everybody by default
    no account            the same: a relay without login is the site's

Permissions are those of the nearest *Mail accounts* object, from where the published code is,
that shows the outbox; without one, those of the root.  Proxy roles and owners of code count as
everywhere in Zope.  Code that runs for nobody (a script, a thread of its own: neither a request
nor a user) is the site's own and may send as any.
"""

from __future__ import annotations

from AccessControl import getSecurityManager
from Acquisition import aq_chain, aq_inner
from zExceptions import Unauthorized
from zope.globalrequest import getRequest
from zope.interface import implementer

from ..account import Account
from ..interfaces import ISendingPolicy
from .outboxes import shown_near
from .security import MANAGE_ACCOUNTS, SEND_AS_SITE, owner_of


@implementer(ISendingPolicy)
class SendingPolicy:
    """See the module."""

    def check(self, account: Account | None, queue_path: str) -> None:
        """See `ISendingPolicy`.  Raises `Unauthorized`."""
        if not may_send_as(account, queue_path):
            mailbox = "a relay without login" if account is None else f"mailbox {account.mailbox}"
            raise Unauthorized(f"{mailbox}: you may not send as this one; nothing was queued")


def may_send_as(account: Account | None, queue_path: str) -> bool:
    """Tell whether the code that runs now may send as this account; arguments as in `check`."""
    manager = getSecurityManager()
    user, request = manager.getUser(), getRequest()
    if request is None and not user.getId():
        return True
    owner = account.owner if account is not None else ""
    if owner and owner == owner_of(user):
        return True
    places = list((request or {}).get("PARENTS") or aq_chain(aq_inner(user)))
    place = shown_near(places, queue_path)
    if place is None:
        place = places[-1]
    if manager.checkPermission(MANAGE_ACCOUNTS, place):
        return True
    return not owner and bool(manager.checkPermission(SEND_AS_SITE, place))
