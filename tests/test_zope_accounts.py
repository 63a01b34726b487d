"""The *Mail accounts* object in the ZMI: its forms, its permissions, what it never shows."""

from __future__ import annotations

import re

import pytest
import transaction

from conftest import PASSWORD
from cpsmailaccess_delivery import Account, State
from cpsmailaccess_delivery.errors import NoSuchAccount
from cpsmailaccess_delivery.testing import SMTPServer

HOSTILE = "<script>alert(1)</script>"

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

from cpsmailaccess_delivery.zope.security import typed_owner  # noqa: E402
from zope_helpers import ALICE, alert, errors_seen, fill, put, relay_account, token_of  # noqa: E402


def edit(zmi, mailbox=ALICE):
    """Return a browser with the form of an account."""
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_account?mailbox={mailbox}")
    return browser


# Adding the object


def test_it_is_added_in_the_zmi(zmi):
    browser = zmi.browser()
    browser.open(f"{zmi.url}/manage_main")
    assert "Mail accounts" in browser.contents
    browser.open(
        f"{zmi.url}/manage_addProduct/cpsmailaccess_delivery.zope/manage_addMailAccountsForm"
    )
    fill(browser, id="post", title="The post")
    browser.getControl("Add").click()
    assert browser.url.startswith(f"{zmi.url}/manage_main")
    assert "The post" in browser.contents
    assert "fas fa-envelope-open-text" in browser.contents, "else it is shown as a broken object"
    assert "Broken object" not in browser.contents
    browser.open(f"{zmi.url}/post/manage_main")
    assert "There is no account yet" in browser.contents


@pytest.mark.parametrize("form", ["manage_addMailAccountsForm", "manage_addMailboxHostForm"])
def test_the_form_fits_the_dialog_of_the_zmi(zmi, form):
    browser = zmi.browser()
    url = f"{zmi.url}/manage_addProduct/cpsmailaccess_delivery.zope/{form}"
    browser.open(f"{url}?zmi_dialog=modal")
    assert "navbar" not in browser.contents, "a page in a page"
    assert "<html" not in browser.contents
    browser.open(url)
    assert "<html" in browser.contents


def test_who_manages_a_folder_cannot_show_an_outbox_there(zmi):
    zmi.add_user("local")
    with zmi.app() as app:
        app.manage_addFolder("part")
        app.part.manage_setLocalRoles("local", ["Manager"])
    browser = zmi.browser("local")
    browser.open(
        f"{zmi.url}/part/manage_addProduct/cpsmailaccess_delivery.zope/manage_addMailAccountsForm"
    )
    fill(browser, id="post")
    with errors_seen(browser):
        browser.getControl("Add").click()
    assert browser.headers["status"].startswith("401")
    with zmi.app() as app:
        assert app.part.objectIds() == []


def test_the_tabs(zmi):
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_workspace")
    for label in ("Accounts", "Defaults", "Security"):
        browser.getLink(label, index=0).click()
        assert browser.headers["status"].startswith("200")


def test_an_outbox_that_is_not_there_is_said(zmi):
    with zmi.app() as app:
        app.mail.delivery_name = HOSTILE
    browser = zmi.browser()
    with errors_seen(browser):
        browser.open(f"{zmi.url}/mail/manage_main")
    assert "no mail:mailboxDelivery of this name is configured (there is: &#39;Mail&#39;)" in (
        browser.contents.replace("'", "&#39;")
    )
    assert HOSTILE not in browser.contents
    with errors_seen(browser):
        browser.getLink("Defaults").click()
    browser.getControl("Save the outbox").click()
    browser.getLink("Accounts").click()
    assert "There is no account yet" in browser.contents


# Accounts


