"""One mail transaction, made ready for one relay: what is said, and what need not be asked."""

from __future__ import annotations

import re
from functools import lru_cache

from .. import dsn
from ..address import ascii_host, check_address
from ..errors import InvalidAddress
from ..outcome import Phase
from .events import Mail, Result
from .hello import Capabilities
from .reply import Reply, local_reply
from .sevenbit import CannotConvert, fit
from .wire import crlf, is_8bit

_ODD = re.compile(r'[<> "]')


class Transaction:
    """One mail on its way through a session (RFC 5321 section 3.3), and what is known of it."""

    __slots__ = (
        "accepted",
        "after_error",
        "asked",
        "body",
        "commands",
        "cursor",
        "ended",
        "mail",
        "mail_command",
        "notifies",
        "recipients",
        "refused",
        "results",
        "unsent",
    )

    def __init__(self, mail: Mail) -> None:
        self.mail = mail
        self.results: dict[str, Result] = {}
        self.mail_command = b""
        self.recipients: list[str] = []  # those whom the relay is asked about
        self.commands: list[bytes] = []  # their RCPT commands
        self.body = b""  # CRLF lines, not stuffed
        self.cursor = 0  # recipients whose RCPT was answered
        self.accepted = 0  # recipients that the relay takes
        self.refused = False  # by MAIL
        self.notifies = False  # the relay is asked to tell the sender what he wants to know
        self.asked = False  # any reply came: the relay has heard of this mail
        self.ended = False  # the transport has the end of data
        self.after_error = False  # travels behind a transaction that failed
        self.unsent = False  # to be handed back, not judged

    def settle(self, result: Result) -> None:
        """Give this result to every recipient that has none."""
        results = self.results
        for recipient in self.mail.recipients:
            if recipient not in results:
                results[recipient] = result


def prepare(mail: Mail, relay: Capabilities) -> Transaction:
    """Return the transaction for this relay; without `recipients`: nothing to ask it."""
    transaction = Transaction(mail)
    body = crlf(mail.message)
    parameters = b""
    needs_utf8 = False
    if is_8bit(body):
        try:
            body, needs_utf8 = fit(body, eightbit=relay.eightbit, smtputf8=relay.smtputf8)
        except CannotConvert as error:
            return _refuse(transaction, _no_conversion(error))
        if is_8bit(body) and relay.eightbit:
            parameters = b" BODY=8BITMIME"
    if relay.size is not None and len(body) > relay.size:
        return _refuse(
            transaction,
            local_reply(
                552,
                "5.3.4",
                f"the message has {len(body):,} bytes, the relay takes {relay.size:,}",
            ),
        )
    sender = _path(mail.sender, relay.smtputf8) if mail.sender else b""
    if isinstance(sender, Reply):
        return _refuse(transaction, sender)
    needs_utf8 = needs_utf8 or not sender.isascii()
    wish = mail.wish if "DSN" in relay.keywords else None
    for recipient in mail.recipients:
        path = _path(recipient, relay.smtputf8)
        if isinstance(path, Reply):
            transaction.results[recipient] = Result(Phase.RCPT, path)
            continue
        needs_utf8 = needs_utf8 or not path.isascii()
        transaction.recipients.append(recipient)
        told = b"" if wish is None else dsn.recipient_parameters(wish, recipient)
        transaction.commands.append(b"RCPT TO:<%b>%b\r\n" % (path, told))
    if needs_utf8:
        parameters += b" SMTPUTF8"
    if wish is not None:
        transaction.notifies = True
        parameters += dsn.mail_parameters(wish)
    if "SIZE" in relay.keywords:
        parameters = b" SIZE=%d%b" % (len(body), parameters)
    transaction.mail_command = b"MAIL FROM:<%b>%b\r\n" % (sender, parameters)
    transaction.body = body
    return transaction


@lru_cache(1024)
def _path(address: str, smtputf8: bool) -> bytes | Reply:
    """Return an address for the wire, or why it cannot go there.

    Addresses were checked at `send`; what a spool file says by now is checked again,
    for it ends up in a command.
    """
    if not address.isprintable() or _ODD.search(address):
        try:
            if check_address(address) != address:
                raise InvalidAddress(f"address {address!r}: is not bare; write local@domain")
        except InvalidAddress as error:
            return local_reply(553, "5.1.3", str(error))
    if address.isascii():
        return address.encode("ascii")
    local, _, domain = address.rpartition("@")
    if local.isascii():
        try:
            return f"{local}@{ascii_host(domain)}".encode("ascii")
        except InvalidAddress as error:
            return local_reply(553, "5.1.3", str(error))
    if smtputf8:
        return address.encode("utf-8")
    return local_reply(
        553, "5.6.7", f"{address}: the relay does not take addresses with non-ASCII letters"
    )


def _no_conversion(error: CannotConvert) -> Reply:
    return local_reply(
        554,
        "5.6.3",
        "the message has 8-bit text, which the relay does not take, and cannot be converted:"
        f" {error}",
    )


def _refuse(transaction: Transaction, reply: Reply) -> Transaction:
    transaction.settle(Result(Phase.MAIL, reply))
    return transaction
