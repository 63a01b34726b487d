"""Send a mail now, for code that waits for it: ``MailHost.send(..., immediate=True)``.

It leaves through the account as the processor would send it, and what goes wrong is raised as
smtplib would raise it, because that is what callers of MailHost catch.
"""

from __future__ import annotations

import logging
import smtplib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..account import Account
from ..address import check_address, check_recipients
from ..envelope import Route, lane_key
from ..errors import NotQueued, SendError, VaultError
from ..interfaces import Outcome, State
from ..journal import Event
from ..message import complete
from ..outcome import Phase, Trouble, classify
from ..password import resolve_secret
from ..smtp.direct import Letter, send_directly
from ..smtp.events import Result
from ..smtp.reply import Reply

log = logging.getLogger(__name__)

#: Seconds that a thread of Zope waits for the relay at most: to connect, for each reply, and for
#: the reply to the end of data; and in all.
_PATIENCE: Final = (10.0, 30.0, 60.0)
_DEADLINE: Final = 120.0

#: Seconds in which a login that was refused is not tried again, unless the account is changed.
_REFUSED_FOR: Final = 300.0

#: By outbox and mailbox: the version of the account, when, and the relay's words.
_refusals: Final[dict[tuple[str, str], tuple[str, float, str]]] = {}


def send_now(
    outbox: Any, account: Account, *, sender: str, recipients: Sequence[str], message: bytes
) -> None:
    """Send a mail through the relay of an account, now.

    When the relay takes it for some recipients only, the mail is sent; the others go into the
    queue, with the transaction: who was deferred is tried again, who was refused is told of to
    the sender.  What the relay took, and what goes no further, the journal has.

    Raises `smtplib.SMTPException` of the kind that smtplib has for it, and OSError: the mail has
    gone to nobody; `smtplib.SMTPServerDisconnected`, too, when the connection was lost after the
    mail was sent whole, so that nobody knows.  `smtplib.SMTPRecipientsRefused` names who has not
    got it: everybody, or those that could not be queued either.  `SendError`: it could not be
    tried.
    """
    now = time.time()
    sender = check_address(sender) if sender else ""
    letter_to = check_recipients(recipients)
    stored, message_id = complete(
        message, sender=sender, now=now, size_limit=outbox.delivery.size_limit
    )
    account, results = _attempt(outbox, account.mailbox, Letter(sender, letter_to, stored))

    def note(outcomes: Mapping[str, Outcome]) -> None:
        for recipient, outcome in outcomes.items():
            outbox.journal.record(
                Event(
                    outcome.at,
                    outcome.state,
                    message_id=message_id,
                    mailbox=str(Route(account.mailbox)),
                    sender=sender,
                    recipient=recipient,
                    attempt=1,
                    reply=outcome.reply,
                    relay=account.relay,
                )
            )

    done = time.time()
    outcomes = {who: Outcome(_state(results[who]), results[who].text, done) for who in letter_to}
    accepted = {who: each for who, each in outcomes.items() if each.state is State.ACCEPTED}
    others = {who: each for who, each in outcomes.items() if who not in accepted}
    note(accepted)
    if not accepted:
        note({who: _given_up(each) for who, each in others.items()})
        raise error_of(results, sender)
    if not others:
        return
    try:
        outbox.delivery.send(sender, list(others), stored, mailbox=account.mailbox)
    except SendError as error:
        # Not raised as it is: who catches that one believes that nobody has got the mail.
        problem = f"and it could not be queued: {error}; the other recipients have got it"
        log.error("%s: not sent to %s, %s", message_id, ", ".join(others), problem)
        left = {who: _given_up(each, problem) for who, each in others.items()}
        note(left)
        raise smtplib.SMTPRecipientsRefused(
            {who: (_code(results[who]), each.reply.encode()) for who, each in left.items()}
        ) from error


def _attempt(outbox: Any, mailbox: str, letter: Letter) -> tuple[Account, Mapping[str, Result]]:
    """Return the account of a mailbox, and what came of sending a mail through it."""
    try:
        version = outbox.vault.version(mailbox)
        account: Account = outbox.vault.get(mailbox)
        secret = resolve_secret(account)
    except VaultError as error:
        raise NotQueued(str(error)) from error
    refused = _refused_login(outbox, account, version)
    if refused is not None:
        return account, dict.fromkeys(letter.recipients, refused)
    results = send_directly(
        _hasty(account), secret, letter, helo_name=outbox.helo_name, deadline=_DEADLINE
    )
    for result in results.values():
        if classify(result.phase, result.reply, result.error).trouble is Trouble.LOGIN:
            _refusals[outbox.location, mailbox] = (version, time.monotonic(), result.text)
    return account, results


def _given_up(outcome: Outcome, problem: str = "") -> Outcome:
    """Return the outcome of a recipient for whom nothing is tried any more; `problem`: why not."""
    if outcome.state is State.DEFERRED:
        reply = f"sent at once, so not tried again; {outcome.reply}"
        outcome = outcome._replace(state=State.REFUSED, reply=reply)
    return outcome._replace(reply=f"{outcome.reply}; {problem}") if problem else outcome


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


def _refused_login(outbox: Any, account: Account, version: str) -> Result | None:
    """Return that the relay has refused this login, if it has: once more may lock the mailbox.

    A processor pauses the account.  Where only immediate mail is sent, there may be none.
    """
    note = outbox.spool.lane_note(lane_key(Route(account.mailbox)))
    if note is not None and note.trouble == Trouble.LOGIN and note.version == version:
        return Result(Phase.AUTH, Reply(535, f"account {account.mailbox} is paused: {note.reason}"))
    refused, at, words = _refusals.get((outbox.location, account.mailbox), ("", 0.0, ""))
    if refused == version and time.monotonic() - at < _REFUSED_FOR:
        text = f"the login of {account.mailbox} was refused a moment ago: {words}"
        return Result(Phase.AUTH, Reply(535, text))
    return None


def _hasty(account: Account) -> Account:
    connect, command, data = _PATIENCE
    return account.replace(
        connect_timeout=min(account.connect_timeout, connect),
        command_timeout=min(account.command_timeout, command),
        data_timeout=min(account.data_timeout, data),
    )


def _state(result: Result) -> State:
    return classify(result.phase, result.reply, result.error).state


def _code(result: Result) -> int:
    return result.reply.code if result.reply else 451  # RFC 5321 section 4.2.3: aborted


def _said(result: Result) -> bytes:
    return result.reply.text.encode() if result.reply else b""