def test_add_edit_delete(zmi):
    zmi.add_user("alice")
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_main")
    browser.getLink("Add an account").click()
    fill(
        browser,
        mailbox="Alice@Example.org",
        host="smtp.example.org",
        username="alice",
        password=PASSWORD,
    )
    browser.getControl("Save").click()
    assert alert(browser).startswith(f"Added the account {ALICE}.")
    assert "Now: <strong>set</strong>" in browser.contents
    assert "replaceState" not in browser.contents, "reloaded, it would be another page"
    stored = zmi.outbox.vault.get(ALICE)
    assert (stored.port, stored.security, stored.password.reveal()) == (587, "starttls", PASSWORD)

    fill(browser, connections="7", mails_per_minute="30", owner="/acl_users:alice")
    browser.getControl("Save").click()
    stored = zmi.outbox.vault.get(ALICE)
    assert (stored.connections, stored.mails_per_minute, stored.owner) == (
        7,
        30,
        "/acl_users:alice",
    )
    assert stored.password.reveal() == PASSWORD, "an empty password keeps the one that is set"

    fill(browser, mails_per_minute="", username="")
    browser.getControl("Save").click()
    assert zmi.outbox.vault.get(ALICE).password is None
    assert "Now: <strong>not set</strong>" in browser.contents

    browser.getLink("Back to the list").click()
    browser.getControl(name="mailboxes:list").value = [ALICE]
    browser.getControl("Delete").click()
    assert zmi.outbox.accounts.get(ALICE), "it asks first"
    browser.getControl("Delete").click()
    assert alert(browser) == f"Deleted {ALICE}."
    with pytest.raises(NoSuchAccount):
        zmi.outbox.accounts.get(ALICE)


@pytest.mark.parametrize("typed", ["alice", "/acl_users:alice", " /acl_users:alice "])
def test_an_owner_is_a_user(zmi, typed):
    put(zmi, Account(mailbox=ALICE, host="smtp.example.org"))
    zmi.add_user("alice")
    browser = edit(zmi)
    fill(browser, owner=typed)
    browser.getControl("Save").click()
    assert alert(browser).startswith("Saved")
    assert zmi.outbox.vault.get(ALICE).owner == "/acl_users:alice"


def test_an_owner_by_name_is_the_nearest_user(zmi):
    zmi.add_user("alice")
    with zmi.app() as app:
        app.manage_addFolder("part")
        app.part.manage_addProduct["OFSP"].manage_addUserFolder()
        app.part.acl_users._doAddUser("alice", "other", [], [])
    with zmi.app() as app:
        assert typed_owner(app.part, "alice") == "/part/acl_users:alice"
        assert typed_owner(app.mail, "alice") == "/acl_users:alice"
        assert typed_owner(app.part, "/acl_users:alice") == "/acl_users:alice"


@pytest.mark.parametrize("typed", ["alcie", "/acl_users:alcie", "/mail:alice", "/gone:alice", ":a"])
def test_an_owner_who_is_nobody_is_refused(zmi, typed):
    zmi.add_user("alice")
    put(zmi, Account(mailbox=ALICE, host="smtp.example.org"))
    browser = edit(zmi)
    fill(browser, owner=typed)
    with errors_seen(browser):
        browser.getControl("Save").click()
    said = alert(browser).replace("&#x27;", "'")
    assert said.startswith(f"owner {typed!r}: ")
    assert "no user" in said
    assert browser.getControl(name="owner").value == typed
    assert zmi.outbox.vault.get(ALICE).owner == ""


def test_an_owner_who_has_left_does_not_stop_other_changes(zmi):
    put(zmi, Account(mailbox=ALICE, host="smtp.example.org", owner="/acl_users:gone"))
    browser = edit(zmi)
    fill(browser, connections="7")
    browser.getControl("Save").click()
    stored = zmi.outbox.vault.get(ALICE)
    assert (stored.connections, stored.owner) == (7, "/acl_users:gone")


