"""`MailboxHost` in the ZMI: its form, how it replaces a MailHost and is undone, GenericSetup."""

from __future__ import annotations

import re

import pytest
import transaction

from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.testing import SMTPServer

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

from AccessControl.SecurityManagement import noSecurityManager
from Acquisition import aq_base
from OFS.Folder import Folder
from OFS.OrderedFolder import OrderedFolder
from Products.Five.component import enableSite
from Products.GenericSetup.tests.common import DummyExportContext, DummyImportContext
from Products.GenericSetup.tool import SetupTool, importToolset
from Products.GenericSetup.utils import exportObjects, importObjects
from Products.MailHost.interfaces import IMailHost
from Products.MailHost.MailHost import MailHost
from zExceptions import Unauthorized
from zope.component import getGlobalSiteManager
from zope.component.hooks import setSite
from zope.component.persistentregistry import PersistentComponents

from cpsmailaccess_delivery.zope.mailhost import MailboxHost

#: In the ZODB, where the stock MailHost keeps it; so not the one that other tests look for there.
PASSWORD = "the-old-password-of-the-mailhost"

ALICE, BOB = "alice@example.org", "bob@example.net"
HOSTILE = "<script>alert(1)</script>"
ADD = "manage_addProduct/cpsmailaccess_delivery.zope"


def alert(browser) -> str:
    found = re.search(
        r'<div class="alert[^>]*>\s*(.*?)\s*(?:\([\d: -]+\)\s*)?</div>', browser.contents, re.S
    )
    return " ".join(re.sub(r"<[^>]+>", "", found[1]).split()) if found else ""


def fill(browser, **texts):
    for name, value in texts.items():
        browser.getControl(name=name).value = value


def token_of(browser, url) -> str:
    browser.open(url)
    return re.search(
        r'name="form_token" value="(\w+)"|value="(\w+)" name="form_token"', browser.contents
    )[1]


@pytest.fixture
def components():
    """Local components; whatever site they made the current one, it is none afterwards."""
    yield PersistentComponents(bases=(getGlobalSiteManager(),))
    setSite()


@pytest.fixture
def site(zmi, tmp_path):
    """A folder whose MailHost has a login, a queue with a mail in it, and a role of its own."""
    queue = tmp_path / "old"
    for name in ("new", "cur", "tmp"):
        (queue / name).mkdir(parents=True)
    (queue / "new" / "1.2.host.3").write_bytes(b"X-Zope-From: a\n")
    with zmi.app() as app:
        app._setObject("site", OrderedFolder("site"))
        for id in ("first", "MailHost", "last"):
            app.site._setObject(id, Folder(id) if id != "MailHost" else MailHost(id))
        app.site.MailHost.manage_makeChanges(
            "Post & Co", "smtp.example.org", 587, "alice", PASSWORD, True, str(queue), True
        )
        app.site.MailHost.manage_addLocalRoles("admin", ["Owner"])
        app.site.MailHost.manage_permission("Use mailhost services", ["Manager"])
    return f"{zmi.url}/site"


def replace(zmi, site):
    browser = zmi.browser()
    browser.open(f"{site}/{ADD}/manage_addMailboxHostForm")
    browser.getControl("Add").click()
    return browser


def state_of(mailhost) -> dict:
    mailhost._p_activate()
    return dict(vars(aq_base(mailhost)))


# Replacing


def test_it_replaces_the_mailhost_and_is_put_back(zmi, site):
    with zmi.app() as app:
        before = state_of(app.site.MailHost)
    browser = replace(zmi, site)
    assert browser.url.startswith(f"{site}/MailHost/manage_main")
    assert alert(browser) == (
        "MailHost is a Mailbox Host now. 1 mail is left in its old queue: see below."
    )
    assert '<strong class="text-danger">' in browser.contents
    with zmi.app() as app:
        ours = app.site.MailHost
        assert type(aq_base(ours)) is MailboxHost
        assert state_of(ours) == {**before, "delivery_name": "Mail"}
        assert list(app.site.objectIds()) == ["first", "MailHost", "last"]
        assert app.site.objectIds("Mail Host") == ["MailHost"]
    browser.getControl("Put the stock MailHost back").click()
    assert alert(browser) == "MailHost is the MailHost of Products.MailHost again."
    with zmi.app() as app:
        assert type(aq_base(app.site.MailHost)) is MailHost
        assert state_of(app.site.MailHost) == before
        assert list(app.site.objectIds()) == ["first", "MailHost", "last"]
    browser.open(f"{site}/MailHost/manage_main")
    assert "smtp.example.org" in browser.contents


