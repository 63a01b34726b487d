"""One MailHost takes the place of another: same id, same place in its folder, same settings."""

from __future__ import annotations

from typing import Any, Final

from AccessControl import getSecurityManager
from AccessControl.Permissions import delete_objects
from Acquisition import aq_base
from Products.MailHost.MailHost import MailHost
from zExceptions import Unauthorized
from zope.component import getGlobalSiteManager, getSiteManager

#: Settings that the stock MailHost does not have.
OWN_SETTINGS: Final = ("delivery_name", "immediate", "route_by_user")


def stock_ids(container: Any) -> list[str]:
    """Return the ids of the objects of a folder that are stock MailHosts."""
    return [id for id, each in container.objectItems() if type(aq_base(each)) is MailHost]


def stock_of(mailhost: Any) -> Any:
    """Return a stock MailHost with the state of ours: settings, roles, permissions, owner."""
    return _with_state(MailHost(), mailhost, without=OWN_SETTINGS)


def ours_of(mailhost: Any, made: Any) -> Any:
    """Return `made` with the state of a stock MailHost, and its own settings."""
    return _with_state(made, mailhost, without=())


def swap(container: Any, old: Any, new: Any) -> None:
    """Put `new` in the place of `old`.  Raises `Unauthorized`.

    No event is told: for the folder, and for what looks it up there, it is the same object.
    Where the old one is a local utility, the new one is.
    """
    if not getSecurityManager().checkPermission(delete_objects, container):
        raise Unauthorized(f"{delete_objects}: you may not replace {old.getId()} here")
    id = old.getId()
    container._delOb(id)
    container._setOb(id, new)
    manager = getSiteManager()
    if manager is getGlobalSiteManager():
        return
    for registered in list(manager.registeredUtilities()):
        if aq_base(registered.component) is aq_base(old):
            manager.registerUtility(new, registered.provided, registered.name, registered.info)


def _with_state(made: Any, source: Any, without: tuple[str, ...]) -> Any:
    source = aq_base(source)
    source._p_activate()  # a ghost has no state yet
    state = {name: value for name, value in vars(source).items() if name not in without}
    made.__dict__.update(state)
    return made