def test_a_form_that_was_wrong_shows_what_was_typed(zmi):
    put(zmi, Account(mailbox=ALICE, host="smtp.example.org", username="a", password=PASSWORD))
    browser = edit(zmi)
    fill(browser, connections="3000000")
    browser.getControl(name="verify").value = []
    with errors_seen(browser):
        browser.getControl("Save").click()
    assert browser.getControl(name="connections").value == "3000000"
    assert browser.getControl(name="verify").value == [], "as it was typed"


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"host": "not a host"}, "is no host name"),
        ({"port": "x"}, "port is a whole number"),
        ({"port": "99999"}, "port is a whole number from 1 to 65535"),
        ({"username": ""}, "a password needs a user name"),
        ({"mailbox": HOSTILE}, "is an address, @domain or *"),
        ({"mailbox": "bob@example.org"}, "has an account: edit that one"),
        ({"security": "plain"}, "would send the password in clear"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_and_what_was_typed_is_kept(zmi, texts, words):
    put(zmi, Account(mailbox="bob@example.org", host="smtp.example.org"))
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_account")
    wanted = {"mailbox": ALICE, "host": "smtp.example.org", "username": "alice", **texts}
    security = wanted.pop("security", "starttls")
    browser.getControl(name="security").value = [security]
    fill(browser, password=PASSWORD, **wanted)
    with errors_seen(browser):
        browser.getControl("Save").click()
    assert browser.headers["status"].startswith("400")
    assert words in alert(browser).replace("&#x27;", "'")
    for name, value in wanted.items():
        assert browser.getControl(name=name).value == value
    assert PASSWORD not in browser.contents
    assert HOSTILE not in browser.contents
    assert len(zmi.outbox.accounts.list()) == 1


def test_a_stored_password_goes_to_no_other_relay(zmi):
    put(zmi, Account(mailbox=ALICE, host="smtp.example.org", username="alice", password=PASSWORD))
    put(
        zmi,
        Account(
            mailbox="*", host="smtp.example.org", username="a", password_from="env:CPSMAIL_KEY"
        ),
    )
    for mailbox in (ALICE, "*"):
        browser = zmi.browser()
        browser.open(f"{zmi.url}/mail/manage_account?mailbox={mailbox}")
        fill(browser, host="evil.example.net")
        with errors_seen(browser):
            browser.getControl("Save").click()
        assert "for smtp.example.org" in alert(browser)
        assert zmi.outbox.accounts.get(mailbox).host == "smtp.example.org"


def test_thousands(zmi):
    accounts = [
        Account(mailbox=f"user{number:04}@example.org", host="smtp.example.org")
        for number in range(130)
    ]
    put(zmi, *accounts)
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_main")
    assert "1 to 50 of 130" in browser.contents
    browser.getLink("Later").click()
    browser.getLink("Later").click()
    assert "101 to 130 of 130" in browser.contents
    assert "user0129@example.org" in browser.contents
    fill(browser, search="USER001")
    browser.getControl("Search", index=1).click()
    assert browser.contents.count("@example.org</a>") == 10
    for start in ("-1", "x", "99999999999999", "²"):
        browser.open(f"{zmi.url}/mail/manage_main?start={start}")
        assert "of 130" in browser.contents


def test_what_is_paused_says_why(zmi):
    with SMTPServer(users={"alice": "another"}) as server:
        put(zmi, relay_account(server, username="alice", password=PASSWORD))
        with transaction.manager:
            zmi.outbox.delivery.send(ALICE, ["bob@example.net"], b"Subject: x\n\nx\n")
        zmi.outbox.processor().run(forever=False)
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_main")
    assert re.search(r"paused: .*535", browser.contents)
    browser.getControl(name="mailboxes:list").value = [ALICE]
    browser.getControl("Delete").click()
    assert "1 mail in the queue waits for it" in browser.contents


# Trying it


def test_check(zmi):
    with SMTPServer(users={"alice": PASSWORD}) as server:
        put(zmi, relay_account(server, username="alice", password="wrong"))
        browser = zmi.browser()
        browser.open(f"{zmi.url}/mail/manage_account?mailbox={ALICE}")
        browser.getControl("Check").click()
        assert alert(browser).startswith(
            "It does not work. The relay does not accept this username and password"
        )
        assert "connected to 127.0.0.1" in browser.contents
        browser.getLink("Back to the account").click()
        fill(browser, password=PASSWORD)
        browser.getControl("Save").click()
        browser.getControl("Check").click()
        assert alert(browser) == f"It works: {server.host}:{server.port} lets us in."
        assert "logged in as alice" in browser.contents
        assert server.mails == []
        with errors_seen(browser):
            browser.getControl("Check again").click()
        assert "try again in" in alert(browser)


def test_a_test_mail_through_the_queue(zmi):
    with SMTPServer() as server:
        put(zmi, relay_account(server))
        browser = zmi.browser()
        browser.open(f"{zmi.url}/mail/manage_account?mailbox={ALICE}")
        fill(browser, recipient="bob@example.net")
        browser.getControl("Send a test mail").click()
        assert 'id="state">queued' in browser.contents
        assert browser.headers["refresh"].startswith(
            "2; url=http://localhost/mail/manage_testMail?"
        )
        zmi.outbox.processor().run(forever=False)
        browser.open(browser.headers["refresh"].partition("url=")[2])
        assert 'id="state">accepted' in browser.contents
        assert "refresh" not in browser.headers
        (mail,) = server.mails
        assert (mail.sender, mail.recipients) == (ALICE, ("bob@example.net",))
        assert zmi.outbox.status(mail.message_id).state is State.ACCEPTED


def test_the_words_of_a_relay_are_only_words(zmi):
    with SMTPServer() as server:
        server.on("MAIL", reply=f"550 {HOSTILE}")
        put(zmi, relay_account(server))
        browser = zmi.browser()
        browser.open(f"{zmi.url}/mail/manage_account?mailbox={ALICE}")
        fill(browser, recipient="bob@example.net")
        browser.getControl("Send a test mail").click()
        again = browser.headers["refresh"].partition("url=")[2]
        zmi.outbox.processor().run(forever=False)
        browser.open(again)
        assert 'id="state">refused' in browser.contents
        assert HOSTILE not in browser.contents
        assert "&lt;script&gt;" in browser.contents


def test_what_people_typed_is_only_words(zmi):
    put(
        zmi,
        Account(
            mailbox=ALICE, host="a.example", username=HOSTILE, password=PASSWORD, owner=HOSTILE
        ),
    )
    browser = zmi.browser()
    for page in (
        "manage_main",
        f"manage_main?search={HOSTILE}&manage_tabs_message={HOSTILE}",
        f"manage_account?mailbox={ALICE}",
        f"manage_confirmDelete?mailboxes:list={ALICE}",
    ):
        browser.open(f"{zmi.url}/mail/{page}")
        assert ALICE in browser.contents or "&lt;script&gt;" in browser.contents
        assert HOSTILE not in browser.contents


def test_a_test_mail_that_cannot_be_sent(zmi):
    put(zmi, Account(mailbox="*", host="smtp.example.org"))
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_account?mailbox=*")
    fill(browser, sender="nobody", recipient="bob@example.net")
    with errors_seen(browser):
        browser.getControl("Send a test mail").click()
    assert "has no domain; write local@domain" in alert(browser)


# Defaults


def test_policy(zmi):
    chosen = Account(
        mailbox=ALICE, host="smtp.example.org", owner="/acl_users:alice", networks=("public",)
    )
    given = Account(mailbox="bob@example.org", host="10.0.0.7", owner="/acl_users:bob")
    put(zmi, chosen, given)
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_defaults")
    assert browser.getControl(name="networks").value == "public"
    browser.getControl("user name").selected = False
    fill(browser, domains="example.org\n@Bücher.example\n", relays="*.Example.org")
    fill(
        browser, networks="public\n10.0.0.0/8", accounts="2", connections="1", mails_per_minute="9"
    )
    browser.getControl("Save what users may do").click()
    assert alert(browser) == "Saved."
    with zmi.app() as app:
        policy = app.mail._get_policy()
    assert policy.fields == ("host", "port", "security", "password")
    assert policy.domains == ("@example.org", "@xn--bcher-kva.example")
    assert policy.relays == ("*.example.org",)
    assert (policy.accounts, policy.connections, policy.mails_per_minute) == (2, 1, 9)
    limited = zmi.outbox.accounts.get(ALICE)
    assert limited.networks == ("public", "10.0.0.0/8")
    assert (limited.connections, limited.mails_per_minute) == (1, 9)
    assert zmi.outbox.accounts.get("bob@example.org") == given, "the administrator chose its relay"
    assert browser.getControl(name="domains").value.split() == list(policy.domains)

    fill(browser, relays="smtp.example.net")
    browser.getControl("Save what users may do").click()
    assert alert(browser) == f"Saved. Not allowed any more, but left as they are: {ALICE}."


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"networks": ""}, "name at least one network"),
        ({"networks": HOSTILE}, "neither 'public' nor a network"),
        ({"relays": "a b"}, "is no host name"),
        ({"domains": "a b"}, "is an address, @domain or *"),
        ({"accounts": "many"}, "is a whole number of at least 1"),
        ({"connections": "0"}, "is a whole number of at least 1"),
    ],
    ids=str,
)
def test_a_policy_that_is_none(zmi, texts, words):
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_defaults")
    fill(browser, **texts)
    with errors_seen(browser):
        browser.getControl("Save what users may do").click()
    assert words in alert(browser).replace("&#x27;", "'")
    assert HOSTILE not in browser.contents


