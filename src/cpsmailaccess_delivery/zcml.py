"""The ZCML directives: ``mail:mailboxDelivery``, ``mail:smtpAccount``, ``mail:queueProcessor``.

They stand beside zope.sendmail's own in the ``mail`` namespace.  All directives with the
same ``queuePath`` share one `Outbox`, the utility `IOutbox` of that name.  Its witness is the
utility `ITransactionWitness` of the same name, or else the unnamed one.  Reading the
configuration starts no thread.
"""

from __future__ import annotations

import copy
import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import transaction
import zope.component.event  # noqa: F401  (hands events to the handlers of a registry)
from zope.component import getGlobalSiteManager
from zope.component.security import proxify
from zope.configuration.exceptions import ConfigurationError
from zope.configuration.fields import Path
from zope.interface import Interface, implementer
from zope.schema import Bool, Choice, Float, Int, TextLine
from zope.security.checker import (
    CheckerPublic,
    InterfaceChecker,
    defineChecker,
    getCheckerForInstancesOf,
)
from zope.security.interfaces import IPermission
from zope.security.permission import Permission as PermissionUtility
from zope.security.zcml import Permission

from .account import Account
from .accounts import Accounts
from .delivery import BoundDelivery
from .errors import OutboxError
from .interfaces import (
    IMailboxDelivery,
    IMailDelivery,
    IOutbox,
    IQueueProcessor,
    ITransactionWitness,
    Verdict,
)
from .outbox import Outbox
from .parts import is_url
from .retry import UNCLEAR_POLICIES

log = logging.getLogger(__name__)

#: zope.sendmail's own permission; defined here too, because its configuration may be absent.
SEND_MAIL = "zope.SendMail"


class QueuePath(Path):  # type: ignore[misc, unused-ignore]
    """A path, relative to the package that is configured; or the URL of a back end."""

    def fromUnicode(self, value: str) -> str:
        url = os.path.expandvars(value.strip())  # as paths are
        return url if is_url(url) else str(super().fromUnicode(value))


class IQueuePath(Interface):
    """Every directive names the spool that it belongs to."""

    queuePath = QueuePath(
        title="Queue path",
        description="Directory of the spool, made when missing; or postgresql://...",
        required=True,
    )


class IMailboxDeliveryDirective(IQueuePath):
    """Register a delivery utility whose mails leave through the account of their sender."""

    name = TextLine(
        title="Name",
        description="Name of the IMailDelivery utility.",
        default="Mail",
        required=False,
    )
    permission = Permission(
        title="Permission", description="Needed to use the utility.", required=False
    )
    sizeLimit = Int(
        title="Size limit", description="Bytes of the largest mail.", min=1, required=False
    )


class ISMTPAccountDirective(IQueuePath):
    """Keep an account in the outbox, as it stands here; written only when it differs."""

    mailbox = TextLine(title="Mailbox", description="An address, @domain or *.")
    hostname = TextLine(title="Host name of the relay")
    port = Int(title="Port of the relay", required=False)
    security = Choice(
        title="Security", values=("tls", "starttls", "plain"), default="starttls", required=False
    )
    username = TextLine(title="User name of the login", required=False)
    passwordFrom = TextLine(
        title="Where the password comes from", description="env:NAME or file:PATH", required=False
    )
    verify = Bool(title="Verify the certificate", default=True, required=False)
    caFile = Path(title="CA file to verify with, instead of the system's", required=False)
    connections = Int(title="Connections at most", min=1, required=False)
    mailsPerSession = Int(title="Mails per session at most", min=1, required=False)
    mailsPerMinute = Int(title="Mails per minute at most", min=1, required=False)
    connectTimeout = Float(title="Seconds to connect", required=False)
    commandTimeout = Float(title="Seconds for each reply", required=False)
    dataTimeout = Float(title="Seconds for the reply to the end of data", required=False)


class IQueueProcessorDirective(IQueuePath):
    """Register a processor of the outbox as the utility IQueueProcessor."""

    name = TextLine(title="Name of the utility", default="Mail", required=False)
    start = Choice(
        title="When it starts",
        description="IProcessStarting: with the application server.  hand: by its start().",
        values=("IProcessStarting", "hand"),
        default="hand",
        required=False,
    )
    unclear = Choice(
        title="What becomes of recipients that are unclear",
        description="retry: tried once more, then held for a person.  hold: at once.",
        values=UNCLEAR_POLICIES,
        required=False,
    )


def mailbox_delivery(
    _context: Any,
    queuePath: str,
    name: str = "Mail",
    permission: str | None = None,
    sizeLimit: int | None = None,
) -> None:
    """Handle ``mail:mailboxDelivery``."""

    def register() -> None:
        outbox = outbox_for(queuePath)
        delivery: Any = outbox.delivery
        if sizeLimit is not None:
            delivery = copy.copy(delivery)  # other directives share the outbox, not this limit
            delivery.size_limit = sizeLimit
        if permission is not None:
            delivery = proxify(delivery, provides=IMailboxDelivery, permission=permission)
            _let_bound_send()
        manager = getGlobalSiteManager()
        for provided in (IMailDelivery, IMailboxDelivery):  # by whichever it is looked up
            manager.registerUtility(delivery, provided, name)

    if permission == SEND_MAIL:
        _context.action(discriminator=None, callable=_define_send_mail)
    _context.action(discriminator=("utility", IMailDelivery, name), callable=register)


