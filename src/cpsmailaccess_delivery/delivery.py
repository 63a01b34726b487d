"""The delivery utility: what an application looks up, and sends with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import datetime
from email.message import Message
from typing import Any

from zope.interface import implementer

from .account import Account, normalise_mailbox
from .address import ascii_host, check_address, check_recipients
from .datamanager import join
from .envelope import Envelope, Route
from .errors import (
    InvalidAccount,
    InvalidAddress,
    NotQueued,
    SpoolError,
    UnknownMailbox,
    VaultError,
)
from .interfaces import Entry, IMailboxDelivery, IMailDelivery
from .message import DEFAULT_SIZE_LIMIT, complete, to_bytes
from .options import check_options

_RANK = 1

#: Port of a relay that is named without one: what the 2005 system used.
_RELAY_PORT = 25


@implementer(IMailboxDelivery)
class MailboxDelivery:
    """See `IMailboxDelivery`."""

    def __init__(
        self,
        spool: Any,
        accounts: Any,
        manager: Any,
        *,
        size_limit: int = DEFAULT_SIZE_LIMIT,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._spool = spool
        self._accounts = accounts
        self._manager = manager
        self.size_limit = size_limit
        self._clock = clock

    @property
    def queuePath(self) -> str:
        return str(self._spool.location)

    def send(
        self,
        fromaddr: Any,
        toaddrs: Iterable[Any],
        message: bytes | str | Message,
        *,
        mailbox: str | None = None,
        hostname: str | None = None,
        port: int | None = None,
        not_before: float | datetime | None = None,
        undo: float | None = None,
        expires: float | datetime | None = None,
        priority: int | str | None = None,
    ) -> str:
        now = self._clock()
        sender = _check_sender(fromaddr, null_allowed=mailbox is not None or hostname is not None)
        recipients = check_recipients(toaddrs)
        route = self._route(sender, mailbox, hostname, port)
        options = check_options(
            now=now, not_before=not_before, undo=undo, expires=expires, priority=priority
        )
        stored, message_id = complete(
            to_bytes(message), sender=sender, now=now, size_limit=self.size_limit
        )

        def stage(token: str) -> Entry:
            envelope = Envelope(
                sender=sender,
                recipients=recipients,
                route=route,
                message_id=message_id,
                token=token,
                not_before=options.not_before,
                expires=options.expires,
                priority=options.priority,
            )
            staged: Entry = self._spool.stage(envelope, stored)
            return staged

        try:
            join(self._manager, self._spool, stage, rank=_RANK)
        except SpoolError as error:
            raise NotQueued(str(error)) from error
        return message_id

    def bind(self, mailbox: str) -> BoundDelivery:
        try:
            return BoundDelivery(self, normalise_mailbox(mailbox))
        except InvalidAccount as error:
            raise UnknownMailbox(str(error)) from None

    def _route(
        self, sender: str, mailbox: str | None, hostname: str | None, port: int | None
    ) -> Route:
        if hostname is None:
            if port is not None:
                raise InvalidAddress(f"port={port!r}: belongs to hostname=, which is missing")
            account = self._find_account(sender if mailbox is None else mailbox)
            return Route(mailbox=account.mailbox, host=account.host, port=account.port)
        if mailbox is not None:
            raise InvalidAddress(
                f"hostname={hostname!r} and mailbox={mailbox!r}: a mail goes through an account"
                " or through a relay without login; give one of them"
            )
        port = _RELAY_PORT if port is None else port
        if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
            raise InvalidAddress(f"port={port!r}: is a whole number from 1 to 65535")
        return Route(host=ascii_host(hostname), port=port)

    def _find_account(self, mailbox: str) -> Account:
        try:
            account: Account = self._accounts.find(mailbox)
        except InvalidAccount as error:
            raise UnknownMailbox(str(error)) from None
        except VaultError as error:
            raise NotQueued(str(error)) from error
        return account


@implementer(IMailDelivery)
class BoundDelivery:
    """A delivery whose every mail is routed as one mailbox."""

    def __init__(self, delivery: MailboxDelivery, mailbox: str) -> None:
        self._delivery = delivery
        self.mailbox = mailbox

    def send(self, fromaddr: Any, toaddrs: Iterable[Any], message: bytes | str | Message) -> str:
        return self._delivery.send(fromaddr, toaddrs, message, mailbox=self.mailbox)


def _check_sender(fromaddr: Any, *, null_allowed: bool) -> str:
    if fromaddr in (None, "", b"", "<>", b"<>"):
        if null_allowed:
            return ""  # RFC 5321 section 4.5.5
        raise InvalidAddress(
            "fromaddr is empty: name the sender, or route a mail with the null reverse-path"
            " by mailbox="
        )
    return check_address(fromaddr)
