"""``@@my-mailboxes``: a user sets up his own mailboxes, within what the administrator allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from ..account import DEFAULT_PORT, Account
from ..envelope import Route, lane_key
from ..errors import InvalidAccount, NoSuchAccount, OutboxError
from ..interfaces import State
from ..wording import counted
from .account_form import login, password_state, shown, typed
from .claims import claims_of, claims_to_change
from .outboxes import site_account
from .page import action, as_typed, page, redirect, template, text
from .policy import RELAY_FIELDS, Policy
from .trial import check_account
from .user_page import UserPage

_LIST: Final = template("my_mailboxes")
_FORM: Final = template("my_mailbox")
_DELETE: Final = template("my_mailbox_delete")
_CHECKED: Final = template("my_mailbox_checked")


class MyMailboxes(UserPage):
    """See the module."""

    said: ClassVar[Mapping[str, str]] = {
        "added": "The mailbox is set up. Check tries whether it works.",
        "saved": "Saved. Check tries whether it works.",
        "deleted": "The mailbox is deleted, and its password.",
    }

    def __call__(self) -> str:
        """List them."""
        return self._list(self.request)

    @page
    def edit(self, REQUEST: Any) -> str:
        """Show the form of one, or of a new one when none is named."""
        mailbox = text(REQUEST, "mailbox")
        existing = self.own_account(mailbox) if mailbox else None
        return self._form(REQUEST, existing, shown(existing))

    @action
    def save(self, REQUEST: Any) -> str:
        """Add or change one as typed; show the form again with what is wrong."""
        before = text(REQUEST, "existing")
        existing = self.own_account(before) if before else None
        texts = {name: text(REQUEST, name) for name in shown(None)}
        # as it was typed: a password may begin or end with a space
        texts["password"] = as_typed(REQUEST, "password")
        try:
            account = self._wanted(existing, texts)
            if existing is None:
                self._check_free(account.mailbox)
            self._outbox.accounts.put(account)
        except OutboxError as error:
            return self._form(REQUEST, existing, texts, str(error))
        if existing is None:
            self._take(account.mailbox)
        done = "added" if existing is None else "saved"
        return redirect(REQUEST, f"{self.url}/edit", mailbox=account.mailbox, done=done)

    @action
    def check(self, REQUEST: Any) -> str:
        """Connect, verify TLS and log in with what is saved; say what is wrong."""
        mailbox = self.own_account(text(REQUEST, "mailbox")).mailbox
        account, report = check_account(self._outbox, mailbox)
        return self.show(_CHECKED, REQUEST, account=account, report=report)

    @page
    def confirm_delete(self, REQUEST: Any) -> str:
        """Ask whether one is to be deleted."""
        account = self.own_account(text(REQUEST, "mailbox"))
        return self.show(_DELETE, REQUEST, account=account, waiting=self._waiting(account.mailbox))

    @action
    def delete(self, REQUEST: Any) -> str:
        """Delete one, unless mails wait for it: they would wait for ever, or for a stranger."""
        account = self.own_account(text(REQUEST, "mailbox"))
        if waiting := self._waiting(account.mailbox):
            raise InvalidAccount(
                f"mailbox {account.mailbox}: {waiting} to leave through it: take back what waits"
                " first, or wait until it is sent"
            )
        self._outbox.accounts.delete(account.mailbox)
        self._take(account.mailbox)
        return redirect(REQUEST, self.url, done="deleted")

    @property
    def _policy(self) -> Policy:
        return self.mail_accounts()._get_policy()

    def _list(self, request: Any) -> str:
        accounts, policy = self.own_accounts(), self._policy
        notes = self._outbox.spool.lane_notes()
        return self.show(
            _LIST,
            request,
            may_add=bool(policy.domains) and len(accounts) < policy.accounts,
            policy=policy,
            rows=[
                {
                    "account": account,
                    "password": password_state(account),
                    "trouble": notes.get(lane_key(Route(account.mailbox))),
                }
                for account in accounts
            ],
        )

    def _form(
        self, request: Any, existing: Account | None, values: dict[str, str], problem: str = ""
    ) -> str:
        outbox, policy = self._outbox, self._policy
        return self.show(
            _FORM,
            request,
            problem=problem,
            existing=existing,
            typed={**values, "password": ""},
            fields=policy.fields,
            domains=policy.domains,
            relays=policy.relays,
            limits=(policy.connections, policy.mails_per_minute),
            site=site_account(outbox),
            ports=DEFAULT_PORT,
            password=password_state(existing) if existing else "not set",
        )

    def _wanted(self, existing: Account | None, texts: dict[str, str]) -> Account:
        """Return what was typed, as far as the policy lets him choose.  Raises `InvalidAccount`."""
        policy = self._policy
        chosen = typed({name: texts[name] for name in policy.fields})
        if not chosen.get("host"):  # the site's relay, or the one that it has
            chosen = {name: chosen[name] for name in chosen if name not in RELAY_FIELDS}
        if "password" in policy.fields:
            username = chosen.get("username", existing.username if existing else None)
            chosen |= login(existing, username, texts["password"])
        if existing is None:
            policy.may_add(texts["mailbox"], len(self.own_accounts()))
        return policy.account(
            existing.mailbox if existing else texts["mailbox"],
            owner=self.owner,
            chosen=chosen,
            existing=existing,
            site=site_account(self._outbox),
        )

    def _check_free(self, mailbox: str) -> None:
        """Raise `InvalidAccount` when a mailbox is, or was, somebody else's."""
        try:
            taken = self._outbox.accounts.get(mailbox)
        except NoSuchAccount:
            pass
        else:
            if taken.owner == self.owner:
                raise InvalidAccount(f"mailbox {mailbox}: you have it already: change its settings")
            raise InvalidAccount(f"mailbox {mailbox}: is set up already: ask the administrator")
        near = self.mail_accounts()
        claims_of(near.getPhysicalRoot(), near.delivery_name).check(mailbox, self.owner)
        if self._waiting(mailbox):
            raise InvalidAccount(
                f"mailbox {mailbox}: mails from before wait for it: ask the administrator"
            )

    def _take(self, mailbox: str) -> None:
        """Note that he has it, or had it, from now on."""
        near = self.mail_accounts()
        claims = claims_to_change(near.getPhysicalRoot(), near.delivery_name)
        claims.take(mailbox, self.owner, self._outbox.clock())

    def _waiting(self, mailbox: str) -> str:
        """Return how many mails would leave through the account of a mailbox; "" for none."""
        lane = lane_key(Route(mailbox))
        number = sum(
            entry.lane == lane and entry.state is not State.REFUSED
            for entry in self._outbox.queue.entries()
        )
        return counted(number, "mail waits", "mails wait") if number else ""
