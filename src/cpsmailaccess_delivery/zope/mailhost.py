"""`MailboxHost`: a MailHost whose mail leaves through the accounts of an outbox.

To callers it is Products.MailHost's: what they may pass, what is made of their messages and what
they catch is the same code.  Only the last step is ours, `_send`: the account of the sender
decides.  A sender without any account goes the way of the stock MailHost, with its settings;
its queue, and the thread for it, are never used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from email.header import Header
from email.utils import getaddresses
from typing import Any

from AccessControl.class_init import InitializeClass
from AccessControl.Permissions import change_configuration, view_management_screens
from AccessControl.SecurityInfo import ClassSecurityInfo
from Products.MailHost import MailHost as stock
from Products.MailHost.interfaces import IMailHost
from zope.interface import implementer
from zope.sendmail.delivery import DirectMailDelivery
from ZPublisher import zpublish

from ..account import Account
from ..errors import InvalidAddress, InvalidSettings, NotQueued, UnknownMailbox, VaultError
from .guarded import Guarded
from .immediate import send_now
from .mailhost_form import IMMEDIATE_SENDS, MailboxHostForm
from .outboxes import DEFAULT_NAME, outbox_of, site_account
from .security import current_owner

log = logging.getLogger(__name__)


class IMailboxHost(IMailHost):
    """A MailHost whose mail leaves through the accounts of an outbox."""


@implementer(IMailboxHost)
class MailboxHost(Guarded, MailboxHostForm, stock.MailHost):
    """See the module.

    ``delivery_name``: of the delivery utility whose outbox it is.  ``immediate``: what becomes of
    ``send(..., immediate=True)``, of `mailhost_form.IMMEDIATE`.  ``route_by_user``: a user who
    is logged in, and has one account of his own, sends through it.
    """

    # `objectValues("Mail Host")` and what else looks for one finds ours, too.
    meta_type = stock.MailHost.meta_type
    zmi_icon = "fas fa-mail-bulk"

    security = ClassSecurityInfo()
    security.declarePrivate("smtp_pwd")
    # They tell everybody of a directory of the server, as URLs.
    security.declareProtected(view_management_screens, "queueLength", "queueThreadAlive")
    security.declareProtected(view_management_screens, "queueNonDeliveryMode")

    manage_options = MailboxHostForm.manage_options + stock.MailHost.manage_options[1:]

    delivery_name = DEFAULT_NAME
    immediate = IMMEDIATE_SENDS
    route_by_user = False

    @security.private
    def _send(self, mfrom: Any, mto: Any, messageText: bytes, immediate: bool = False) -> None:
        if stock.MailBase._send.__module__ != stock.__name__:
            # Somebody has replaced it, as PrintingMailHost does: nothing is to be sent.
            super()._send(mfrom, mto, messageText, immediate)
            return
        try:
            outbox = outbox_of(self.delivery_name)
        except InvalidSettings as error:
            raise NotQueued(str(error)) from error
        sender = envelope_sender(mfrom)
        account = self._account(outbox, sender)
        if account is None:
            outbox.delivery.check_policy(None, sender, messageText)
            self._send_as_stock(mfrom, mto, messageText, immediate)
            return
        recipients = envelope_recipients(mto)
        if immediate and self.immediate == IMMEDIATE_SENDS:
            outbox.delivery.check_policy(account, sender, messageText)
            send_now(outbox, account, sender=sender, recipients=recipients, message=messageText)
        else:
            outbox.delivery.send(sender, recipients, messageText, mailbox=account.mailbox)

    def _account(self, outbox: Any, sender: str) -> Account | None:
        """Return the account that a mail leaves through; None: there is none for it.

        Raises `NotQueued`.
        """
        try:
            by_sender = _find(outbox, sender)
            owner = current_owner() if self.route_by_user else ""
            if not owner or (by_sender is not None and by_sender.owner == owner):
                return by_sender
            own = [each for each in outbox.accounts.list() if each.owner == owner]
        except VaultError as error:
            raise NotQueued(str(error)) from error
        return own[0] if len(own) == 1 else by_sender

    def _send_as_stock(self, mfrom: Any, mto: Any, message: bytes, immediate: bool) -> None:
        if immediate or not self.smtp_queue:
            super()._send(mfrom, mto, message, immediate)
        else:  # in its queue it would wait for a thread, which is not ours to start
            DirectMailDelivery(self._makeMailer()).send(mfrom, mto, message)

    def _startQueueProcessorThread(self) -> None:
        log.info("%s: the outbox is its queue: no thread for the one of MailHost", self.id)

    @security.protected(change_configuration)
    @zpublish(False)
    def manage_makeChanges(self, *args: Any, REQUEST: Any = None, **settings: Any) -> None:
        """For code, as in the stock MailHost; the form has a method of its own."""
        super().manage_makeChanges(*args, **settings)

    @security.protected(change_configuration)
    @zpublish(False)
    def manage_restartQueueThread(self, action: str = "start", REQUEST: Any = None) -> None:
        """For code, as in the stock MailHost: stops its thread, if one is left; starts none."""
        super().manage_restartQueueThread(action)


InitializeClass(MailboxHost)


def envelope_sender(mfrom: Any) -> str:
    """Return the bare address in what callers call ``mfrom``: a text, ``Name <a@b>``, a Header."""
    found = [address for _, address in getaddresses([_text(mfrom or "")]) if address]
    # A name with a comma that nobody quoted looks like two addresses.
    return next((each for each in found if "@" in each), found[0] if found else "")


def envelope_recipients(mto: Any) -> list[str]:
    """Return the bare addresses in ``mto``, which is one or several, each maybe with a name."""
    several = isinstance(mto, Iterable) and not isinstance(mto, str | bytes | Header)
    texts = [_text(each) for each in mto] if several else [_text(mto)]
    if any("\r" in each or "\n" in each for each in texts):
        return texts  # not to be mended here: `delivery.send` refuses them
    # The same when there is none.
    return [address for _, address in getaddresses(texts) if address] or texts


def _text(address: Any) -> str:
    return address.decode() if isinstance(address, bytes) else str(address)


def _find(outbox: Any, sender: str) -> Account | None:
    try:
        account: Account | None = outbox.accounts.find(sender)
    except UnknownMailbox:
        return None
    except InvalidAddress:  # nobody's mailbox; the stock MailHost would try
        return site_account(outbox)
    return account
