"""Send a mail now, for code that waits for it: ``MailHost.send(..., immediate=True)``.

It leaves through the account as the processor would send it, and what goes wrong is raised as
smtplib would raise it, because that is what callers of MailHost catch.
"""

from __future__ import annotations

import smtplib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..account import Account
from ..address import check_address, check_recipients
from ..envelope import Route, lane_key
from ..errors import NotQueued, VaultError
from ..interfaces import State
from ..journal import Event
from ..message import complete
from ..outcome import Phase, Trouble, classify
from ..password import resolve_secret
from ..processor import own_host_name
from ..smtp.direct import Letter, send_directly
from ..smtp.events import Result

#: Seconds that a thread of Zope waits for the relay at most: to connect, for each reply, and for
#: the reply to the end of data; and in all.
_PATIENCE: Final = (10.0, 30.0, 60.0)
_DEADLINE: Final = 120.0


def send_now(
    outbox: Any, account: Account, *, sender: str, recipients: Sequence[str], message: bytes
) -> None:
    """Send a mail through the relay of an account, now.

    When the relay takes it for some recipients only, the mail is sent; the others go into the
    queue, with the transaction: who was deferred is tried again, who was refused is told of to
    the sender.  What the relay took, the journal has.

    Raises `smtplib.SMTPException` of the kind that smtplib has for it, and OSError: the mail has
    gone to nobody; `smtplib.SMTPServerDisconnected`, too, when the connection was lost after the
    mail was sent whole, so that nobody knows.  `SendError`: it could not be tried.
    """
    now = time.time()
    sender = check_address(sender) if sender else ""
    letter_to = check_recipients(recipients)
    stored, message_id = complete(
        message, sender=sender, now=now, size_limit=outbox.delivery.size_limit
    )
    try:
        account = outbox.vault.get(account.mailbox)
        secret = resolve_secret(account)
    except VaultError as error:
        raise NotQueued(str(error)) from error
    _check_login_works(outbox, account)
    results = send_directly(
        _hasty(account),
        secret,
        Letter(sender, letter_to, stored),
        helo_name=own_host_name(),
        deadline=_DEADLINE,
    )
    accepted = [each for each in letter_to if _state(results[each]) is State.ACCEPTED]
    if not accepted:
        raise error_of(results, sender)
    for recipient in accepted:
        outbox.journal.record(
            Event(
                time.time(),
                State.ACCEPTED,
                message_id=message_id,
                mailbox=str(Route(account.mailbox)),
                sender=sender,
                recipient=recipient,
                attempt=1,
                reply=results[recipient].text,
                relay=account.relay,
            )
        )
    others = [each for each in letter_to if each not in accepted]
    if others:
        outbox.delivery.send(sender, others, stored, mailbox=account.mailbox)


def error_of(results: Mapping[str, Result], sender: str) -> Exception:
    """Return what smtplib would raise for results of which none is an acceptance."""
    first = next((each for each in results.values() if each.phase is not Phase.RCPT), None)
    if first is None and all(each.reply for each in results.values()):
        return smtplib.SMTPRecipientsRefused(
            {who: (each.reply.code, _said(each)) for who, each in results.items() if each.reply}
        )
    first = first or next(each for each in results.values() if not each.reply)
    if first.reply is None:
        return _silence(first)
    code, said = first.reply.code, _said(first)
    match first.phase:
        case Phase.CONNECT | Phase.GREETING:
            return smtplib.SMTPConnectError(code, said)
        case Phase.HELLO:
            return smtplib.SMTPHeloError(code, said)
        case Phase.AUTH:
            return smtplib.SMTPAuthenticationError(code, said)
        case Phase.MAIL:
            return smtplib.SMTPSenderRefused(code, said, sender)
        case Phase.DATA | Phase.BODY:
            return smtplib.SMTPDataError(code, said)
    return smtplib.SMTPResponseException(code, said)


def _silence(result: Result) -> Exception:
    if result.phase is Phase.BODY:
        return smtplib.SMTPServerDisconnected(
            f"{result.text}, after the mail was sent whole: nobody knows whether the relay took it"
        )
    if isinstance(result.error, OSError):  # refused, no such host, time-out, TLS
        return result.error
    return smtplib.SMTPServerDisconnected(f"{result.phase}: {result.text}")


def _check_login_works(outbox: Any, account: Account) -> None:
    """Do not try a password again that the relay has refused: that may lock the mailbox."""
    note = outbox.spool.lane_note(lane_key(Route(account.mailbox)))
    if (
        note is not None
        and note.trouble == Trouble.LOGIN
        and note.version == outbox.vault.version(account.mailbox)
    ):
        raise smtplib.SMTPAuthenticationError(
            535, f"account {account.mailbox} is paused: {note.reason}".encode()
        )


def _hasty(account: Account) -> Account:
    connect, command, data = _PATIENCE
    return account.replace(
        connect_timeout=min(account.connect_timeout, connect),
        command_timeout=min(account.command_timeout, command),
        data_timeout=min(account.data_timeout, data),
    )


def _state(result: Result) -> State:
    return classify(result.phase, result.reply, result.error).state


def _said(result: Result) -> bytes:
    return result.reply.text.encode() if result.reply else b""
