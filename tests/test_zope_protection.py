"""Every method of *Mail accounts* that the Web can call is protected: found by looking.

Nothing is listed here: a method that is added tomorrow is tried, too.
"""

from __future__ import annotations

import re
from urllib.parse import urlencode

import pytest
import transaction

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

from AccessControl.class_init import InitializeClass
from AccessControl.PermissionRole import PermissionRole, rolesForPermissionOn
from AccessControl.SecurityInfo import ClassSecurityInfo
from ZPublisher import zpublish, zpublish_mark

from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.interfaces import LaneNote
from cpsmailaccess_delivery.zope.mail_accounts import MailAccounts
from cpsmailaccess_delivery.zope.page import page
from cpsmailaccess_delivery.zope.security import MANAGE_QUEUE

OURS = "cpsmailaccess_delivery.zope"
ALICE = "alice@example.org"

#: Zope asks for it, of whoever sees a page of the ZMI, and it tells nothing.
PUBLIC = {"getBookmarkableURLs"}


def methods(cls: type) -> dict[str, object]:
    """Return what is callable and ours, by name."""
    found = {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_")}
    return {
        name: method
        for name, method in found.items()
        if callable(method) and (getattr(method, "__module__", "") or "").startswith(OURS)
    }


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


def actions(cls: type) -> list[str]:
    return [name for name, method in methods(cls).items() if zpublish_mark(method) == ("POST",)]


def pages(cls: type) -> list[str]:
    return [name for name, method in methods(cls).items() if zpublish_mark(method) is True]


def for_managers(name: str) -> bool:
    """Whether only managers may by default."""
    permission = getattr(MailAccounts, f"{name}__roles__").__name__
    return set(rolesForPermissionOn(permission, MailAccounts("mail"))) <= {"Manager", "Owner"}


def test_all_of_them_are_protected():
    assert unprotected(MailAccounts) == []
    assert set(methods(MailAccounts)) == {
        *actions(MailAccounts),
        *pages(MailAccounts),
        *PUBLIC,
    }, "published for something else than GET, or POST alone"


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


@pytest.fixture
def site(zmi):
    """A site with a mail, an account and a lane in trouble: whatever an action may change."""
    with transaction.manager:
        zmi.outbox.accounts.put(Account(mailbox=ALICE, host="smtp.example.org"))
    with transaction.manager:
        zmi.outbox.delivery.send(ALICE, ["bob@example.net"], b"Subject: secret plan\r\n\r\nx\r\n")
    (entry,) = zmi.outbox.queue.entries()
    note = LaneNote(ALICE, "login", "535 no", 1.0, 2e9, paused=True)
    zmi.outbox.spool.note_lane(entry.lane, note)
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
            "host": "evil.example.net",
            "delivery": "Mail",
            "title": "evil",
            "domains": "evil.example.net",
            "sender": ALICE,
            "recipient": "eve@example.net",
            "to": "eve@example.net",
            "subject": "evil",
            "text": "evil",
            "message_id": site.outbox.queue.find(entry)[0].envelope.message_id,
        }
    )


def state(site) -> object:
    outbox = site.outbox
    with site.app() as app:
        kept = app.mail.title, app.mail._policy, app.mail.delivery_name
    return (
        list(outbox.queue.entries()),
        outbox.accounts.list(),
        outbox.spool.lane_notes(),
        [processor.ident for processor in outbox.processors],
        kept,
    )


def token_of(browser, url) -> str:
    browser.open(url)
    return re.search(r'name="form_token" value="(\w+)"|value="(\w+)" name="form_token"',
                     browser.contents)[1]  # fmt: skip


@pytest.mark.parametrize("name", actions(MailAccounts))
def test_every_action(site, name):
    """By POST alone, with the token of this browser and this user, by those who may."""
    site.add_user("eve", "Manager")
    site.add_user("carol", "Authenticated")
    url, sent = f"{site.url}/mail/{name}", data(site)
    form = f"{site.url}/mail/manage_account"
    before = state(site)
    browser = site.browser()
    browser.raiseHttpErrors = False
    token = token_of(browser, form)
    hers, elsewhere = token_of(site.browser("eve"), form), token_of(site.browser(), form)
    for query in (f"{url}?{sent}&form_token={token}", f"{site.url}/mail?{name}:method=1&{sent}"):
        browser.open(query)
        assert browser.headers["status"][:3] in ("404", "405"), query
    for wrong in ("", "&form_token=", f"&form_token={hers}", f"&form_token={elsewhere}",
                  f"&form_token:list={token}"):  # fmt: skip
        browser.post(url, sent + wrong)
        assert browser.headers["status"].startswith("403"), wrong
        browser.post(f"{site.url}/mail", f"{name}:method=1&{sent}{wrong}")
        assert browser.headers["status"].startswith("403"), wrong
    for user in ("", "carol") if for_managers(name) else ("",):
        stranger = site.browser(user)
        stranger.raiseHttpErrors = False
        stranger.post(url, f"{sent}&form_token={token}")
        assert stranger.headers["status"][:3] in ("401", "403", "404"), user
    assert state(site) == before


@pytest.mark.parametrize("name", pages(MailAccounts))
def test_every_page(site, name):
    """For those who may, and it changes nothing, whatever it is sent."""
    site.add_user("carol", "Authenticated")
    url, sent = f"{site.url}/mail/{name}", data(site)
    before = state(site)
    for user in ("", "carol") if for_managers(name) else ("",):
        stranger = site.browser(user)
        stranger.raiseHttpErrors = False
        for call in (lambda b: b.open(f"{url}?{sent}"), lambda b: b.post(url, sent)):
            call(stranger)
            assert stranger.headers["status"][:3] in ("401", "403", "404"), user
            assert "bob@example.net" not in str(stranger.contents)
            assert "secret plan" not in str(stranger.contents)
    browser = site.browser()
    browser.raiseHttpErrors = False
    for call in (lambda: browser.open(f"{url}?{sent}"), lambda: browser.post(url, sent)):
        call()
        assert browser.headers["status"][:3] in ("200", "400"), browser.contents
        assert "Traceback" not in str(browser.contents)
    assert state(site) == before


def test_it_was_the_token_that_was_missing(site):
    browser = site.browser()
    token = token_of(browser, f"{site.url}/mail/manage_account")
    browser.post(f"{site.url}/mail/manage_holdMails", f"{data(site)}&form_token={token}")
    (entry,) = site.outbox.queue.entries()
    assert entry.state == "held"
