"""The form of a `mailhost.MailboxHost` in the ZMI.

No page has its password, and none takes one: what was stored by the stock MailHost may be used,
copied into the outbox and forgotten; a relay with a login is an account.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from AccessControl.class_init import InitializeClass
from AccessControl.Permissions import view_management_screens
from AccessControl.SecurityInfo import ClassSecurityInfo
from Acquisition import aq_inner, aq_parent

from ..account import DEFAULT_MAILBOX, Account, Security
from ..address import ascii_host
from ..errors import InvalidAccount, InvalidAddress, InvalidSettings, OutboxError
from .mailhost_swap import stock_of, swap
from .outboxes import delivery_names, outbox_of, site_account
from .page import action, page, redirect, render, template, text, typed_title
from .security import MANAGE_ACCOUNTS, check_manages_site

#: What becomes of ``send(..., immediate=True)``: see `IMMEDIATE`.
IMMEDIATE_SENDS: Final = "send"
IMMEDIATE_QUEUES: Final = "queue"

IMMEDIATE: Final = {
    IMMEDIATE_SENDS: "is sent at once, through the account, and fails in the caller's hands",
    IMMEDIATE_QUEUES: "is queued like all other mail",
}

_FORM: Final = template("mailhost")


class MailboxHostForm:
    """Mixin of `mailhost.MailboxHost`."""

    security = ClassSecurityInfo()

    manage_options: ClassVar[tuple[dict[str, str], ...]] = (
        {"label": "Edit", "action": "manage_main"},
    )

    @security.public
    def getBookmarkableURLs(self) -> bool:
        # See `mail_accounts.MailAccounts`.
        return False

    @security.protected(MANAGE_ACCOUNTS)
    @page
    def manage_main(self: Any, REQUEST: Any) -> str:
        """Show the form."""
        return self._mailhost_form(REQUEST)

    security.declareProtected(MANAGE_ACCOUNTS, "manage")
    manage = manage_main

    @security.protected(view_management_screens)
    @page
    def index_html(self: Any, REQUEST: Any) -> str:
        """Go to the first tab; whoever guesses the address learns nothing."""
        return redirect(REQUEST, f"{self.absolute_url()}/manage_workspace")

    @security.protected(MANAGE_ACCOUNTS)
    @action
    def manage_saveMailboxHost(self: Any, REQUEST: Any) -> str:
        """Change the settings as typed: all of them, or none."""
        if text(REQUEST, "delivery") != self.delivery_name:
            check_manages_site(self)
        try:
            outbox_of(text(REQUEST, "delivery"))
            immediate = text(REQUEST, "immediate")
            if immediate not in IMMEDIATE:
                raise InvalidSettings(f"immediate={immediate!r}: is one of {', '.join(IMMEDIATE)}")
            title, relay = typed_title(REQUEST), _relay(REQUEST)
            forgets = bool(text(REQUEST, "forget_password"))
            if not forgets:
                _check_kept(self, relay)
        except OutboxError as error:
            return self._mailhost_form(REQUEST, str(error))
        self.title, self.delivery_name = title, text(REQUEST, "delivery")
        self.immediate, self.route_by_user = immediate, bool(text(REQUEST, "route_by_user"))
        for name, value in relay.items():
            setattr(self, name, value)
        if forgets:
            self.smtp_pwd = ""
        return redirect(REQUEST, f"{self.absolute_url()}/manage_main", "Saved.")

    @security.protected(MANAGE_ACCOUNTS)
    @action
    def manage_makeDefaultAccount(self: Any, REQUEST: Any) -> str:
        """Make the relay of the stock MailHost the outbox's default account, password and all."""
        check_manages_site(self)
        try:
            outbox = outbox_of(self.delivery_name)
            if site_account(outbox) is not None:
                raise InvalidSettings("there is a default account already: edit that one")
            outbox.accounts.put(_account_of(self))
        except OutboxError as error:
            return self._mailhost_form(REQUEST, str(error))
        message = "Added the default account. A Mail accounts object shows it; Check tries it."
        return redirect(REQUEST, f"{self.absolute_url()}/manage_main", message)

    @security.protected(MANAGE_ACCOUNTS)
    @action
    def manage_putStockBack(self: Any, REQUEST: Any) -> str:
        """Put the stock MailHost back in place of this one, with its settings."""
        container = aq_parent(aq_inner(self))
        swap(container, self, stock_of(self))
        return redirect(
            REQUEST,
            f"{container.absolute_url()}/manage_main",
            f"{self.id} is the MailHost of Products.MailHost again.",
        )

    def _mailhost_form(self: Any, request: Any, problem: str = "") -> str:
        site, left_over = None, 0
        try:
            outbox = outbox_of(self.delivery_name)
            site = site_account(outbox)
            left_over = mails_left_over(self.smtp_queue_directory, outbox.location)
        except OutboxError as error:
            problem = problem or str(error)
        if problem:
            request.response.setStatus(400)
        return render(
            _FORM,
            self,
            request,
            names=delivery_names(),
            immediate=IMMEDIATE,
            site=site,
            left_over=left_over,
            has_password=bool(self.smtp_pwd),
            message=problem or text(request, "manage_tabs_message"),
            message_type="danger" if problem else "success",
        )