# Who may, and how

PAGES = (
    "manage_main",
    "manage_account",
    "manage_confirmDelete",
    "manage_testMail",
    "manage_defaults",
)
ACTIONS = {
    "manage_saveAccount": f"mailbox={ALICE}&host=evil.example.net",
    "manage_deleteAccounts": "mailboxes:list=bob@example.org",
    "manage_checkAccount": "mailbox=bob@example.org",
    "manage_sendTestMail": "mailbox=bob@example.org&sender=bob@example.org&recipient=a@example.net",
    "manage_saveOutbox": "delivery=Mail&title=evil",
    "manage_savePolicy": "networks=0.0.0.0/0&accounts=9&connections=9",
}
ADDING = "manage_addProduct/cpsmailaccess_delivery.zope/manage_addMailAccounts"


@pytest.fixture
def bob(zmi) -> Account:
    account = Account(mailbox="bob@example.org", host="127.0.0.1", port=1, security="plain")
    put(zmi, account)
    return account


def nothing_has_changed(zmi, bob):
    assert zmi.outbox.accounts.list() == [bob]
    assert list(zmi.outbox.spool.scan()) == []
    with zmi.app() as app:
        assert (app.mail.title, app.mail._policy) == ("", {})
        assert "evil" not in app.objectIds()


