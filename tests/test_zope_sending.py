"""Who may send as which mailbox: asked of the code that runs, whatever way it chose the mailbox."""

from __future__ import annotations

import pytest
import transaction
from zope.component import getGlobalSiteManager, getUtility
from zope.interface.verify import verifyObject

from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.interfaces import IMailDelivery, ISendingPolicy

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

from AccessControl.SecurityManagement import newSecurityManager, noSecurityManager
from AccessControl.users import system
from OFS.SimpleItem import SimpleItem
from zExceptions import Unauthorized
from ZPublisher import zpublish

from zope_helpers import errors_seen, own_account, put

ALICE, BOB, SITE = "alice@example.org", "bob@example.org", "info@example.org"
TO = ["carol@example.net"]


class Refusing:
    def __init__(self, *refused):
        self.refused, self.asked = refused, []

    def check(self, account, queue_path):
        self.asked.append(account and account.mailbox)
        if self.asked[-1] in self.refused:
            raise PermissionError(self.asked[-1])


@pytest.fixture
def policy():
    """One that refuses bob's, in an application without Zope."""
    made, manager = Refusing(BOB, None), getGlobalSiteManager()
    manager.registerUtility(made, ISendingPolicy)
    yield made
    manager.unregisterUtility(made, ISendingPolicy)


@pytest.fixture
def outbox_of_two(outbox, account):
    with transaction.manager:
        for mailbox in (ALICE, BOB, "@example.com", "*"):
            outbox.accounts.put(account.replace(mailbox=mailbox))
    return outbox


def text(author=ALICE) -> bytes:
    return b"From: " + author.encode() + b"\nSubject: x\n\nx\n"


@pytest.mark.parametrize(
    ("sender", "message", "options"),
    [
        (BOB, text(), {}),
        ("BOB@Example.ORG", text(), {}),
        (ALICE, text(), {"mailbox": BOB}),
        ("", text(), {"mailbox": BOB}),
        (BOB, text(), {"mailbox": "*"}),
        (BOB, text(), {"mailbox": ALICE}),
        (ALICE, text(BOB), {}),
        (ALICE, text(f"{ALICE}\nSender: Bob <{BOB}>"), {}),
        (ALICE, text(), {"hostname": "relay.example"}),
    ],
)
def test_every_way_to_be_somebody_is_asked(outbox_of_two, policy, sender, message, options):
    with pytest.raises(PermissionError), transaction.manager:
        outbox_of_two.delivery.send(sender, TO, message, **options)
    assert list(outbox_of_two.spool.scan()) == []


def test_bound_ones_are_asked(outbox_of_two, policy):
    with pytest.raises(PermissionError), transaction.manager:
        outbox_of_two.delivery.bind(BOB).send(ALICE, TO, text())


def test_what_is_asked(outbox_of_two, policy):
    with transaction.manager:
        outbox_of_two.delivery.send(ALICE, TO, text("x@example.com, y@nowhere.example, bad@"))
    assert policy.asked == [ALICE, "@example.com"], "each once; nobody's address is not asked for"
    policy.asked.clear()
    with transaction.manager:
        outbox_of_two.delivery.send("y@nowhere.example", TO, text("y@nowhere.example"))
    assert policy.asked == ["*"]


def test_without_a_policy_everybody_may(outbox_of_two):
    with transaction.manager:
        assert outbox_of_two.delivery.send(BOB, TO, text())


# In Zope


class Sender(SimpleItem):
    """Code of a site that looks the utility up, as any does."""

    def __init__(self, id):
        self.id = id

    @zpublish
    def send(self, sender, author, mailbox=""):
        """Send."""
        delivery = getUtility(IMailDelivery, "Mail")
        return delivery.send(sender, TO, text(author), **({"mailbox": mailbox} if mailbox else {}))


@pytest.fixture
def site(zmi):
    for name, *roles in (("alice",), ("bob",), ("eve", "Manager")):
        zmi.add_user(name, *roles)
    own_account(zmi, ALICE, "alice")
    own_account(zmi, BOB, "bob")
    put(
        zmi,
        Account(mailbox=SITE, host="127.0.0.1", security="plain"),
        Account(mailbox="*", host="127.0.0.1", security="plain"),
    )
    with zmi.app() as app:
        app._setObject("sender", Sender("sender"))
        app.manage_addFolder("folder")
        app.folder._setObject("sender", Sender("sender"))
    return zmi


def sends(zmi, user, sender, author=None, mailbox="", place="") -> bool:
    """Tell whether it is queued; if not it is `Unauthorized`, and nothing is."""
    before = len(list(zmi.outbox.spool.scan()))
    browser = zmi.browser(user)
    with errors_seen(browser):
        query = f"sender={sender}&author={author or sender}&mailbox={mailbox}"
        browser.open(f"{zmi.url}{place}/sender/send?{query}")
    status = browser.headers["status"][:3]
    assert status in ("200", "401"), browser.contents
    assert len(list(zmi.outbox.spool.scan())) - before == (status == "200")
    return status == "200"


def test_the_policy(site):
    assert verifyObject(ISendingPolicy, getUtility(ISendingPolicy))


@pytest.mark.parametrize("user", ["", "alice", "bob", "eve"])
def test_who_may_send_as_whom(site, user):
    owners = {"alice": (ALICE,), "bob": (BOB,), "eve": (ALICE, BOB)}.get(user, ())
    for mailbox in (ALICE, BOB):
        assert sends(site, user, mailbox) == (mailbox in owners)
        assert sends(site, user, SITE, mailbox=mailbox) == (mailbox in owners)
        assert sends(site, user, mailbox, mailbox="*") == (mailbox in owners)
        assert sends(site, user, SITE, author=mailbox) == (mailbox in owners)
    assert sends(site, user, SITE), "the site's are for everybody who can call the code"
    assert sends(site, user, "x@example.net")


def test_the_site_s_mailboxes_may_be_for_some(site):
    with site.app() as app:
        app.mail.manage_permission("cpsmailaccess_delivery: Send as the site", ["Authenticated"])
    assert not sends(site, "", SITE)
    assert not sends(site, "", "x@example.net", place="/folder"), "wherever the code is"
    assert sends(site, "bob", SITE)
    assert sends(site, "eve", SITE)


def test_another_user_folder_has_other_people(site):
    """A user of the same id, and a Manager of a folder, are nobody here."""
    with site.app() as app:
        app.folder.manage_addProduct["OFSP"].manage_addUserFolder()
        app.folder.acl_users._doAddUser("alice", "alice", ["Manager"], [])
    assert not sends(site, "alice", ALICE, place="/folder")
    assert sends(site, "alice", SITE, place="/folder")


def test_local_managers_are_none(site):
    with site.app() as app:
        app.folder.manage_setLocalRoles("bob", ["Manager"])
    assert not sends(site, "bob", ALICE, place="/folder")


def test_code_that_runs_for_nobody_is_the_site_s(site):
    with transaction.manager:
        assert site.outbox.delivery.send(BOB, TO, text(BOB))


def test_a_script_that_takes_a_user_on_is_him(site):
    with site.app() as app:
        try:
            newSecurityManager(None, app.acl_users.getUser("alice").__of__(app.acl_users))
            with pytest.raises(Unauthorized), transaction.manager:
                site.outbox.delivery.send(BOB, TO, text(BOB))
            with transaction.manager:
                assert site.outbox.delivery.send(ALICE, TO, text(ALICE))
            newSecurityManager(None, system)  # zconsole run
            with transaction.manager:
                assert site.outbox.delivery.send(BOB, TO, text(BOB))
        finally:
            noSecurityManager()
