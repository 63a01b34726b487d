"""Whether an account works: *Check* logs in, *Send a test mail* goes all the way."""

from __future__ import annotations

import time
from email.message import EmailMessage
from email.utils import formatdate
from typing import Any, Final

from AccessControl.class_init import InitializeClass
from AccessControl.SecurityInfo import ClassSecurityInfo

from ..account import Account
from ..envelope import Route, lane_key
from ..errors import InvalidOption, OutboxError
from ..interfaces import State
from ..password import resolve_secret
from ..smtp.check import Report, check
from .page import action, link, page, redirect, render, template, text
from .security import MANAGE_ACCOUNTS, current_owner
from .throttle import Crowded, Throttle, Turnstile

_CHECKED: Final = template("checked")
_TEST_MAIL: Final = template("test_mail")

#: Checks a minute of one user, so that nobody scans ports with it.
_checks: Final = Throttle(12)

#: Seconds that a thread of Zope waits for a relay at most: at each step, and in all.
_PATIENCE: Final = 10.0
_DEADLINE: Final = 20.0

#: Threads of Zope that wait for relays at a time; users choose relays, and some never answer.
_turnstile: Final = Turnstile(2)

#: Nothing more happens by itself.
_FINAL: Final = (State.ACCEPTED, State.REFUSED, State.CANCELLED, State.HELD)


class Trial:
    """Mixin of `mail_accounts.MailAccounts`."""

    security = ClassSecurityInfo()

    @security.protected(MANAGE_ACCOUNTS)
    @action
    def manage_checkAccount(self: Any, REQUEST: Any) -> str:
        """Connect, verify TLS and log in as the account does; say what is wrong."""
        account, report = check_account(self._outbox(), text(REQUEST, "mailbox"))
        return render(_CHECKED, self, REQUEST, account=account, report=report, tab="Accounts")

    @security.protected(MANAGE_ACCOUNTS)
    @action
    def manage_sendTestMail(self: Any, REQUEST: Any) -> str:
        """Queue a test mail, and go to the page that shows its fate."""
        mailbox, sender = text(REQUEST, "mailbox"), text(REQUEST, "sender")
        recipient = text(REQUEST, "recipient")
        message_id = self._outbox().delivery.send(
            sender, [recipient], _test_message(sender, recipient, mailbox), mailbox=mailbox
        )
        return redirect(
            REQUEST,
            f"{self.absolute_url()}/manage_testMail",
            mailbox=mailbox,
            message_id=message_id,
        )

    @security.protected(MANAGE_ACCOUNTS)
    @page
    def manage_testMail(self: Any, REQUEST: Any) -> str:
        """Show what has become of a test mail; the page comes again until that is final."""
        message_id, mailbox = text(REQUEST, "message_id"), text(REQUEST, "mailbox")
        outbox = self._outbox()
        status = outbox.status(message_id)
        is_final = status.state in _FINAL
        if not is_final:
            again = link(REQUEST["URL"], mailbox=mailbox, message_id=message_id)
            REQUEST.response.setHeader("Refresh", f"2; url={again}")
        return render(
            _TEST_MAIL,
            self,
            REQUEST,
            status=status,
            is_final=is_final,
            mailbox=mailbox,
            tab="Accounts",
            next_try=_clock(status.next_try) if status.next_try > outbox.clock() else "",
        )


InitializeClass(Trial)


def check_account(outbox: Any, mailbox: str) -> tuple[Account, Report]:
    """Try an account; mail that waits for one which works need not wait any longer.

    Raises `NoSuchAccount`, `VaultError`; `InvalidOption`: this user has tried too often, or others
    do so now.
    """
    wait = _checks.take(current_owner())
    if wait:
        raise InvalidOption(f"You have checked often enough: try again in {wait:.0f} seconds.")
    account = outbox.vault.get(outbox.accounts.get(mailbox).mailbox)
    hasty = account.replace(
        connect_timeout=min(account.connect_timeout, _PATIENCE),
        command_timeout=min(account.command_timeout, _PATIENCE),
    )
    try:
        with _turnstile.enter(current_owner()):
            report = check(
                hasty, resolve_secret(hasty), helo_name=outbox.helo_name, deadline=_DEADLINE
            )
    except Crowded:
        raise InvalidOption("Another check is not over yet: try again in a moment.") from None
    except OutboxError as error:  # its password is not where it is read from
        report = Report(ok=False, problem=str(error))
    if report.ok:
        outbox.spool.note_lane(lane_key(Route(account.mailbox)), None)
    return account.without_secret(), report


def _test_message(sender: str, recipient: str, mailbox: str) -> bytes:
    message = EmailMessage()
    message["From"], message["To"] = sender, recipient
    message["Subject"] = f"Test mail of the mailbox {mailbox}"
    message.set_content(
        f"This mail was sent at {formatdate(localtime=True)} through the account of the mailbox\n"
        f"{mailbox}, to see whether it works.  It does.\n"
    )
    return message.as_bytes()


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))