def test_undo_of_the_zodb(zmi, site):
    with zmi.app() as app:
        before = state_of(app.site.MailHost)
    replace(zmi, site)
    with zmi.app() as app:
        database = app._p_jar.db()
        (latest,) = database.undoLog(0, 1)
        assert latest["description"].endswith("/manage_addMailboxHost")
        assert PASSWORD not in str(database.undoLog(0, 100))
        database.undo(latest["id"])
    with zmi.app() as app:
        assert type(aq_base(app.site.MailHost)) is MailHost
        assert state_of(app.site.MailHost) == before


def test_a_local_utility_is_replaced_too(zmi, site, components):
    """As in Plone, whose IMailHost utility is its MailHost without acquisition."""
    with zmi.app() as app:
        enableSite(app.site)
        app.site.setSiteManager(components)
        app.site.getSiteManager().registerUtility(aq_base(app.site.MailHost), IMailHost)
    browser = replace(zmi, site)
    with zmi.app() as app:
        found = app.site.getSiteManager().getUtility(IMailHost)
        assert type(found) is MailboxHost
        assert found is aq_base(app.site.MailHost)
    browser.getControl("Put the stock MailHost back").click()
    with zmi.app() as app:
        found = app.site.getSiteManager().getUtility(IMailHost)
        assert type(found) is MailHost
        assert found is aq_base(app.site.MailHost)


def test_it_is_added_beside_others(zmi, site):
    browser = zmi.browser()
    browser.open(f"{site}/manage_main")
    assert "Mailbox Host" in browser.contents
    browser.open(f"{site}/{ADD}/manage_addMailboxHostForm")
    browser.getControl(name="replace").value = [""]
    fill(browser, id="post", title="The post")
    browser.getControl("Add").click()
    assert browser.url.startswith(f"{site}/manage_main")
    with zmi.app() as app:
        assert type(aq_base(app.site.post)) is MailboxHost
        assert type(aq_base(app.site.MailHost)) is MailHost
        assert app.site.post.title == "The post"
    browser.open(f"{site}/last/{ADD}/manage_addMailboxHostForm")
    assert "Replace" not in browser.contents, "there is none"


def test_what_cannot_be_replaced(zmi, site):
    browser = zmi.browser()
    token = token_of(browser, f"{site}/{ADD}/manage_addMailboxHostForm")
    browser.raiseHttpErrors = False
    for data in ("replace=first", f"replace={HOSTILE}", "replace=MailHost&delivery=nowhere"):
        data += "" if "delivery" in data else "&delivery=Mail"
        browser.post(f"{site}/{ADD}/manage_addMailboxHost", f"{data}&form_token={token}")
        assert browser.headers["status"].startswith("400"), data
        assert HOSTILE not in browser.contents
    with zmi.app() as app:
        assert type(aq_base(app.site.MailHost)) is MailHost
        assert type(aq_base(app.site.first)) is Folder


def test_mail_leaves_through_the_account_after_the_switch(zmi, site):
    with SMTPServer() as server:
        with transaction.manager:
            zmi.outbox.accounts.put(
                Account(mailbox=ALICE, host="127.0.0.1", port=server.port, security="plain")
            )
        replace(zmi, site)
        with zmi.app() as app:
            app.site.last.MailHost.send("x\n", BOB, ALICE, "Hi")  # acquired, as callers do
        zmi.outbox.processor().run(forever=False)
        (mail,) = server.mails
        assert (mail.sender, mail.recipients) == (ALICE, (BOB,))


# The form


@pytest.fixture
def ours(zmi, site):
    replace(zmi, site)
    return f"{site}/MailHost"


