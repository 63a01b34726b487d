"""Add a *Mailbox Host* in the ZMI, or put it in the place of the folder's MailHost."""

from __future__ import annotations

from typing import Any, Final

from Acquisition import aq_chain, aq_inner

from ..errors import InvalidSettings
from ..wording import counted
from .mailhost import MailboxHost
from .mailhost_form import mails_left_over
from .mailhost_swap import ours_of, stock_ids, swap
from .outboxes import DEFAULT_NAME, delivery_names, outbox_of, shown_near
from .page import action, page, redirect, render, template, text, typed_title
from .security import check_manages_site

#: In the list of what can be added: two classes have the meta type "Mail Host".
ADD_NAME: Final = "Mailbox Host"

_FORM: Final = template("add_mailhost")


@page
def manage_addMailboxHostForm(dispatcher: Any, REQUEST: Any) -> str:
    """Show the form to add one."""
    return render(
        _FORM,
        dispatcher,
        REQUEST,
        names=delivery_names(),
        default=DEFAULT_NAME,
        replaceable=stock_ids(dispatcher.this()),
    )


@action
def manage_addMailboxHost(dispatcher: Any, REQUEST: Any) -> str:
    """Add one, or replace a stock MailHost of the folder by one."""
    container, delivery = dispatcher.this(), text(REQUEST, "delivery")
    outbox = outbox_of(delivery)
    if shown_near(aq_chain(aq_inner(container)), outbox.location) is None:
        check_manages_site(container)  # it is not the outbox of this part of the site
    replaced = text(REQUEST, "replace")
    made = MailboxHost(replaced or text(REQUEST, "id"), typed_title(REQUEST))
    made.delivery_name = delivery
    if not replaced:
        container._setObject(made.id, made)
        return redirect(REQUEST, f"{dispatcher.DestinationURL()}/manage_main", f"Added {made.id}.")
    if replaced not in stock_ids(container):
        raise InvalidSettings(f"{replaced!r}: is no MailHost of Products.MailHost in this folder")
    old = container._getOb(replaced)
    left_over = mails_left_over(old.smtp_queue_directory, outbox.location)
    swap(container, old, ours_of(old, made))
    message = f"{replaced} is a {ADD_NAME} now."
    if old.smtp_queue and left_over:
        left = counted(left_over, "mail is", "mails are")
        message += f" {left} left in its old queue: see below."
    return redirect(REQUEST, f"{container.absolute_url()}/{replaced}/manage_main", message)