def test_every_change_needs_post_and_token(zmi, bob):
    zmi.add_user("eve", "Manager")
    browser, eve = zmi.browser(), zmi.browser("eve")
    token = token_of(browser, f"{zmi.url}/mail/manage_account")
    other = token_of(zmi.browser(), f"{zmi.url}/mail/manage_account")
    hers = token_of(eve, f"{zmi.url}/mail/manage_account")
    browser.raiseHttpErrors = False
    actions = {f"mail/{name}": data for name, data in ACTIONS.items()} | {ADDING: "id=evil"}
    for name, data in actions.items():
        url = f"{zmi.url}/{name}"
        browser.open(f"{url}?{data}&form_token={token}")
        assert browser.headers["status"].startswith("404"), name
        for wrong in ("", "&form_token=", f"&form_token={other}", f"&form_token={hers}"):
            browser.post(url, data + wrong)
            assert browser.headers["status"].startswith("403"), (name, wrong)
            assert "load the page again" in browser.contents
        browser.post(url, f"{data}&form_token:list={token}")
        assert browser.headers["status"].startswith("403"), name
        without_cookie = zmi.browser()
        without_cookie.raiseHttpErrors = False
        without_cookie.post(url, f"{data}&form_token={token}")
        assert without_cookie.headers["status"].startswith("403"), name
    nothing_has_changed(zmi, bob)
    browser.post(
        f"{zmi.url}/mail/manage_saveOutbox", f"delivery=Mail&title=fine&form_token={token}"
    )
    with zmi.app() as app:
        assert app.mail.title == "fine", "it was the token that was missing"


