"""How pages and forms are made: one frame, one way to change something.

A page is a method with `page`, a form's target one with `action`; both render templates of
``templates/`` with `render`, which escape all they are given.  What the outbox cannot do is
said in the page, never as a traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Final
from urllib.parse import urlencode

import transaction
from Acquisition import aq_base
from Products.Five.browser import BrowserView
from Products.PageTemplates.Expressions import getTrustedEngine
from Products.PageTemplates.PageTemplateFile import PageTemplateFile
from zExceptions import NotFound
from ZPublisher import zpublish

from ..errors import InvalidSettings, OutboxError
from .security import FORM_FIELD, check_token, form_token

Method = Callable[[Any, Any], Any]


class Template(PageTemplateFile):
    """One on the file system may use what it is given, values without declarations, too."""

    def pt_getEngine(self) -> Any:
        return getTrustedEngine()


def template(name: str) -> Template:
    """Return a page template of this package: ``templates/NAME.zpt``."""
    return Template(f"templates/{name}", globals())


_MACROS: Final = template("macros")
_PROBLEM: Final = template("problem")


def render(page: Template, context: Any, request: Any, /, **options: Any) -> str:
    """Return a page about an object, or of a view.

    The template finds in ``options``, besides those given: ``view``: the object or view;
    ``macros``, see macros.zpt, or those of its ``frame``, a `Template`, when it has one of its
    own, which may come with a ``content_policy`` for the browser;
    ``token`` and ``token_field``; ``link``, see there; ``message`` and ``message_type`` (of
    Bootstrap's alerts), which show in the frame; ``tab``: the label of
    the tab that a page belongs to which is none itself.  A template that fails shows its options to
    whoever may see the page: no secret is one.
    """
    response = request.response
    response.setHeader("Cache-Control", "no-store")
    response.setHeader("X-Frame-Options", "SAMEORIGIN")
    response.setHeader("Referrer-Policy", "same-origin")
    response.setHeader("X-Content-Type-Options", "nosniff")
    own = aq_base(context)
    frame: Any = getattr(own, "frame", _MACROS)
    if hasattr(own, "content_policy"):
        response.setHeader("Content-Security-Policy", own.content_policy)
    standard = {
        "macros": frame.macros,
        "view": context,
        "token": form_token(request),
        "token_field": FORM_FIELD,
        "link": link,
        "message": text(request, "manage_tabs_message"),
        "message_type": "success",
        "tab": "",
    }
    # A class attribute has no place in the object tree; called like this, it gets one.
    place = context.context if isinstance(context, BrowserView) else context
    made: str = page.__of__(place)(**{**standard, **options})
    return made


def page(method: Method) -> Method:
    """Publish a method ``(self, REQUEST)`` as a page that changes nothing."""
    return zpublish(_saying_problems(method))


def action(method: Method) -> Method:
    """Publish a method ``(self, REQUEST)`` that changes something: by POST, with the token.

    When it raises an `OutboxError`, the transaction is aborted and the error is the page.
    """

    @wraps(method)
    def checked(self: Any, REQUEST: Any) -> Any:
        if REQUEST.method != "POST":  # what Zope looks at on the way to an object, not to a view
            raise NotFound(REQUEST["URL"])
        check_token(REQUEST)
        return method(self, REQUEST)

    return zpublish(methods="POST")(_saying_problems(checked))


def redirect(request: Any, url: str, message: str = "", **query: str) -> str:
    """Go on to a page, which shows a message: what a form does when it has done its work."""
    if message:
        query["manage_tabs_message"] = message
    request.response.redirect(link(url, **query), status=303)
    return ""


def link(url: str, **query: object) -> str:
    """Return a URL with a query."""
    return f"{url}?{urlencode(query)}" if query else url


def text(request: Any, name: str) -> str:
    """Return a field of the request's form without white space around it; ``""``: none.

    Zope lets a browser send lists and records in the place of texts: those are none.
    """
    return as_typed(request, name).strip()


def as_typed(request: Any, name: str) -> str:
    """Return a field as `text` does, white space and all; what is no UTF-8 becomes ``?``."""
    value = request.form.get(name, "")
    return _encodable(value) if isinstance(value, str) else ""


def typed_title(request: Any) -> str:
    """Return the field ``title``.  Raises `InvalidSettings`: it would be markup in the ZMI."""
    title = text(request, "title")
    if "<" in title:
        raise InvalidSettings(f"title {title!r}: has a <, which Zope's own pages do not escape")
    return title


def texts(request: Any, name: str) -> list[str]:
    """Return a field that may be there several times, or have several lines."""
    value = request.form.get(name, ())
    values = value if isinstance(value, list | tuple) else str(value).splitlines()
    return [_encodable(each).strip() for each in values if isinstance(each, str) and each.strip()]


def _encodable(value: str) -> str:
    """Zope decodes bytes that are no UTF-8 to lone surrogates, which no page can show."""
    return value.encode("utf-8", "replace").decode("utf-8")


def _saying_problems(method: Method) -> Method:
    @wraps(method)
    def saying(self: Any, REQUEST: Any) -> Any:
        try:
            return method(self, REQUEST)
        except OutboxError as error:
            transaction.abort()
            REQUEST.response.setStatus(400)
            return render(_PROBLEM, self, REQUEST, problem=str(error))

    return saying