def test_settings(zmi, ours):
    browser = zmi.browser()
    browser.open(f"{ours}/manage_workspace")
    fill(browser, title="Post & Co", smtp_uid="bob")
    browser.getControl(name="immediate").value = ["queue"]
    browser.getControl(name="route_by_user").value = ["1"]
    browser.getControl("Save").click()
    assert alert(browser) == "Saved."
    assert HOSTILE not in browser.contents
    with zmi.app() as app:
        host = app.site.MailHost
        assert (host.title, host.immediate, host.route_by_user) == ("Post & Co", "queue", True)
        assert (host.smtp_uid, host.smtp_pwd, host.force_tls) == ("bob", PASSWORD, True)
        assert (host.smtp_queue, host.smtp_port) == (True, 587)
    browser.getControl(name="route_by_user").value = []
    browser.getControl("Save").click()
    with zmi.app() as app:
        assert app.site.MailHost.route_by_user is False


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"smtp_host": "evil.example.net"}, "the stored password is for smtp.example.org:587"),
        ({"smtp_port": "25"}, "the stored password is for smtp.example.org:587"),
        ({"force_tls": []}, "as securely as now"),
        ({"title": HOSTILE}, "which Zope's own pages do not escape"),
        ({"smtp_host": "not a host"}, "is no host name"),
        ({"smtp_port": "0"}, "whole number from 1 to 65535"),
        ({"smtp_port": "99999999999"}, "whole number from 1 to 65535"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_and_nothing_is_changed(zmi, ours, texts, words):
    with zmi.app() as app:
        before = state_of(app.site.MailHost)
    browser = zmi.browser()
    browser.open(f"{ours}/manage_main")
    fill(browser, **{"title": "Another", **texts})
    browser.raiseHttpErrors = False
    browser.getControl("Save").click()
    assert browser.headers["status"].startswith("400")
    assert words in alert(browser).replace("&#x27;", "'")
    assert HOSTILE not in browser.contents
    assert PASSWORD not in browser.contents
    with zmi.app() as app:
        assert state_of(app.site.MailHost) == before


def test_the_password_is_shown_nowhere_and_may_be_forgotten(zmi, ours, site, caplog):
    caplog.set_level("DEBUG")
    browser = zmi.browser()
    browser.open(f"{ours}/manage_main")
    assert "Its password: <strong>set</strong>" in browser.contents
    assert "password" not in [
        control.attrs.get("type")
        for control in browser.getForm(index=0).controls
        if hasattr(control, "attrs")
    ]
    seen = browser.contents
    for page in ("manage_access", "manage_UndoForm", "manage_propertiesForm", "smtp_pwd"):
        browser.raiseHttpErrors = False
        browser.open(f"{ours}/{page}")
        seen += str(browser.contents)
    browser.raiseHttpErrors = True
    browser.open(f"{ours}/manage_main")
    browser.getControl(name="forget_password").value = ["1"]
    fill(browser, smtp_host="smtp.example.net")
    browser.getControl("Save").click()
    seen += browser.contents
    assert "Its password: <strong>not set</strong>" in browser.contents
    assert PASSWORD not in seen + caplog.text
    with zmi.app() as app:
        assert (app.site.MailHost.smtp_pwd, app.site.MailHost.smtp_host) == ("", "smtp.example.net")


def test_restricted_code_does_not_read_the_password(zmi, ours):
    zmi.add_user("carol", "Manager")
    with zmi.app() as app:
        app.manage_addProduct["OFSP"].manage_addDTMLMethod(
            "steal", "", "<dtml-with site><dtml-with MailHost><dtml-var smtp_host>"
            "<dtml-var smtp_pwd></dtml-with></dtml-with>"
        )  # fmt: skip
    browser = zmi.browser("carol")
    browser.raiseHttpErrors = False
    browser.open(f"{zmi.url}/steal")
    assert PASSWORD not in str(browser.contents)


def test_its_relay_becomes_the_default_account(zmi, ours):
    browser = zmi.browser()
    browser.open(f"{ours}/manage_main")
    browser.getControl("Make this relay the default account").click()
    assert alert(browser).startswith("Added the default account.")
    account = zmi.outbox.vault.get("*")
    assert (account.relay, account.security) == ("smtp.example.org:587", "starttls")
    assert (account.username, account.password.reveal()) == ("alice", PASSWORD)
    assert "They leave through the default account" in browser.contents
    assert "Make this relay" not in browser.contents
    with zmi.app() as app:
        assert app.site.MailHost.smtp_pwd == PASSWORD, "for the way back; a form forgets it"


@pytest.mark.parametrize(
    ("settings", "security"),
    [
        ({}, "plain"),
        ({"force_tls": True}, "starttls"),
        ({"implicit_tls": True}, "tls"),
        ({"smtp_uid": "a", "smtp_pwd": "b"}, "starttls"),
        ({"smtp_uid": None, "smtp_pwd": None}, "plain"),
    ],
    ids=str,
)
def test_how_the_default_account_is_reached(zmi, ours, settings, security):
    with zmi.app() as app:
        host = app.site.MailHost
        host.smtp_uid = host.smtp_pwd = ""
        host.force_tls = False
        for name, value in settings.items():
            setattr(host, name, value)
    browser = zmi.browser()
    browser.open(f"{ours}/manage_main")
    browser.getControl("Make this relay the default account").click()
    assert zmi.outbox.accounts.get("*").security == security


# Who may, and how

ACTIONS = {
    "MailHost/manage_saveMailboxHost": "delivery=Mail&immediate=send&smtp_host=evil.example.net"
    "&smtp_port=25&forget_password=1",
    "MailHost/manage_makeDefaultAccount": "",
    "MailHost/manage_putStockBack": "",
    f"{ADD}/manage_addMailboxHost": "id=evil&delivery=Mail",
}


def nothing_has_changed(zmi):
    with zmi.app() as app:
        assert type(aq_base(app.site.MailHost)) is MailboxHost
        assert app.site.MailHost.smtp_host == "smtp.example.org"
        assert "evil" not in app.site.objectIds()
    assert zmi.outbox.accounts.list() == []


def test_every_change_needs_post_and_token(zmi, ours, site):
    browser = zmi.browser()
    token = token_of(browser, f"{ours}/manage_main")
    other = token_of(zmi.browser(), f"{ours}/manage_main")
    browser.raiseHttpErrors = False
    for name, data in ACTIONS.items():
        browser.open(f"{site}/{name}?{data}&form_token={token}")
        assert browser.headers["status"].startswith("404"), name
        for wrong in ("", "&form_token=", f"&form_token={other}"):
            browser.post(f"{site}/{name}", data + wrong)
            assert browser.headers["status"].startswith("403"), (name, wrong)
    nothing_has_changed(zmi)


def test_the_methods_of_the_stock_form_are_not_published(zmi, ours):
    browser = zmi.browser()
    token = token_of(browser, f"{ours}/manage_main")
    browser.raiseHttpErrors = False
    for data in (
        "manage_makeChanges?title=x&smtp_host=evil.example.net&smtp_port=25",
        "manage_restartQueueThread?action=start",
        "send?messageText=x&mto=a@example.net&mfrom=b@example.net",
        "_send",
    ):
        name, _, query = data.partition("?")
        browser.open(f"{ours}/{data}")
        assert browser.headers["status"][:3] in ("403", "404"), name
        browser.post(f"{ours}/{name}", f"{query}&form_token={token}")
        assert browser.headers["status"][:3] in ("403", "404"), name
    nothing_has_changed(zmi)
    assert list(zmi.outbox.spool.scan()) == []


@pytest.mark.parametrize("user", ["", "carol"])
def test_others_may_nothing(zmi, ours, site, user):
    zmi.add_user("carol", "Authenticated")
    browser = zmi.browser(user)
    browser.raiseHttpErrors = False
    for name in ("manage_main", "manage", "manage_workspace", "index_html", "", "queueLength"):
        browser.open(f"{ours}/{name}")
        assert browser.headers["status"][:3] in ("401", "403", "404"), name
        assert "smtp.example.org" not in str(browser.contents)
    for name, data in ACTIONS.items():
        browser.post(f"{site}/{name}", data)
        assert browser.headers["status"][:3] in ("401", "403", "404"), name
    nothing_has_changed(zmi)


def test_who_may_manage_accounts_but_not_delete_here_replaces_nothing(zmi, site):
    zmi.add_user("carol", "Site postmaster")
    with zmi.app() as app:
        app.site._addRole("Site postmaster")
        app.site.manage_permission("cpsmailaccess_delivery: Manage accounts", ["Site postmaster"])
    browser = zmi.browser("carol")
    token = token_of(browser, f"{site}/{ADD}/manage_addMailboxHostForm")
    browser.raiseHttpErrors = False
    browser.post(
        f"{site}/{ADD}/manage_addMailboxHost",
        f"replace=MailHost&delivery=Mail&form_token={token}",
    )
    assert browser.headers["status"][:3] in ("401", "403")
    with zmi.app() as app:
        assert type(aq_base(app.site.MailHost)) is MailHost


# GenericSetup


def test_export_and_import_without_secrets(zmi, ours):
    with zmi.app() as app:
        host = app.site.MailHost
        host.immediate, host.route_by_user, host.title = "queue", True, "Post"
        context = DummyExportContext(app.site)
        exportObjects(host, "", context)
        ((name, xml, _),) = context._wrote
        assert name == "mailhost.xml"
        text = xml.decode() if isinstance(xml, bytes) else xml
        assert PASSWORD not in text
        assert "smtp_pwd" not in text
        assert 'smtp_host="smtp.example.org"' in text

        app.site._setObject("other", MailboxHost("other"))
        context = DummyImportContext(app.site)
        context._files["mailhost.xml"] = xml
        importObjects(app.site.other, "", context)
        other = app.site.other
        for field in (
            *("smtp_host", "smtp_port", "smtp_uid", "smtp_queue", "smtp_queue_directory"),
            *("force_tls", "implicit_tls", "delivery_name", "immediate", "route_by_user"),
        ):
            assert getattr(other, field) == getattr(host, field), field
        assert other.smtp_pwd == ""


def test_import_of_what_a_stock_one_has_exported(zmi, ours):
    def imported(xml: bytes):
        context = DummyImportContext(app.site)
        context._files["mailhost.xml"] = xml
        importObjects(app.site.MailHost, "", context)
        return app.site.MailHost, context._notes

    with zmi.app() as app:
        host, _ = imported(b'<object name="MailHost" smtp_uid="alice" smtp_port="587"/>')
        assert host.smtp_pwd == PASSWORD, "nothing was said of it"
        host, notes = imported(
            b'<object name="MailHost" meta_type="Mail Host" smtp_host="evil.example.net"'
            b' smtp_port="25" smtp_pwd="given" smtp_uid=""/>'
        )
        assert (host.smtp_host, host.smtp_port, host.smtp_uid) == ("evil.example.net", 25, "")
        assert host.smtp_pwd == "", "the stored one was for another relay"
        assert any("smtp_pwd is not imported" in str(note) for note in notes)
        assert host.immediate == "send"
        before = state_of(host)
        with pytest.raises(ValueError, match="is one of send, queue"):
            imported(b'<object name="MailHost" smtp_host="x.example" immediate="never"/>')
        assert state_of(host) == before, "all of it, or nothing"
        noSecurityManager()
        with pytest.raises(Unauthorized):
            imported(b'<object name="MailHost" delivery_name="Others"/>')
        assert host.delivery_name == "Mail", "that is for whoever manages the whole site"


@pytest.mark.parametrize("implicit", [False, True])
def test_an_import_lets_no_password_leave_in_clear(zmi, ours, implicit):
    def imported(text: str):
        context = DummyImportContext(app.site)
        context._files["mailhost.xml"] = f'<object name="MailHost" {text}/>'.encode()
        importObjects(app.site.MailHost, "", context)
        return app.site.MailHost.smtp_pwd

    with zmi.app() as app:
        app.site.MailHost.implicit_tls = implicit
        assert imported('force_tls="True"') == PASSWORD
        assert imported('force_tls="False"') == (PASSWORD if implicit else "")
        assert imported('implicit_tls="False"') == ""


TOOLSET = """\
<?xml version="1.0"?>
<tool-setup><required tool_id="MailHost" class="{}"/></tool-setup>
"""


@pytest.mark.parametrize("profile", [MailHost, MailboxHost])
def test_the_toolset_of_a_profile_decides_the_class(zmi, ours, profile):
    """A trap of GenericSetup: another class is replaced; docs/zope.rst says how to keep ours."""
    with zmi.app() as app:
        app.site._setObject("setup", SetupTool("setup"))
        context = DummyImportContext(app.site, tool=app.site.setup)
        dotted = f"{profile.__module__}.{profile.__name__}"
        context._files["toolset.xml"] = TOOLSET.format(dotted).encode()
        importToolset(context)
        found = app.site.MailHost
        assert type(aq_base(found)) is profile
        assert (found.smtp_host == "smtp.example.org") is (profile is MailboxHost)


def test_in_a_browser_on_a_narrow_screen(zmi, site, chromium):
    with zmi.served() as root:
        page = chromium(root, viewport={"width": 360, "height": 640})
        page.goto(f"{root}/site/{ADD}/manage_addMailboxHostForm")
        page.get_by_label("Replace").select_option("MailHost")
        for step in ("Add", "Save", "Make this relay the default account"):
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 360, f"before {step} it is {wide} pixels wide"
            page.get_by_role("button", name=step, exact=True).click()
            page.locator(".alert").wait_for()
        assert PASSWORD not in page.content()
        page.reload()
        page.get_by_role("button", name="Put the stock MailHost back").click()
        page.get_by_text("is the MailHost of Products.MailHost again").wait_for()
    with zmi.app() as app:
        assert type(aq_base(app.site.MailHost)) is MailHost
