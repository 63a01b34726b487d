"""The *Mail accounts* object: an outbox in the ZMI.

It holds which outbox it shows, and what the administrator has decided; accounts and mails are
the outbox's.  Each tab is a class of its own module, and adds itself to ``manage_options``.
"""

from __future__ import annotations

from typing import Any

from AccessControl.class_init import InitializeClass
from AccessControl.Permissions import view_management_screens
from AccessControl.SecurityInfo import ClassSecurityInfo
from OFS.SimpleItem import SimpleItem

from .accounts_tab import AccountsTab
from .defaults_tab import DefaultsTab
from .guarded import Guarded
from .outboxes import DEFAULT_NAME, META_TYPE, WithOutbox, delivery_names
from .page import action, page, redirect, render, template, text, typed_title
from .processor_tab import ProcessorTab
from .queue_tab import QueueTab
from .security import SEND_AS_SITE, SEND_MAIL, USE_OWN_ACCOUNTS, check_manages_site
from .steering import Steering
from .trial import Trial

_ADD_FORM = template("add")


class MailAccounts(
    Guarded,
    AccountsTab,
    Trial,
    DefaultsTab,
    QueueTab,
    Steering,
    ProcessorTab,
    WithOutbox,
    SimpleItem,
):
    """An outbox in the ZMI."""

    meta_type = META_TYPE
    zmi_icon = "fas fa-envelope-open-text"

    security = ClassSecurityInfo()
    # What the list of a folder shows, by templates that ask; nothing else.
    security.setDefaultAccess(dict.fromkeys(("meta_type", "title", "zmi_icon"), True))
    # Protect no method here, but are asked of this object: its tab Security shows them.
    security.setPermissionDefault(USE_OWN_ACCOUNTS, ("Authenticated", "Manager"))
    security.setPermissionDefault(SEND_MAIL, ("Authenticated", "Manager"))
    security.setPermissionDefault(SEND_AS_SITE, ("Anonymous", "Manager"))

    manage_options = (
        AccountsTab.manage_options
        + DefaultsTab.manage_options
        + QueueTab.manage_options
        + ProcessorTab.manage_options
        + SimpleItem.manage_options
    )

    def __init__(self, id: str, title: str = "", delivery: str = DEFAULT_NAME) -> None:
        self.id = id
        self.title = title
        self.delivery_name = delivery

    @security.public
    def getBookmarkableURLs(self) -> bool:
        # The ZMI's script would take the query from the address: reloaded, another page.
        return False

    @security.protected(view_management_screens)
    @page
    def index_html(self, REQUEST: Any) -> str:
        """Go to the first tab; whoever guesses the address learns nothing."""
        return redirect(REQUEST, f"{self.absolute_url()}/manage_workspace")


InitializeClass(MailAccounts)


@page
def manage_addMailAccountsForm(dispatcher: Any, REQUEST: Any) -> str:
    """Show the form to add one."""
    return render(_ADD_FORM, dispatcher, REQUEST, names=delivery_names(), default=DEFAULT_NAME)


@action
def manage_addMailAccounts(dispatcher: Any, REQUEST: Any) -> str:
    """Add one."""
    container = dispatcher.this()
    check_manages_site(container)
    made = MailAccounts(text(REQUEST, "id"), typed_title(REQUEST), text(REQUEST, "delivery"))
    container._setObject(made.id, made)
    return redirect(REQUEST, f"{dispatcher.DestinationURL()}/manage_main", f"Added {made.id}.")
