"""Which outbox an object belongs to: found by the name of its delivery utility."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, Final

from Acquisition import aq_base
from zope.component import getUtilitiesFor, queryUtility
from zope.security.proxy import removeSecurityProxy

from ..account import DEFAULT_MAILBOX, Account
from ..errors import InvalidSettings, NoSuchAccount
from ..interfaces import IMailboxDelivery, IOutbox
from .policy import Policy

#: Name of the delivery utility, as in ``mail:mailboxDelivery``.
DEFAULT_NAME: Final = "Mail"

#: Of `mail_accounts.MailAccounts`.
META_TYPE: Final = "Mail accounts"


def delivery_names() -> list[str]:
    """Return the names of the delivery utilities that leave through accounts."""
    return sorted(name for name, _ in getUtilitiesFor(IMailboxDelivery))


def outbox_of(delivery_name: str) -> Any:
    """Return the `IOutbox` behind the delivery utility of this name.

    Raises `InvalidSettings`: there is none.
    """
    # Permissions are asked of who opens the page, by Zope, and not again of the utility.
    delivery = removeSecurityProxy(queryUtility(IMailboxDelivery, delivery_name))
    outbox = None
    if delivery is not None:
        outboxes = (found for _, found in getUtilitiesFor(IOutbox))
        outbox = next((each for each in outboxes if each.location == delivery.queuePath), None)
    if outbox is None:
        known = ", ".join(map(repr, delivery_names())) or "none"
        raise InvalidSettings(
            f"delivery {delivery_name!r}: no mail:mailboxDelivery of this name is configured"
            f" (there is: {known}): choose another one on the tab Defaults, or configure it in ZCML"
        )
    return outbox


def site_account(outbox: Any) -> Account | None:
    """Return the default account, which is the site-wide relay, or None."""
    try:
        account: Account = outbox.accounts.get(DEFAULT_MAILBOX)
    except NoSuchAccount:
        return None
    return account


def mail_accounts_near(places: Iterable[Any]) -> Iterator[Any]:
    """Yield the *Mail accounts* objects that are these places, or in them: the first place's first.

    `places`: from the inside to the root.
    """
    for place in places:
        if isinstance(aq_base(place), WithOutbox):
            yield place
        elif hasattr(aq_base(place), "objectIds"):
            yield from (place._getOb(id) for id in sorted(place.objectIds(META_TYPE)))


def shown_near(places: Iterable[Any], location: str) -> Any:
    """Return the first *Mail accounts* object of `mail_accounts_near` that shows an outbox.

    `location`: of the outbox.  None: there is none.
    """
    location = os.path.realpath(location)
    for found in mail_accounts_near(places):
        try:
            shown = found._outbox().location
        except InvalidSettings:  # it shows none at all
            continue
        if os.path.realpath(shown) == location:
            return found
    return None


class WithOutbox:
    """For an object with ``delivery_name``: its outbox, and what is decided for its users."""

    delivery_name = DEFAULT_NAME
    _policy: dict[str, Any] = {}  # noqa: RUF012 - replaced as a whole, as the ZODB wants it

    def _outbox(self) -> Any:
        return outbox_of(self.delivery_name)

    def _get_policy(self) -> Policy:
        return Policy.from_stored(self._policy)

    def _set_policy(self, policy: Policy) -> None:
        self._policy = policy.stored()
