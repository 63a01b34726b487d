"""Everything of ours that the Web can call is protected: found by looking.

Nothing is listed here: a method, a view or a class that is added tomorrow is tried, too.  What is
found: methods of our objects, the views of our ZCML with the methods below them, and what adds our
objects.  What our objects inherit from Zope is called as well.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode
from xml.etree import ElementTree

import pytest
import transaction

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

from AccessControl.class_init import InitializeClass
from AccessControl.PermissionRole import PermissionRole
from AccessControl.SecurityInfo import ClassSecurityInfo
from OFS.SimpleItem import Item
from Products.Five.browser import BrowserView
from ZPublisher import zpublish, zpublish_mark

import cpsmailaccess_delivery.zope
from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.interfaces import LaneNote
from cpsmailaccess_delivery.zope.mail_accounts import MailAccounts
from cpsmailaccess_delivery.zope.mailhost import MailboxHost
from cpsmailaccess_delivery.zope.page import Template, page
from cpsmailaccess_delivery.zope.security import MANAGE_QUEUE
from zope_helpers import token_of

OURS = "cpsmailaccess_delivery.zope"
ALICE = "alice@example.org"
SECRETS = ("bob@example.net", "secret plan", "s3cret")

#: Zope asks for it, of whoever sees a page of the ZMI, and it tells nothing.
PUBLIC = {"getBookmarkableURLs"}

#: Where the objects of our classes are in the site of the tests.
PLACES = {MailAccounts: "mail", MailboxHost: "MailHost"}

ADDING = f"manage_addProduct/{OURS}"


class Published(NamedTuple):
    """``path``: of an object or a view, or where things are added; ``name``: what is below it."""

    path: str
    name: str
    method: Any

    @property
    def by_its_user(self) -> bool:
        """Whether it is for users, each for his own, and not for managers."""
        return self.path.startswith("@@")

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"


def members(kind: Any) -> Iterator[Any]:
    """Yield what our modules define."""
    for found in pkgutil.iter_modules(cpsmailaccess_delivery.zope.__path__):
        module = importlib.import_module(f"{OURS}.{found.name}")
        for _, member in inspect.getmembers(module, kind):
            if member.__module__ == module.__name__:
                yield member


def views() -> dict[str, tuple[type, str, set[str]]]:
    """Return the views of our ZCML: class, permission and allowed attributes, by name."""
    found = {}
    for path in Path(cpsmailaccess_delivery.zope.__file__).parent.glob("*.zcml"):
        for element in ElementTree.parse(path).iter():
            if element.tag.rpartition("}")[2] in ("page", "view", "pages"):
                module, _, name = element.get("class", "").rpartition(".")
                cls = getattr(importlib.import_module(module, OURS), name)
                allowed = set((element.get("allowed_attributes") or "").split())
                found[element.get("name")] = cls, element.get("permission"), allowed
    return found


def methods(cls: type) -> dict[str, Any]:
    """Return what is callable and ours, by name; a template of a view has no address of its own."""
    found = {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_")}
    return {
        name: method
        for name, method in found.items()
        if callable(method)
        and (getattr(method, "__module__", "") or "").startswith(OURS)
        and not (issubclass(cls, BrowserView) and isinstance(method, Template))
    }


def published() -> Iterator[Published]:
    for cls, path in PLACES.items():
        for name, method in methods(cls).items():
            yield Published(path, name, method)
    for view, (cls, _, _) in views().items():
        for name, method in methods(cls).items():
            yield Published(f"@@{view}", name, method)
    for function in members(inspect.isfunction):
        yield Published(ADDING, function.__name__, function)


ACTIONS = [each for each in published() if zpublish_mark(each.method) == ("POST",)]
PAGES = [each for each in published() if zpublish_mark(each.method) is True]


def unprotected(cls: type) -> list[str]:
    """Return the methods that no permission protects, or whose publication nobody decided."""
    return [
        name
        for name, method in methods(cls).items()
        if name not in PUBLIC
        and not (
            isinstance(getattr(cls, f"{name}__roles__", None), PermissionRole)
            and zpublish_mark(method) is not None
        )
    ]


def unprotected_of_view(cls: type, allowed: set[str]) -> set[str]:
    """Return what the ZCML publishes and no decorator does, or the other way round."""
    marked = {name for name, method in methods(cls).items() if zpublish_mark(method) is not None}
    return marked ^ allowed


# What is found, and what is not


def test_the_classes_are_known():
    found = {each for each in members(inspect.isclass) if issubclass(each, Item)}
    assert found - {Template} == set(PLACES)
    shown = {each for each in members(inspect.isclass) if issubclass(each, BrowserView)}
    assert {each for each in shown if "__call__" in vars(each)} == {
        cls for cls, _, _ in views().values()
    }


def test_there_is_something_to_find():
    assert {each.path for each in ACTIONS} == {"mail", "MailHost", ADDING} | {
        f"@@{view}" for view in views()
    }
    assert {each.path for each in PAGES} >= {"mail", "MailHost", ADDING, "@@my-outbox"}


@pytest.mark.parametrize("cls", PLACES)
def test_all_methods_of_objects_are_protected(cls):
    assert unprotected(cls) == []
    marks = {name: zpublish_mark(method) for name, method in methods(cls).items()}
    assert {name for name, mark in marks.items() if mark not in (("POST",), True, False)} == (
        PUBLIC & set(marks)
    ), "published for something else than GET, or POST alone"


@pytest.mark.parametrize("view", views())
def test_all_methods_of_views_are_protected(view):
    cls, permission, allowed = views()[view]
    assert permission.startswith("cpsmailaccess_delivery.")
    assert unprotected_of_view(cls, allowed) == set()
    marks = [zpublish_mark(getattr(cls, name)) for name in allowed]
    assert all(mark in (("POST",), True) for mark in marks)


def test_what_is_not_protected_is_found():
    class Careless(MailAccounts):
        security = ClassSecurityInfo()

        @page
        def manage_page(self, REQUEST):
            """Without a permission."""

        @zpublish(methods="POST")
        def manage_action(self, REQUEST):
            """Without a permission."""

        @security.public
        @page
        def manage_public(self, REQUEST):
            """For everybody."""

        @security.protected(MANAGE_QUEUE)
        def manage_undecided(self, REQUEST):
            """By its docstring."""

    for method in vars(Careless).values():
        if callable(method):
            method.__module__ = OURS
    InitializeClass(Careless)
    assert unprotected(Careless) == [
        "manage_action",
        "manage_page",
        "manage_public",
        "manage_undecided",
    ]


def test_what_is_not_protected_in_a_view_is_found():
    class Careless(BrowserView):
        @page
        def reached_by_nobody(self, REQUEST):
            """Not in the ZCML."""

        def undecided(self, REQUEST):
            """In the ZCML, and it asks for nothing."""

    for method in vars(Careless).values():
        if callable(method):
            method.__module__ = OURS
    assert unprotected_of_view(Careless, {"undecided"}) == {"reached_by_nobody", "undecided"}


# What happens when they are called


@pytest.fixture
def site(zmi):
    """A site with a mail, an account and a lane in trouble: whatever an action may change."""
    with transaction.manager:
        account = Account(
            mailbox=ALICE, host="127.0.0.1", port=1, security="plain", owner="/acl_users:alice"
        )
        zmi.outbox.accounts.put(account)
    with transaction.manager:
        zmi.outbox.delivery.send(ALICE, ["bob@example.net"], b"Subject: secret plan\r\n\r\nx\r\n")
    (entry,) = zmi.outbox.queue.entries()
    note = LaneNote(ALICE, "login", "535 no", 1.0, 2e9, paused=True)
    zmi.outbox.spool.note_lane(entry.lane, note)
    with zmi.app() as app:
        app._setObject("MailHost", MailboxHost("MailHost"))
        app.MailHost.smtp_uid, app.MailHost.smtp_pwd = "site", "s3cret"
    for user in ("alice", "carol"):
        zmi.add_user(user)
    return zmi


def data(site) -> str:
    """Return what makes every action do something, if it is let."""
    (entry,) = site.outbox.queue.entries()
    return urlencode(
        {
            "ids:list": entry.id,
            "id": entry.id,
            "lane_key": entry.lane,
            "mailbox": ALICE,
            "mailboxes:list": ALICE,
            "existing": ALICE,
            "host": "127.0.0.1",
            "port": "2",
            "security": "plain",
            "delivery": "Mail",
            "title": "evil",
            "domains": "evil.example.net",
            "sender": ALICE,
            "recipient": "eve@example.net",
            "to": "eve@example.net",
            "subject": "evil",
            "text": "evil",
            "immediate": "queue",
            "smtp_host": "evil.example.net",
            "smtp_port": "26",
            "forget_password": "1",
            "message_id": site.outbox.queue.find(entry)[0].envelope.message_id,
        }
    )


def state(site) -> object:
    outbox = site.outbox
    with site.app() as app:
        for id in PLACES.values():
            app._getOb(id)._p_activate()
        kept = (
            [
                {
                    name: repr(value)
                    for name, value in vars(app._getOb(id)).items()
                    if name != "_EtagSupport__etag"  # WebDAV's, made when it is asked for
                }
                for id in PLACES.values()
            ],
            app.objectIds(),
        )
    return (
        list(outbox.queue.entries()),
        outbox.accounts.list(),
        outbox.spool.lane_notes(),
        [processor.ident for processor in outbox.processors],
        kept,
    )


def form_of(site, user: str) -> str:
    """Return the URL of a page with a form that the user may see."""
    return f"{site.url}/{'@@my-mailboxes/edit' if user != 'admin' else 'mail/manage_account'}"


def browser_of(site, user: str) -> Any:
    browser = site.browser(user)
    browser.raiseHttpErrors = False
    return browser


def shows_a_secret(browser: Any) -> bool:
    contents = browser.contents or ""
    if isinstance(contents, bytes):
        contents = contents.decode("utf-8", "replace")
    return any(secret in contents for secret in SECRETS)


@pytest.mark.parametrize("called", ACTIONS, ids=str)
def test_every_action(site, called):
    """By POST alone, with the token of this browser and this user, by those who may."""
    user = "alice" if called.by_its_user else "admin"
    url, above = f"{site.url}/{called}", f"{site.url}/{called.path}"
    sent, before = data(site), state(site)
    browser = browser_of(site, user)
    token = token_of(browser, form_of(site, user))
    carols = browser_of(site, "carol")
    hers = token_of(carols, form_of(site, "carol"))
    elsewhere = token_of(site.browser(user), form_of(site, user))
    for query in (f"{url}?{sent}&form_token={token}", f"{above}?{called.name}:method=1&{sent}"):
        browser.open(query)
        assert browser.headers["status"][:3] in ("404", "405"), query
    for wrong in ("", "&form_token=", f"&form_token={hers}", f"&form_token={elsewhere}",
                  f"&form_token:list={token}"):  # fmt: skip
        browser.post(url, sent + wrong)
        assert browser.headers["status"].startswith("403"), wrong
        browser.post(above, f"{called.name}:method=1&{sent}{wrong}")
        assert browser.headers["status"].startswith("403"), wrong
    for stranger in (browser_of(site, ""), carols):
        for given in (token, hers):
            stranger.post(url, f"{sent}&form_token={given}")
            allowed = ("400", "200") if called.by_its_user and given == hers else ()
            assert stranger.headers["status"][:3] in ("401", "403", "404", *allowed)
            assert not shows_a_secret(stranger)
    assert [entry.id for entry in site.outbox.queue.entries()] == [before[0][0].id]
    assert state(site) == before


@pytest.mark.parametrize("called", ACTIONS, ids=str)
def test_it_was_the_token_that_was_missing(site, called):
    user = "alice" if called.by_its_user else "admin"
    browser = browser_of(site, user)
    token = token_of(browser, form_of(site, user))
    browser.followRedirects = False
    browser.post(f"{site.url}/{called}", f"{data(site)}&form_token={token}")
    assert browser.headers["status"][:3] in ("200", "303", "400"), browser.contents


@pytest.mark.parametrize("called", PAGES, ids=str)
def test_every_page(site, called):
    """For those who may, and it changes nothing, whatever it is sent."""
    url, sent, before = f"{site.url}/{called}", data(site), state(site)
    for user in ("", "carol"):
        stranger = browser_of(site, user)
        allowed = ("200", "400") if called.by_its_user and user else ()
        for call in (lambda b: b.open(f"{url}?{sent}"), lambda b: b.post(url, sent)):
            call(stranger)
            assert stranger.headers["status"][:3] in ("401", "403", "404", *allowed), user
            assert not shows_a_secret(stranger)
    browser = browser_of(site, "alice" if called.by_its_user else "admin")
    for call in (lambda: browser.open(f"{url}?{sent}"), lambda: browser.post(url, sent)):
        call()
        assert browser.headers["status"][:3] in ("200", "400"), browser.contents
        assert "Traceback" not in str(browser.contents)
        assert "s3cret" not in str(browser.contents)
    assert state(site) == before


@pytest.mark.parametrize("view", views())
def test_every_view(site, view):
    """For those who are logged in, each about his own; nothing else of it has an address."""
    cls, _, allowed = views()[view]
    url, before = f"{site.url}/@@{view}", state(site)
    anonymous, carol, alice = (browser_of(site, user) for user in ("", "carol", "alice"))
    for call in (lambda b: b.open(f"{url}?{data(site)}"), lambda b: b.post(url, data(site))):
        call(anonymous)
        assert anonymous.headers["status"].startswith("401")
        call(carol)
        assert carol.headers["status"].startswith("200")
        assert not shows_a_secret(carol)
        call(alice)
        assert alice.headers["status"].startswith("200")
    for name in {*dir(cls), "context", "request", "__name__", "index_html"} - allowed:
        alice.open(f"{url}/{name}")
        assert alice.headers["status"][:3] in ("401", "403", "404"), name
    assert state(site) == before


@pytest.mark.parametrize("cls", PLACES)
def test_a_link_changes_nothing(site, cls):
    """To whatever an object has, that of Zope too; and strangers see nothing by one."""
    before, users = state(site), ("admin", "carol", "")
    browsers = [browser_of(site, user) for user in users]
    for browser in browsers:
        browser.followRedirects = False
    for name in dir(cls):
        for user, browser in zip(users, browsers, strict=True):
            with suppress(KeyError):  # pages of Zope that lack a field
                browser.open(f"{site.url}/{PLACES[cls]}/{name}?{data(site)}")
                assert "s3cret" not in str(browser.contents), name
                assert user == "admin" or not shows_a_secret(browser), name
        assert state(site) == before, name