InitializeClass(MailboxHostForm)


def mails_left_over(directory: str, location: str) -> int:
    """Return how many mails are in a queue of MailHost, unless it is the outbox's own spool."""
    if os.path.realpath(directory) == os.path.realpath(location):
        return 0
    count = 0
    for name in ("new", "cur"):
        try:
            names = os.listdir(os.path.join(directory, name))
        except OSError:  # not there, or no Maildir
            continue
        count += sum(not each.startswith(".") for each in names)
    return count


def _relay(request: Any) -> dict[str, Any]:
    """Return what was typed of the relay of the stock MailHost."""
    host, port = text(request, "smtp_host"), text(request, "smtp_port")
    try:
        ascii_host(host)
    except InvalidAddress as error:
        raise InvalidSettings(f"SMTP host: {error}") from None
    if not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise InvalidSettings(f"SMTP port: {port!r}: is a whole number from 1 to 65535")
    return {
        "smtp_host": host,
        "smtp_port": int(port),
        "smtp_uid": text(request, "smtp_uid"),
        "force_tls": bool(text(request, "force_tls")),
        "implicit_tls": bool(text(request, "implicit_tls")),
    }


def may_keep_password(mailhost: Any, relay: Mapping[str, Any]) -> bool:
    """Tell whether the stored password may be used at a relay: no other, and no less securely.

    Where nobody can read the password, nobody may have it sent to where he can.  `relay`: the
    attributes of a MailHost, as they are to be.
    """
    moved = (relay["smtp_host"], int(relay["smtp_port"])) != (
        mailhost.smtp_host,
        int(mailhost.smtp_port),
    )
    weaker = (mailhost.force_tls or mailhost.implicit_tls) and not (
        relay["force_tls"] or relay["implicit_tls"]
    )
    return not (moved or weaker)


def _check_kept(mailhost: Any, relay: dict[str, Any]) -> None:
    if mailhost.smtp_pwd and not may_keep_password(mailhost, relay):
        raise InvalidSettings(
            f"the stored password is for {mailhost.smtp_host}:{mailhost.smtp_port}, as securely as"
            " now: forget it, too, and give another relay's login to an account"
        )


def _account_of(mailhost: Any) -> Account:
    """Return the default account that is the relay of a MailHost."""
    username = mailhost.smtp_uid or None
    if username and not mailhost.smtp_pwd:
        raise InvalidAccount(
            f"the login {username!r} has no password here: add the default account in Mail accounts"
        )
    security: Security = "starttls" if mailhost.force_tls or username else "plain"
    return Account(
        mailbox=DEFAULT_MAILBOX,
        host=mailhost.smtp_host,
        port=int(mailhost.smtp_port),
        security="tls" if mailhost.implicit_tls else security,
        username=username,
        password=mailhost.smtp_pwd if username else None,
    )
