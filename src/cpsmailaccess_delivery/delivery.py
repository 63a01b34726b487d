"""The delivery utility: what an application looks up, and sends with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import datetime
from email.message import Message
from typing import Any

from zope.component import queryUtility
from zope.interface import implementer

from .account import DEFAULT_MAILBOX, Account, normalise_mailbox
from .address import ascii_host, check_address, check_recipients
from .announcer import Announcer
from .datamanager import join, kept_for
from .envelope import Envelope, Route
from .errors import (
    EntryBusy,
    InvalidAccount,
    InvalidAddress,
    InvalidSettings,
    KeyTaken,
    NoSuchEntry,
    NotQueued,
    SpoolError,
    UnknownMailbox,
    VaultError,
)
from .interfaces import IMailboxDelivery, IMailDelivery, ISendingPolicy
from .message import DEFAULT_SIZE_LIMIT, authors, complete, to_bytes
from .options import check_options
from .outgoing import Doings, Outgoing, OutgoingMails, Removal, Removals

_SENDS = 1
_CANCELS = 2

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
        journal: Any = None,
        announcer: Announcer | None = None,
        size_limit: int = DEFAULT_SIZE_LIMIT,
        clock: Callable[[], float] = time.time,
        witness: Any = None,
    ) -> None:
        self._witness = witness
        self._spool = spool
        self._accounts = accounts
        self._manager = manager
        self.size_limit = size_limit
        self._clock = clock
        self._outgoing = OutgoingMails(spool, announcer or Announcer(), clock)
        self._removals = Removals(spool, journal, clock)

    @property
    def queuePath(self) -> str:
        """See `IMailboxDelivery`."""
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
        idempotency_key: str | None = None,
        notify: str | Iterable[str] | None = None,
        ret: str | None = None,
    ) -> str:
        """See `IMailboxDelivery`."""
        now = self._clock()
        sender = _check_sender(fromaddr, null_allowed=mailbox is not None or hostname is not None)
        recipients = check_recipients(toaddrs)
        route, account = self._route(sender, mailbox, hostname, port)
        options = check_options(
            now=now,
            not_before=not_before,
            undo=undo,
            expires=expires,
            priority=priority,
            key=idempotency_key,
            notify=notify,
            ret=ret,
        )
        stored, message_id = complete(
            to_bytes(message), sender=sender, now=now, size_limit=self.size_limit
        )

        self.check_policy(account, sender, stored)

        def stage(token: str) -> Outgoing:
            envelope = Envelope(
                sender=sender,
                recipients=recipients,
                route=route,
                message_id=message_id,
                token=token,
                not_before=options.not_before,
                expires=options.expires,
                priority=options.priority,
                key=options.key,
                notify=options.notify,
                ret=options.ret,
            )
            return Outgoing(self._spool.stage(envelope, stored), envelope)

        doings = self._doings()
        try:
            if options.key:
                earlier: str | None = doings.find_key(options.key)
                earlier = earlier or self._spool.key_holder(options.key)
                if earlier is not None:
                    return earlier
            self._join(self._outgoing, stage, doings.sent, rank=_SENDS)
        except KeyTaken:
            raise  # within a transaction of the database: begin again
        except SpoolError as error:
            raise NotQueued(str(error)) from error
        return message_id

    def cancel(self, message_id: str) -> None:
        """See `IMailboxDelivery`."""
        message_id = message_id.strip().removeprefix("<").removesuffix(">")
        doings = self._doings()
        removals = [Removal(mail.entry, own=mail) for mail in doings.find_sent(message_id)]
        for record in self._spool.find(message_id):
            if doings.has_cancelled(record.entry):
                continue
            if self._spool.leased(record.entry):
                raise EntryBusy(
                    f"{message_id}: is being delivered right now; look at its status in a moment"
                )
            removals.append(Removal(record.entry))
        if not removals:
            raise NoSuchEntry(
                f"{message_id}: is not in the queue: delivered, cancelled or never committed"
            )
        for removal in removals:
            self._join(self._removals, removal.begin, doings.removals, rank=_CANCELS)

    def bind(self, mailbox: str) -> BoundDelivery:
        """See `IMailboxDelivery`."""
        try:
            return BoundDelivery(self, normalise_mailbox(mailbox))
        except InvalidAccount as error:
            raise UnknownMailbox(str(error)) from None

    def within(self, connection: Any) -> MailboxDelivery:
        """Return a delivery whose mails are part of a database transaction: see `Outbox.within`.

        Raises `InvalidSettings`.
        """
        inside = getattr(self._spool, "inside", None)
        if inside is None:
            raise InvalidSettings(
                f"within: {self._spool.location} is no database: mails follow `transaction` here"
            )
        return _Within(self, inside(connection))

    def _doings(self) -> Doings:
        return kept_for(self._manager.get(), self, Doings)

    def _join(
        self, store: Any, stage: Callable[[str], Any], members: dict[int, Any], *, rank: int
    ) -> None:
        """Let a change follow the transaction; until it is undone it is one of the members."""

        def on_abort() -> None:
            members.pop(id(item), None)

        item = join(
            self._manager, store, stage, rank=rank, on_abort=on_abort, witness=self._witness
        )
        members[id(item)] = item

    def _route(
        self, sender: str, mailbox: str | None, hostname: str | None, port: int | None
    ) -> tuple[Route, Account | None]:
        if hostname is None:
            if port is not None:
                raise InvalidAddress(f"port={port!r}: belongs to hostname=, which is missing")
            account = self._find_account(sender if mailbox is None else mailbox)
            return Route(account.mailbox, account.host, account.port), account
        if mailbox is not None:
            raise InvalidAddress(
                f"hostname={hostname!r} and mailbox={mailbox!r}: a mail goes through an account"
                " or through a relay without login; give one of them"
            )
        port = _RELAY_PORT if port is None else port
        if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
            raise InvalidAddress(f"port={port!r}: is a whole number from 1 to 65535")
        return Route(host=ascii_host(hostname), port=port), None

    def check_policy(self, account: Account | None, sender: str, message: bytes) -> None:
        """Ask `ISendingPolicy`, if there is one, of whatever a mail claims to be.

        `account`: through which it leaves; None: a relay without login.  `send` asks; so must
        whoever hands a mail to an account's relay himself.  Raises what the policy does, and
        `NotQueued`: an account is damaged.
        """
        policy = queryUtility(ISendingPolicy)
        if policy is None:
            return
        policy.check(account, self.queuePath)
        asked = {DEFAULT_MAILBOX} if account is None else {DEFAULT_MAILBOX, account.mailbox}
        for address in filter(None, (sender, *authors(message))):
            try:
                claimed = self._find_account(address)
            except (InvalidAddress, UnknownMailbox):
                continue  # what is nobody's mailbox here, nobody can take
            if claimed.mailbox not in asked:
                asked.add(claimed.mailbox)
                policy.check(claimed, self.queuePath)

    def _find_account(self, mailbox: str) -> Account:
        try:
            return self._ask(mailbox)
        except InvalidAccount as error:
            raise UnknownMailbox(str(error)) from None
        except VaultError as error:
            raise NotQueued(str(error)) from error

    def _ask(self, mailbox: str) -> Account:
        account: Account = self._accounts.find_once(mailbox)
        return account


class _Within(MailboxDelivery):
    """A delivery whose mails commit with the transaction of a connection, and with no other."""

    def __init__(self, delivery: MailboxDelivery, inside: Any) -> None:
        vars(self).update(vars(delivery))
        self._spool = inside

    def cancel(self, message_id: str) -> None:
        """Raise `InvalidSettings`."""
        raise InvalidSettings("within: takes no mail back: call `cancel` of outbox.delivery")

    def _doings(self) -> Doings:
        return Doings()

    def _ask(self, mailbox: str) -> Account:
        account: Account = self._accounts.find(mailbox)  # it is in no transaction of `transaction`
        return account

    def _join(
        self, store: Any, stage: Callable[[str], Any], members: dict[int, Any], *, rank: int
    ) -> None:
        stage("")


@implementer(IMailDelivery)
class BoundDelivery:
    """A delivery whose every mail is routed as one mailbox."""

    def __init__(self, delivery: MailboxDelivery, mailbox: str) -> None:
        self._delivery = delivery
        self.mailbox = mailbox

    def send(self, fromaddr: Any, toaddrs: Iterable[Any], message: bytes | str | Message) -> str:
        """See `IMailDelivery`."""
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
