"""Zope: accounts, queue and pages of an outbox in the ZMI.  Needs the extra ``[zope]``.

Loaded by ``<include package="cpsmailaccess_delivery.zope" />``, and by nothing else of the
package.
"""

from __future__ import annotations

from typing import Any


def initialize(context: Any) -> None:
    """Register what can be added; called by ``five:registerPackage``."""
    from . import mail_accounts, mailhost, mailhost_add
    from .security import MANAGE_ACCOUNTS

    context.registerClass(
        mail_accounts.MailAccounts,
        permission=MANAGE_ACCOUNTS,
        constructors=(
            mail_accounts.manage_addMailAccountsForm,
            mail_accounts.manage_addMailAccounts,
        ),
    )
    context.registerClass(
        mailhost.MailboxHost,
        meta_type=mailhost_add.ADD_NAME,
        permission=MANAGE_ACCOUNTS,
        constructors=(
            mailhost_add.manage_addMailboxHostForm,
            mailhost_add.manage_addMailboxHost,
        ),
    )
