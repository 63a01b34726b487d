"""Who manages a part of the site gets no outbox there by what Zope lets him do with any object."""

from __future__ import annotations

from urllib.parse import urlencode

import pytest

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

from OFS.CopySupport import _cb_encode
from OFS.Moniker import Moniker
from webtest import TestApp

from cpsmailaccess_delivery.zope.mail_accounts import MailAccounts
from cpsmailaccess_delivery.zope.mailhost import MailboxHost
from zope_helpers import DELIVERY, errors_seen, token_of

COPY, MOVE = 0, 1


@pytest.fixture
def part(zmi):
    """A folder that somebody manages who manages nothing else, and another folder with objects."""
    zmi.add_user("local")
    with zmi.app() as app:
        for id in ("part", "other"):
            app.manage_addFolder(id)
        app.part.manage_setLocalRoles("local", ["Manager"])
        app.part.manage_addFolder("below")
        app.other._setObject("mail", MailAccounts("mail"))
        app._setObject("MailHost", MailboxHost("MailHost"))
        app.MailHost.smtp_uid, app.MailHost.smtp_pwd = "site", "s3cret"
    return zmi


def clipboard(zmi, operation: int, *path: str) -> str:
    """Return the cookie that names an object, as anybody can make it."""
    with zmi.app() as app:
        return _cb_encode((operation, [Moniker(app.unrestrictedTraverse(path)).dump()]))


def pasted(zmi, user: str, folder: str, cookie: str) -> str:
    browser = zmi.browser(user)
    with errors_seen(browser):
        browser.post(f"{zmi.url}/{folder}/manage_pasteObjects", urlencode({"cb_copy_data": cookie}))
    return browser.headers["status"][:3]


@pytest.mark.parametrize("path", [("mail",), ("other",), ("MailHost",)])
def test_a_clipboard_of_his_own_making(part, path):
    assert pasted(part, "local", "part", clipboard(part, COPY, *path)) == "401"
    with part.app() as app:
        assert app.part.objectIds() == ["below"]


@pytest.mark.parametrize("path", [("mail",), ("other",), ("MailHost",)])
def test_the_administrator_copies(part, path):
    assert pasted(part, "admin", "part", clipboard(part, COPY, *path)) == "200"
    with part.app() as app:
        assert set(app.part.objectIds()) == {"below", path[-1]}


def test_one_in_his_folder_stays_where_the_administrator_put_it(part):
    with part.app() as app:
        app.part._setObject("mail", MailAccounts("mail"))
        app.part.mail.manage_permission("cpsmailaccess_delivery: Manage accounts", ["Nobody"])
    assert pasted(part, "local", "part/below", clipboard(part, MOVE, "part", "mail")) == "401"
    browser = part.browser("local")
    browser.post(f"{part.url}/part/manage_renameObject", "id=mail&new_id=post")
    with part.app() as app:
        assert set(app.part.objectIds()) == {"below", "post"}
    assert pasted(part, "admin", "part/below", clipboard(part, MOVE, "part", "post")) == "200"


def test_webdav(part):
    browser = TestApp(part.wsgi)
    browser.authorization = ("Basic", ("local", "local"))
    for path in ("/mail", "/other", "/MailHost"):
        browser.request(
            path,
            method="COPY",
            headers={"Destination": "http://localhost/part/copied", "Depth": "infinity"},
            expect_errors=True,
        )
    with part.app() as app:
        assert app.part.objectIds() == ["below"]


@pytest.mark.parametrize("path", ["mail", "MailHost"])
def test_a_link_does_not_what_webdav_does(part, path):
    browser = part.browser()
    for name in ("DELETE", "LOCK", "UNLOCK", "COPY", "MOVE"):
        for call in (browser.open, lambda url: browser.post(url, "")):
            with errors_seen(browser):
                call(f"{part.url}/{path}/{name}")
            assert browser.headers["status"][:3] in ("404", "405"), name
    client = TestApp(part.wsgi)
    client.authorization = ("Basic", ("admin", "the administrator's password"))
    client.request(f"/{path}", method="DELETE", status=204)
    with part.app() as app:
        assert path not in app.objectIds()


def test_a_mailbox_host_for_the_outbox_of_others(part, tmp_path):
    import Zope2.App.zcml

    Zope2.App.zcml.load_string(DELIVERY.format(name="Others", path=tmp_path / "others"))
    with part.app() as app:
        app.part._setObject("mail", MailAccounts("mail"))
    add = f"{part.url}/part/manage_addProduct/cpsmailaccess_delivery.zope/manage_addMailboxHost"
    browser = part.browser("local")
    token = token_of(browser, f"{add}Form")
    for delivery, status in (("Others", "401"), ("Mail", "200")):
        with errors_seen(browser):
            browser.post(
                add, urlencode({"id": "MailHost", "delivery": delivery, "form_token": token})
            )
        assert browser.headers["status"][:3] == status
    with part.app() as app:
        assert app.part.MailHost.delivery_name == "Mail"