def smtp_account(
    _context: Any,
    queuePath: str,
    mailbox: str,
    hostname: str,
    verify: bool = True,
    caFile: str | None = None,
    **settings: Any,
) -> None:
    """Handle ``mail:smtpAccount``."""
    if caFile is not None and not verify:
        raise ConfigurationError("smtpAccount: caFile contradicts verify=no; give one of them")
    values = {_ACCOUNT_FIELDS.get(name, name): value for name, value in settings.items()}
    try:
        account = Account(mailbox=mailbox, host=hostname, verify=caFile or verify, **values)
    except OutboxError as error:
        raise ConfigurationError(f"smtpAccount: {error}") from None

    def keep() -> None:
        outbox = outbox_for(queuePath)
        manager = transaction.TransactionManager()
        accounts = Accounts(outbox.vault, manager)  # no database takes part: no witness
        if outbox.vault.peek(account.mailbox) != account:
            with manager:
                accounts.put(account)

    path = _name_of(queuePath)
    _context.action(discriminator=("mail:smtpAccount", path, account.mailbox), callable=keep)


def queue_processor(
    _context: Any,
    queuePath: str,
    name: str = "Mail",
    start: str = "hand",
    unclear: str | None = None,
) -> None:
    """Handle ``mail:queueProcessor``."""
    event: Any = None
    if start == "IProcessStarting":
        try:
            event = importlib.import_module("zope.processlifetime").IProcessStarting
        except ImportError:
            raise ConfigurationError(
                "queueProcessor: start=IProcessStarting needs zope.processlifetime"
                " (in the extra [zope]); without it, start the processor by hand"
            ) from None

    def register() -> None:
        processor = outbox_for(queuePath).processor(unclear=unclear)
        manager = getGlobalSiteManager()
        manager.registerUtility(processor, IQueueProcessor, name)
        if event is not None:
            manager.registerHandler(start_it, (event,))

    def start_it(starting: Any) -> None:
        # Looked up now: configuration that was read twice starts one thread.
        processor = getGlobalSiteManager().queryUtility(IQueueProcessor, name)
        if processor is not None and processor.ident is None:
            processor.start()
            log.info("delivering %s in this process", outbox_for(queuePath).location)

    _context.action(discriminator=("utility", IQueueProcessor, name), callable=register)


def outbox_for(queue_path: str) -> Outbox:
    """Return the outbox of a queue path: one per registry, made on first use."""
    manager = getGlobalSiteManager()
    path = _name_of(queue_path)
    outbox: Outbox | None = manager.queryUtility(IOutbox, path)
    if outbox is None:
        outbox = Outbox(path, witness=RegisteredWitness(path))
        manager.registerUtility(outbox, IOutbox, path)
    return outbox


@implementer(ITransactionWitness)
class RegisteredWitness:
    """See `ITransactionWitness`: looked up when it is needed, for it may come later."""

    def __init__(self, name: str) -> None:
        self._name = name

    def mark(self, transaction: Any) -> str:
        """See `ITransactionWitness`."""
        witness = self._find()
        return "" if witness is None else str(witness.mark(transaction))

    def expects(self, transaction: Any) -> bool:
        """See `ITransactionWitness`."""
        witness = self._find()
        return witness is not None and bool(witness.expects(transaction))

    def ask(self, tokens: Sequence[str]) -> Mapping[str, Verdict]:
        """See `ITransactionWitness`.  Raises LookupError."""
        witness = self._find()
        if witness is None:
            raise LookupError("no utility ITransactionWitness is registered")
        verdicts: Mapping[str, Verdict] = witness.ask(tokens)
        return verdicts

    def _find(self) -> Any:
        manager = getGlobalSiteManager()
        named = manager.queryUtility(ITransactionWitness, self._name)
        return manager.queryUtility(ITransactionWitness) if named is None else named


def _name_of(queue_path: str) -> str:
    """Return what all directives with one outbox have in common."""
    return queue_path if is_url(queue_path) else os.path.realpath(queue_path)


_ACCOUNT_FIELDS = {
    "passwordFrom": "password_from",
    "mailsPerSession": "mails_per_session",
    "mailsPerMinute": "mails_per_minute",
    "connectTimeout": "connect_timeout",
    "commandTimeout": "command_timeout",
    "dataTimeout": "data_timeout",
}


def _let_bound_send() -> None:
    """Whoever was allowed to call `bind` may use what it returns."""
    if getCheckerForInstancesOf(BoundDelivery) is None:
        defineChecker(BoundDelivery, InterfaceChecker(IMailDelivery, CheckerPublic))


def _define_send_mail() -> None:
    manager = getGlobalSiteManager()
    if manager.queryUtility(IPermission, SEND_MAIL) is None:
        manager.registerUtility(PermissionUtility(SEND_MAIL, "Send mail"), IPermission, SEND_MAIL)
