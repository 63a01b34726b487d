"""What Zope lets people do with any object, and not with one that shows an outbox.

Whoever manages a part of the site gets no outbox of it by copying, or moving, an object there:
the clipboard is a cookie, which may name any object, and "Copy or Move" is everybody's by default.
"""

from __future__ import annotations

from typing import Any

from Acquisition import aq_base
from OFS.interfaces import IObjectClonedEvent, IObjectWillBeMovedEvent
from webdav.Resource import Resource
from zope.component import adapter
from ZPublisher import zpublish_wrap

from .security import check_manages_site


class Guarded:
    """Mixin of the classes of objects that show an outbox."""

    # Zope publishes them for any method: a link would do what only WebDAV is to do.
    DELETE = zpublish_wrap(Resource.DELETE, conditional=False, methods="DELETE")
    COPY = zpublish_wrap(Resource.COPY, conditional=False, methods="COPY")
    MOVE = zpublish_wrap(Resource.MOVE, conditional=False, methods="MOVE")
    LOCK = zpublish_wrap(Resource.LOCK, conditional=False, methods="LOCK")
    UNLOCK = zpublish_wrap(Resource.UNLOCK, conditional=False, methods="UNLOCK")


@adapter(Guarded, IObjectClonedEvent)
def refuse_copy(copy: Any, event: Any) -> None:
    """Refuse a copy, also of a folder in which one is.  Raises `Unauthorized`."""
    check_manages_site(copy)


@adapter(Guarded, IObjectWillBeMovedEvent)
def refuse_move(moved: Any, event: Any) -> None:
    """Refuse to move one to another folder, where other people may manage it.

    Not to rename, add or delete it.  Raises `Unauthorized`.
    """
    before, after = event.oldParent, event.newParent
    if before is not None and after is not None and aq_base(before) is not aq_base(after):
        check_manages_site(moved)
