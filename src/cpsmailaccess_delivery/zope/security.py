"""Who may do what: permissions, the owner of an account, the token of every form."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any, Final

from AccessControl import getSecurityManager
from AccessControl.Permission import addPermission
from Acquisition import aq_base, aq_chain, aq_inner, aq_parent
from zExceptions import Forbidden, Unauthorized
from zope.component import getUtilitiesFor

from ..errors import InvalidAccount, VaultError
from ..interfaces import IOutbox

MANAGE_ACCOUNTS: Final = "cpsmailaccess_delivery: Manage accounts"
MANAGE_QUEUE: Final = "cpsmailaccess_delivery: Manage queue"
USE_OWN_ACCOUNTS: Final = "cpsmailaccess_delivery: Use own accounts"
SEND_MAIL: Final = "cpsmailaccess_delivery: Send mail"
#: To send as a mailbox that is the site's: of everybody, unless the Security tab says otherwise.
SEND_AS_SITE: Final = "cpsmailaccess_delivery: Send as the site"

# As configure.zcml says; here, too, because class declarations are read before it.
for _permission in (MANAGE_ACCOUNTS, MANAGE_QUEUE):
    addPermission(_permission, ("Manager",))
for _permission in (USE_OWN_ACCOUNTS, SEND_MAIL):
    addPermission(_permission, ("Authenticated", "Manager"))
addPermission(SEND_AS_SITE, ("Anonymous", "Manager"))

#: The field of a form that holds its token, and the cookie that the token belongs to.
FORM_FIELD: Final = "form_token"
_COOKIE: Final = "cpsmail_forms"

#: Of this process, where there is no outbox whose key all processes share.
_OWN_KEY: Final = secrets.token_bytes(32)


def owner_of(user: Any) -> str:
    """Return a user as `Account.owner` says it: the path of his user folder, ``:``, his id.

    Two folders may have users of one name, and those are two people.  ``""``: nobody.
    """
    user_id, folder = user.getId(), aq_parent(aq_inner(user))
    if not user_id or folder is None:
        return ""
    return f"{'/'.join(folder.getPhysicalPath())}:{user_id}"


def current_owner() -> str:
    """Return the user who is logged in, see `owner_of`; ``""``: anonymous."""
    return owner_of(getSecurityManager().getUser())


def typed_owner(context: Any, typed: str) -> str:
    """Return the owner that an administrator has typed, as `owner_of` says it; ``""``: the site.

    `context`: from where the user folders are looked for in which a name alone may be.  Raises
    `InvalidAccount` when there is no such user: nobody could send through the account.
    """
    path, colon, user_id = typed.partition(":")
    if not typed:
        return ""
    if colon:
        place = context.getPhysicalRoot().unrestrictedTraverse(path, None) if path else None
        folders = [] if place is None else [place]
        where = f"{path or '/'} has no user {user_id}"
    else:
        user_id, where = typed, "no user folder from here up has a user of this id"
        parents = [
            each for each in aq_chain(aq_inner(context)) if hasattr(aq_base(each), "acl_users")
        ]
        folders = [each.acl_users for each in parents]
    for folder in folders:
        find = getattr(aq_base(folder), "getUserById", None)
        user = folder.getUserById(user_id) if find is not None else None
        if user is not None:
            return f"{'/'.join(folder.getPhysicalPath())}:{user.getId()}"
    raise InvalidAccount(
        f"owner {typed!r}: {where}: give the id of one, or, of a user folder elsewhere,"
        " /path/acl_users:id"
    )


def check_manages_site(context: Any) -> None:
    """Refuse whoever manages a part of the site only: an outbox is of the whole of it.

    `context`: any object in the tree.  Raises `Unauthorized`.
    """
    if not getSecurityManager().checkPermission(MANAGE_ACCOUNTS, context.getPhysicalRoot()):
        raise Unauthorized(
            "Which outbox an object shows, and its default account, is decided by whoever may"
            " manage the accounts of the whole site. Ask him to add the object for you."
        )


def form_token(request: Any) -> str:
    """Return the token of the forms of this browser and user; sets the cookie when missing."""
    browser = _browser(request)
    if not browser:
        browser = secrets.token_urlsafe(24)
        request.cookies[_COOKIE] = browser  # for the next form in the same page
        secure = request.get("SERVER_URL", "").startswith("https:")
        request.response.setCookie(
            _COOKIE, browser, path="/", http_only=True, same_site="Strict", secure=secure
        )
    return _token(browser)


def check_token(request: Any) -> None:
    """Refuse a form that this browser and user were not shown.  Raises `Forbidden`."""
    browser, given = _browser(request), request.form.get(FORM_FIELD)
    if not browser or not isinstance(given, str):
        given, browser = "", "none"
    if not hmac.compare_digest(given.encode("utf-8", "replace"), _token(browser).encode()):
        raise Forbidden(
            "This form is not one that was shown to you here, or it is out of date. Nothing was"
            " changed: go back, load the page again, and send it again."
        )


def _browser(request: Any) -> str:
    value = request.cookies.get(_COOKIE, "")
    return value if isinstance(value, str) else ""


def _token(browser: str) -> str:
    """Bound to the user: whoever can plant a cookie has no token of somebody else."""
    text = f"{browser}\0{current_owner()}"
    return hmac.new(_key(), text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def _key() -> bytes:
    """Derived from the key of the vault, which all processes of the site share."""
    for _, outbox in sorted(getUtilitiesFor(IOutbox)):
        try:
            key = outbox.keys.load()
            if key is None and not any(True for _ in outbox.vault.accounts()):
                key = outbox.keys.make()  # as the first account would
        except VaultError:
            continue  # which the accounts page says
        if key is not None:
            return hmac.digest(key.reveal(), b"cpsmailaccess_delivery forms", "sha256")
    return _OWN_KEY
