"""What the pages of users have in common: whose they are, and a frame that needs no ZMI.

``@@my-mailboxes``, ``@@my-outbox`` and ``@@compose`` are views of any object; what the
administrator has decided is said by the nearest *Mail accounts* object, in the same folder or in
one above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from AccessControl import getSecurityManager
from Acquisition import aq_chain, aq_inner
from Products.Five.browser import BrowserView
from zExceptions import NotFound, Unauthorized

from ..account import Account
from ..errors import NoSuchAccount
from .claims import claims_of
from .outboxes import mail_accounts_near
from .own_mails import OwnMails
from .page import Template, render, template, text
from .security import USE_OWN_ACCOUNTS, current_owner

#: The pages, with their labels, as the frame links them.
_PAGES: Final = (("compose", "Write"), ("my-outbox", "Outbox"), ("my-mailboxes", "Mailboxes"))


class UserPage(BrowserView):
    """A page for a user who is logged in, about his own."""

    frame = template("user_macros")

    #: No script and nothing from elsewhere; forms go back where they came from.
    content_policy = (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self';"
        " frame-ancestors 'self'; base-uri 'none'"
    )

    #: Needed on the *Mail accounts* object; on the place of the view, the ZCML says so.
    permission = USE_OWN_ACCOUNTS

    #: What a page says when it was sent on by a form: by the word in the address, since whoever
    #: makes a link may not choose the words of a page.
    said: ClassVar[Mapping[str, str]] = {}

    @property
    def url(self) -> str:
        """Where this page is."""
        return self.url_of(self.__name__)

    def url_of(self, name: str) -> str:
        """Return where another page of the same place is."""
        return f"{self.context.absolute_url()}/@@{name}"

    def links(self) -> list[dict[str, Any]]:
        """Return what the frame shows at its top."""
        return [
            {"url": self.url_of(name), "label": label, "is_here": name == self.__name__}
            for name, label in _PAGES
        ]

    def who(self) -> str:
        """Return the name of the user, for the frame."""
        return str(getSecurityManager().getUser().getUserName())

    @property
    def owner(self) -> str:
        """The user, as `Account.owner` says it.  Raises `Unauthorized`."""
        owner = current_owner()
        if not owner:  # the emergency user, who is in no folder
            raise Unauthorized("Log in as a user of this site: this page is about your mailboxes.")
        return owner

    def mail_accounts(self) -> Any:
        """Return the *Mail accounts* object.  Raises `NotFound`, `Unauthorized`."""
        found = next(mail_accounts_near(aq_chain(aq_inner(self.context))), None)
        if found is None:
            raise NotFound("There is no Mail accounts object here or above.")
        if not getSecurityManager().checkPermission(self.permission, found):
            raise Unauthorized(f"You need the permission {self.permission!r} here.")
        return found

    @property
    def _outbox(self) -> Any:
        return self.mail_accounts()._outbox()

    def own_accounts(self) -> list[Account]:
        """Return the user's accounts."""
        owner = self.owner
        accounts = self._outbox.accounts.list()
        return [account for account in accounts if account.owner == owner]

    def own_account(self, mailbox: str) -> Account:
        """Return one of them.  Raises `NoSuchAccount`, whether it is another's or nobody's."""
        for account in self.own_accounts():
            if account.mailbox == mailbox:
                return account
        raise NoSuchAccount(f"mailbox {mailbox!r}: you have none of this name")

    def own_mails(self) -> OwnMails:
        """Return the user's mails."""
        mail_accounts, owner = self.mail_accounts(), self.owner
        claims = claims_of(mail_accounts.getPhysicalRoot(), mail_accounts.delivery_name)
        since = {
            account.mailbox: claims.since(account.mailbox, owner) for account in self.own_accounts()
        }
        return OwnMails(self._outbox, since)

    def show(self, page: Template, request: Any, /, *, problem: str = "", **options: Any) -> str:
        """Return a page; with a problem it says so, and that nothing was done."""
        if problem:
            request.response.setStatus(400)
        return render(
            page,
            self,
            request,
            message=problem or self.said.get(text(request, "done"), ""),
            message_type="problem" if problem else "done",
            **options,
        )
