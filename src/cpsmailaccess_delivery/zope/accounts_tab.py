"""The tab *Accounts*: list, add, edit, delete."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar, Final

from AccessControl.class_init import InitializeClass
from AccessControl.SecurityInfo import ClassSecurityInfo

from ..account import Account
from ..envelope import Route, lane_key
from ..errors import InvalidAccount, NoSuchAccount, OutboxError
from ..wording import counted
from .account_form import FIELDS, changed, password_state, shown
from .page import action, as_typed, page, redirect, render, template, text, texts
from .paging import Page
from .security import MANAGE_ACCOUNTS, typed_owner

_LIST: Final = template("accounts")
_FORM: Final = template("account")
_DELETE: Final = template("delete_accounts")

_NONE: Final = "Choose accounts first."


class AccountsTab:
    """Mixin of `mail_accounts.MailAccounts`."""

    security = ClassSecurityInfo()

    manage_options: ClassVar[tuple[dict[str, str], ...]] = (
        {"label": "Accounts", "action": "manage_main"},
    )

    @security.protected(MANAGE_ACCOUNTS)
    @page
    def manage_main(self: Any, REQUEST: Any) -> str:
        """List the accounts: those in which the search's words are, a page at a time."""
        outbox = self._outbox()
        search = text(REQUEST, "search")
        found = [each for each in outbox.accounts.list() if _matches(each, search.lower())]
        notes = outbox.spool.lane_notes()
        listed = Page.of(found, text(REQUEST, "start"))
        return render(
            _LIST,
            self,
            REQUEST,
            search=search,
            page=listed,
            rows=[
                {
                    "account": account,
                    "password": password_state(account),
                    "trouble": notes.get(lane_key(Route(account.mailbox))),
                }
                for account in listed.items
            ],
        )

    @security.protected(MANAGE_ACCOUNTS)
    @page
    def manage_account(self: Any, REQUEST: Any) -> str:
        """Show the form of an account, or of a new one when no mailbox is named."""
        mailbox = text(REQUEST, "mailbox")
        existing = self._outbox().accounts.get(mailbox) if mailbox else None
        verify = existing is None or existing.verify is not False
        return self._account_form(REQUEST, existing, shown(existing), verify)

    @security.protected(MANAGE_ACCOUNTS)
    @action
    def manage_saveAccount(self: Any, REQUEST: Any) -> str:
        """Add or change an account as typed; show the form again with what is wrong."""
        outbox = self._outbox()
        before = text(REQUEST, "existing")
        existing = outbox.accounts.get(before) if before else None
        typed = {name: text(REQUEST, name) for name in FIELDS}
        # as it was typed: a password may begin or end with a space
        typed["password"] = as_typed(REQUEST, "password")
        verify = bool(text(REQUEST, "verify"))
        try:
            account = changed(existing, typed, verify=verify)
            if account.owner != (existing.owner if existing else ""):
                account = account.replace(owner=typed_owner(self, account.owner))
            if existing is None:
                _check_new(outbox, account.mailbox)
            outbox.accounts.put(account)
        except OutboxError as error:
            return self._account_form(REQUEST, existing, typed, verify, str(error))
        done = "Added" if existing is None else "Saved"
        return redirect(
            REQUEST,
            f"{self.absolute_url()}/manage_account",
            f"{done} the account {account.mailbox}. Check tries whether it works.",
            mailbox=account.mailbox,
        )

    @security.protected(MANAGE_ACCOUNTS)
    @page
    def manage_confirmDelete(self: Any, REQUEST: Any) -> str:
        """Ask whether accounts are to be deleted, and say what waits for them."""
        outbox = self._outbox()
        accounts = [outbox.accounts.get(mailbox) for mailbox in texts(REQUEST, "mailboxes")]
        if not accounts:
            return redirect(REQUEST, f"{self.absolute_url()}/manage_main", _NONE)
        waiting = Counter(entry.lane for entry in outbox.queue.entries())
        rows = [(each, _what_waits(waiting[lane_key(Route(each.mailbox))])) for each in accounts]
        return render(_DELETE, self, REQUEST, rows=rows, tab="Accounts")

    @security.protected(MANAGE_ACCOUNTS)
    @action
    def manage_deleteAccounts(self: Any, REQUEST: Any) -> str:
        """Delete the accounts of these mailboxes: all of them, or none."""
        accounts = self._outbox().accounts
        mailboxes = texts(REQUEST, "mailboxes")
        if not mailboxes:
            return redirect(REQUEST, f"{self.absolute_url()}/manage_main", _NONE)
        for mailbox in mailboxes:
            accounts.delete(mailbox)
        return redirect(
            REQUEST, f"{self.absolute_url()}/manage_main", f"Deleted {', '.join(mailboxes)}."
        )

    def _account_form(
        self: Any,
        request: Any,
        existing: Account | None,
        values: dict[str, str],
        verify: bool,
        problem: str = "",
    ) -> str:
        if problem:
            request.response.setStatus(400)
        return render(
            _FORM,
            self,
            request,
            tab="Accounts",
            existing=existing,
            typed={**values, "password": ""},
            verify=verify,
            usual=shown(Account(mailbox="*", host="localhost")),
            password=password_state(existing) if existing else "not set",
            message=problem or text(request, "manage_tabs_message"),
            message_type="danger" if problem else "success",
        )


InitializeClass(AccountsTab)


def _matches(account: Account, search: str) -> bool:
    words = (account.mailbox, account.relay, account.username or "", account.owner)
    return not search or any(search in word.lower() for word in words)


def _what_waits(number: int) -> str:
    one, many = (
        "mail in the queue waits for it, and will",
        "mails in the queue wait for it, and will",
    )
    return counted(number, one, many) if number else ""


def _check_new(outbox: Any, mailbox: str) -> None:
    """Refuse to replace an account by a form that was to add one."""
    try:
        outbox.accounts.get(mailbox)
    except NoSuchAccount:
        return
    raise InvalidAccount(f"mailbox {mailbox}: has an account: edit that one")