@pytest.mark.parametrize("user", ["", "carol"])
def test_others_may_nothing(zmi, bob, user):
    zmi.add_user("carol", "Authenticated")
    browser = zmi.browser(user)
    browser.raiseHttpErrors = False
    for name in (*PAGES, "manage_workspace", "index_html", "", "delivery_name", "_get_policy"):
        browser.open(f"{zmi.url}/mail/{name}")
        assert browser.headers["status"][:3] in ("401", "403", "404"), (
            name,
            browser.url,
            browser.contents,
        )
        assert "bob@example.org" not in str(browser.contents)
    for name, data in ACTIONS.items():
        browser.post(f"{zmi.url}/mail/{name}", data)
        assert browser.headers["status"][:3] in ("401", "403"), name
    browser.post(f"{zmi.url}/{ADDING}", "id=evil")
    assert browser.headers["status"][:3] in ("401", "403", "404")
    nothing_has_changed(zmi, bob)


def test_the_permission_lets_somebody_in(zmi, bob):
    zmi.add_user("carol", "Postmaster")
    with zmi.app() as app:
        app._addRole("Postmaster")
        app.mail.manage_permission(
            "cpsmailaccess_delivery: Manage accounts", ["Manager", "Postmaster"]
        )
    browser = zmi.browser("carol")
    browser.open(f"{zmi.url}/mail/manage_main")
    assert "bob@example.org" in browser.contents


def test_no_password_anywhere(zmi, bob, caplog):
    caplog.set_level("DEBUG")
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_account?mailbox=bob@example.org")
    fill(browser, username="bob", password=PASSWORD)
    browser.getControl("Save").click()
    seen = browser.contents + browser.url
    browser.getControl("Check").click()
    seen += browser.contents
    for name in ("manage_main", "manage_account?mailbox=bob@example.org", "manage_defaults"):
        browser.open(f"{zmi.url}/mail/{name}")
        seen += browser.contents
    with zmi.app() as app:
        undo = str(app._p_jar.db().undoLog(0, 100))
        with app._p_jar.exportFile(app.mail._p_oid) as file:
            export = file.read()
    assert PASSWORD not in seen + undo + caplog.text
    assert PASSWORD.encode() not in zmi.database() + export
    assert zmi.outbox.vault.get("bob@example.org").password.reveal() == PASSWORD


def test_lists_and_records_in_the_place_of_texts(zmi, bob):
    """Zope lets a browser say what type a field has."""
    browser = zmi.browser()
    token = token_of(browser, f"{zmi.url}/mail/manage_account")
    browser.raiseHttpErrors = False
    for data in (
        "mailbox:list=a@b.example&host:list=x",
        "mailbox.a:record=x&host=smtp.example.org",
        "mailbox:int=7&host=smtp.example.org",
        "existing:list=bob@example.org",
        "mailbox=a@b.example&host=smtp.example.org&username=a&password:list=x",
    ):
        browser.post(f"{zmi.url}/mail/manage_saveAccount", f"{data}&form_token={token}")
        assert browser.headers["status"].startswith("400"), data
        assert "Traceback" not in browser.contents
    nothing_has_changed(zmi, bob)
