"""The tab *Defaults*: which outbox, the site-wide relay, what users may do."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from AccessControl.class_init import InitializeClass
from AccessControl.SecurityInfo import ClassSecurityInfo

from ..errors import InvalidAccount, OutboxError
from .claims import Claims, claims_of
from .outboxes import delivery_names, outbox_of, site_account
from .page import action, page, redirect, render, template, text, texts, typed_title
from .policy import USER_FIELDS, Policy
from .security import MANAGE_ACCOUNTS, check_manages_site

_DEFAULTS: Final = template("defaults")

#: What users may choose, as their own form calls it.
_LABELS: Final = {
    "host": "mail server",
    "port": "port",
    "security": "security",
    "username": "user name",
    "password": "password",
    "connections": "connections at a time",
    "mails_per_minute": "mails per minute",
}


class DefaultsTab:
    """Mixin of `mail_accounts.MailAccounts`."""

    security = ClassSecurityInfo()

    manage_options: ClassVar[tuple[dict[str, str], ...]] = (
        {"label": "Defaults", "action": "manage_defaults"},
    )

    @security.protected(MANAGE_ACCOUNTS)
    @page
    def manage_defaults(self: Any, REQUEST: Any) -> str:
        """Show them."""
        return self._defaults_form(REQUEST)

    @security.protected(MANAGE_ACCOUNTS)
    @action
    def manage_saveOutbox(self: Any, REQUEST: Any) -> str:
        """Show the outbox of another delivery utility from now on."""
        name = text(REQUEST, "delivery")
        if name != self.delivery_name:
            check_manages_site(self)
        try:
            outbox_of(name)
            title = typed_title(REQUEST)
        except OutboxError as error:
            return self._defaults_form(REQUEST, str(error))
        self.title, self.delivery_name = title, name
        return redirect(REQUEST, f"{self.absolute_url()}/manage_defaults", "Saved.")

    @security.protected(MANAGE_ACCOUNTS)
    @action
    def manage_savePolicy(self: Any, REQUEST: Any) -> str:
        """Decide what users may do; it holds for the accounts that they have, too."""
        try:
            policy = Policy(
                fields=tuple(texts(REQUEST, "fields")),
                domains=tuple(texts(REQUEST, "domains")),
                relays=tuple(texts(REQUEST, "relays")),
                networks=tuple(texts(REQUEST, "networks")),
                accounts=_whole(REQUEST, "accounts") or 0,
                connections=_whole(REQUEST, "connections") or 0,
                mails_per_minute=_whole(REQUEST, "mails_per_minute"),
            )
        except OutboxError as error:
            return self._defaults_form(REQUEST, str(error))
        claims = claims_of(self.getPhysicalRoot(), self.delivery_name)
        refused = _limit_accounts(self._outbox(), policy, claims)
        self._set_policy(policy)
        message = "Saved."
        if refused:
            message += f" Not allowed any more, but left as they are: {', '.join(refused)}."
        return redirect(REQUEST, f"{self.absolute_url()}/manage_defaults", message)

    def _defaults_form(self: Any, request: Any, problem: str = "") -> str:
        try:
            site = site_account(self._outbox())
        except OutboxError as error:
            site, problem = None, problem or str(error)
        if problem:
            request.response.setStatus(400)
        return render(
            _DEFAULTS,
            self,
            request,
            names=delivery_names(),
            site=site,
            policy=self._get_policy(),
            user_fields={name: _LABELS[name] for name in USER_FIELDS},
            message=problem or text(request, "manage_tabs_message"),
            message_type="danger" if problem else "success",
        )


InitializeClass(DefaultsTab)


def _limit_accounts(outbox: Any, policy: Policy, claims: Claims) -> list[str]:
    """Put the accounts of users within a policy; return the mailboxes whose relay it refuses.

    What the administrator has given to somebody is as he has set it up.
    """
    refused = []
    for account in outbox.accounts.list():
        trusted = () if account.networks else (account.relay,)  # that of the site
        if trusted and not claims.since(account.mailbox, account.owner):
            continue
        try:
            limited = policy.limited(account, trusted)
        except InvalidAccount:
            refused.append(account.mailbox)
            continue
        if limited != account:
            outbox.accounts.put(limited)
    return refused


def _whole(request: Any, name: str) -> int | None:
    value = text(request, name)
    if not value:
        return None
    if not (value.isascii() and value.isdecimal()):
        raise InvalidAccount(f"{name}: {value!r}: is a whole number of at least 1")
    return int(value)
