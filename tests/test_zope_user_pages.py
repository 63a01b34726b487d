"""What users do for themselves: their mailboxes, their outbox, a mail; and what they may not."""

from __future__ import annotations

import re
import socket
import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import transaction

from conftest import PASSWORD
from cpsmailaccess_delivery import Account, State
from cpsmailaccess_delivery.errors import NoSuchAccount
from cpsmailaccess_delivery.testing import SMTPServer

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

from ZODB.POSException import ConflictError

from cpsmailaccess_delivery.zope import own_mails, trial
from cpsmailaccess_delivery.zope.claims import claims_of, claims_to_change
from cpsmailaccess_delivery.zope.mail_accounts import MailAccounts
from cpsmailaccess_delivery.zope.subjects import Subjects
from cpsmailaccess_delivery.zope.throttle import Turnstile
from zope_helpers import (
    ADMIN,
    alert,
    allow,
    errors_seen,
    fill,
    own_account,
    put,
    token_of,
)

ALICE, BOB, CAROL = "alice@example.org", "bob@example.org", "carol@example.net"
OTHER = "sales@example.org"
HOSTILE = "<script>alert(1)</script>"
PAGES = ("@@my-mailboxes", "@@my-outbox", "@@compose")


@pytest.fixture
def users(zmi):
    """Alice and Bob, who do not trust each other, may set up mailboxes in example.org."""
    for name in ("alice", "bob"):
        zmi.add_user(name)
    allow(zmi, domains=("example.org",), networks=("127.0.0.0/8",), accounts=2)
    return zmi


def post(zmi, user, where, **data):
    """Post a form that the user has been shown, whatever stands in it; return the browser."""
    browser = zmi.browser(user)
    data["form_token"] = token_of(browser, f"{zmi.url}/@@my-mailboxes/edit")
    browser.raiseHttpErrors = False
    body = "&".join(f"{name}={quote(value)}" for name, value in data.items())
    browser.post(f"{zmi.url}/{where}", body)
    return browser


def status(browser) -> str:
    return browser.headers["status"][:3]


def new(zmi, user="alice", **data):
    wanted = {"host": "127.0.0.1", "security": "plain", "port": "1", "mailbox": OTHER, **data}
    return post(zmi, user, "@@my-mailboxes/save", **wanted)


# Mailboxes


def test_a_mailbox_of_ones_own(users):
    zmi = users
    browser = zmi.browser("alice")
    with SMTPServer(users={"alice": PASSWORD}) as server:
        browser.open(f"{zmi.url}/@@my-mailboxes")
        assert "You have no mailbox yet" in browser.contents
        browser.getLink("Set up a mailbox").click()
        browser.getControl(name="security").value = ["plain"]
        fill(browser, mailbox="Alice@Example.org", host="127.0.0.1", port=str(server.port))
        fill(browser, username="alice", password="wrong")
        browser.getControl("Save").click()
        assert "The mailbox is set up" in alert(browser)
        stored = zmi.outbox.vault.get(ALICE)
        assert (stored.owner, stored.networks) == ("/acl_users:alice", ("127.0.0.0/8",))
        browser.getControl("Check").click()
        assert "The relay does not accept this username and password" in alert(browser)
        browser.getLink("Settings").click()
        fill(browser, password=PASSWORD)
        browser.getControl("Save").click()
        browser.getControl("Check").click()
        assert alert(browser) == f"It works: {server.host}:{server.port} lets you in."
        browser.getLink("Settings").click()
        with errors_seen(browser):
            browser.getControl("Check").click()
        assert "try again in" in alert(browser)
    browser.open(f"{zmi.url}/@@my-mailboxes")
    assert PASSWORD not in browser.contents
    browser.getLink("Delete").click()
    assert zmi.outbox.accounts.get(ALICE), "it asks first"
    browser.getControl("Delete").click()
    assert alert(browser) == "The mailbox is deleted, and its password."
    with pytest.raises(NoSuchAccount):
        zmi.outbox.accounts.get(ALICE)


def test_in_a_folder_of_the_site(users):
    with users.app() as app:
        app.manage_addFolder("folder")
        app.folder.manage_addFolder("inner")
    browser = users.browser("alice")
    for place in ("", "/folder", "/folder/inner", "/mail"):
        browser.open(f"{users.url}{place}/@@my-mailboxes")
        assert "You have no mailbox yet" in browser.contents
        browser.getLink("Outbox").click()
        assert browser.url == f"{users.url}{place}/@@my-outbox"


def test_nowhere_near_mail_accounts(users):
    with users.app() as app:
        app._delObject("mail")
    browser = users.browser("alice")
    browser.raiseHttpErrors = False
    for name in PAGES:
        browser.open(f"{users.url}/{name}")
        assert status(browser) == "404"
    users.add_mail_accounts("mail")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"mailbox": "x@example.com"}, "lets you set up mailboxes in: @example.org"),
        ({"mailbox": "*"}, "is an address"),
        ({"mailbox": "@example.org"}, "is an address"),
        ({"mailbox": HOSTILE}, "is an address"),
        ({"mailbox": BOB}, "is set up already"),
        ({"mailbox": "BOB@example.org"}, "is set up already"),
        ({"mailbox": "site@example.org"}, "is set up already: ask the administrator"),
        ({"mailbox": "hers@example.org"}, "you have it already: change its settings"),
        ({"host": "192.168.0.1"}, "in no network that the administrator allows"),
        ({"host": "10.0.0.1", "username": "a", "password": PASSWORD}, "in clear"),
        ({"host": "a b"}, "is no host name"),
        ({"port": "x"}, "port is a whole number"),
        ({"password": "x"}, "a password needs a user name"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_said(users, data, words):
    own_account(users, BOB, "bob")
    own_account(users, "hers@example.org", "alice")
    put(users, Account(mailbox="site@example.org", host="smtp.example.org"))
    before = users.outbox.accounts.list()
    browser = new(users, **data)
    assert status(browser) == "400"
    assert words in alert(browser).replace("&#x27;", "'")
    assert users.outbox.accounts.list() == before
    assert HOSTILE not in browser.contents
    assert PASSWORD not in browser.contents


def test_only_what_he_may_choose(users):
    allow(users, domains=("example.org",), fields=("username", "password"), accounts=2)
    put(users, Account(mailbox="*", host="10.1.2.3", port=26, security="plain", verify=False))
    browser = users.browser("alice")
    browser.open(f"{users.url}/@@my-mailboxes/edit")
    assert "10.1.2.3:26" in browser.contents
    assert 'name="host"' not in browser.contents
    new(
        users,
        host="evil.example.net",
        connections="99",
        owner="/acl_users:bob",
        networks="0.0.0.0/0",
        verify="",
        password_from="env:HOME",
        username="alice",
        password=PASSWORD,
    )
    made = users.outbox.vault.get(OTHER)
    assert (made.relay, made.owner, made.networks) == ("10.1.2.3:26", "/acl_users:alice", ())
    assert (made.connections, made.password_from) == (3, None)


def test_limits_that_are_changed_hold_for_what_is_set_up(users):
    """At the relay of the site, too; what the administrator gave him is as he gave it."""
    put(users, Account(mailbox="*", host="10.1.2.3", port=26, security="plain"))
    given = own_account(users, ALICE, "alice").replace(networks=(), connections=9)
    put(users, given)
    new(users, host="")
    assert users.outbox.accounts.get(OTHER).relay == "10.1.2.3:26"
    browser = users.browser()
    browser.open(f"{users.url}/mail/manage_defaults")
    fill(browser, connections="1", mails_per_minute="7", relays="smtp.example.net")
    browser.getControl("Save what users may do").click()
    assert alert(browser) == "Saved."
    limited = users.outbox.accounts.get(OTHER)
    assert (limited.connections, limited.mails_per_minute) == (1, 7)
    assert (limited.relay, limited.networks) == ("10.1.2.3:26", ())
    assert users.outbox.accounts.get(ALICE) == given


def test_how_many(users):
    for mailbox in (ALICE, OTHER):
        own_account(users, mailbox, "alice")
    browser = new(users, mailbox="third@example.org")
    assert "you have 2 accounts, which is the limit" in alert(browser)
    browser.open(f"{users.url}/@@my-mailboxes")
    assert "Set up a mailbox" not in browser.contents


def test_a_password_goes_to_no_other_relay(users):
    """Neither the stored one, nor one that the administrator reads from somewhere."""
    put(
        users,
        *(
            Account(
                mailbox=mailbox,
                host="smtp.example.org",
                username="a",
                owner="/acl_users:alice",
                **secret,
            )
            for mailbox, secret in (
                (ALICE, {"password": PASSWORD}),
                (OTHER, {"password_from": "env:HOME"}),
            )
        ),
    )
    for mailbox in (ALICE, OTHER):
        browser = post(
            users,
            "alice",
            "@@my-mailboxes/save",
            existing=mailbox,
            host="evil.example.net",
            security="starttls",
            port="",
            username="a",
        )
        assert "for smtp.example.org" in alert(browser)
        assert users.outbox.accounts.get(mailbox).host == "smtp.example.org"


def test_nothing_of_another_s(users):
    """Whatever is typed into the fields of a form."""
    bobs = Account(mailbox=BOB, host="relay-of-bob.example.net", owner="/acl_users:bob")
    put(users, bobs)
    own_account(users, ALICE, "alice")
    browser = users.browser("alice")
    browser.raiseHttpErrors = False
    for page in ("", "/edit", "/confirm_delete"):
        browser.open(f"{users.url}/@@my-mailboxes{page}?mailbox={BOB}")
        assert "relay-of-bob" not in browser.contents
        assert status(browser) == ("400" if page else "200")
    for where, data in (
        ("save", {"existing": BOB, "host": "127.0.0.1"}),
        ("save", {"mailbox": BOB, "host": "127.0.0.1", "owner": "/acl_users:alice"}),
        ("save", {"existing": ALICE, "mailbox": BOB, "host": "x", "owner": "/acl_users:bob"}),
        ("delete", {"mailbox": BOB}),
        ("check", {"mailbox": BOB}),
        ("check", {"mailbox": "*"}),
        ("delete", {"mailbox": "nobody@example.org"}),
    ):
        browser = post(users, "alice", f"@@my-mailboxes/{where}", **data)
        assert status(browser) in ("400", "303", "200"), (where, data, browser.contents)
        assert "relay-of-bob" not in browser.contents
        assert users.outbox.accounts.get(BOB) == bobs
        assert users.outbox.accounts.get(ALICE).owner == "/acl_users:alice"
    mine = post(users, "alice", "@@my-mailboxes/check", mailbox=BOB)
    nobodys = post(users, "alice", "@@my-mailboxes/check", mailbox="nobody@example.org")
    assert alert(mine).replace(BOB, "X") == alert(nobodys).replace("nobody@example.org", "X")


def test_a_mailbox_that_was_another_s(users):
    new(users, "alice")
    post(users, "alice", "@@my-mailboxes/delete", mailbox=OTHER)
    assert "belongs, or belonged, to somebody else" in alert(new(users, "bob"))
    new(users, "alice")
    assert users.outbox.accounts.get(OTHER).owner == "/acl_users:alice"


def test_a_mailbox_that_was_another_s_elsewhere_in_the_site(users):
    """Where several objects show one outbox, it is the same mailbox."""
    with users.app() as app:
        app.manage_addFolder("part")
        app.part._setObject("mail", MailAccounts("mail"))
        app.part.mail._set_policy(app.mail._get_policy())
    new(users, "alice")
    with transaction.manager:
        users.outbox.delivery.send(OTHER, [CAROL], b"Subject: alice's\r\n\r\nx\r\n")
    users.outbox.queue.cancel(next(iter(users.outbox.spool.scan())))
    post(users, "alice", "@@my-mailboxes/delete", mailbox=OTHER)
    data = {"mailbox": OTHER, "host": "127.0.0.1", "security": "plain"}
    browser = post(users, "bob", "part/@@my-mailboxes/save", **data)
    assert "belongs, or belonged, to somebody else" in alert(browser)
    with users.app() as app:  # nor when the object is deleted, and another one added
        app.manage_delObjects(["mail"])
        app._setObject("mail", MailAccounts("mail"))
        app.mail._set_policy(app.part.mail._get_policy())
    assert "belongs, or belonged, to somebody else" in alert(new(users, "bob"))


def test_two_who_want_the_same_mailbox_at_once(users):
    """The later one conflicts, and begins again; then he is refused."""
    with users.app() as first, users.app() as other:
        claims_to_change(first, "Mail").take(OTHER, "/acl_users:alice", 1.0)
        managers = transaction.TransactionManager()
        connection = first._p_jar.db().open(managers)
        claims = claims_to_change(connection.root()["Application"], "Mail")
        claims.take(OTHER, "/acl_users:bob", 1.0)
        transaction.commit()
        with pytest.raises(ConflictError):
            managers.commit()
        managers.abort()
        connection.close()
        assert other


def test_since_when_a_mailbox_is_his_says_the_clock_of_the_outbox(users, monkeypatch):
    """It says, too, when a mail was staged, by which it is known whether that is his."""
    monkeypatch.setattr(users.outbox, "clock", lambda: 1000.0)
    new(users, "alice")
    with users.app() as app:
        claims = claims_of(app, "Mail")
    assert claims.since(OTHER, "/acl_users:alice") == 1000.0


def test_mails_that_wait_do_not_change_hands(users):
    own_account(users, OTHER, "alice")
    with transaction.manager:
        users.outbox.delivery.send(OTHER, [CAROL], b"Subject: for Carol only\n\nx\n")
    browser = post(users, "alice", "@@my-mailboxes/delete", mailbox=OTHER)
    assert "1 mail waits to leave through it" in alert(browser)
    browser.open(f"{users.url}/@@my-mailboxes/confirm_delete?mailbox={OTHER}")
    assert "1 mail waits</strong> to leave through it" in browser.contents
    with transaction.manager:
        users.outbox.accounts.delete(OTHER)  # as the administrator
    assert "mails from before wait for it" in alert(new(users, "bob"))
    (entry,) = users.outbox.spool.scan()
    users.outbox.queue.cancel(entry)
    assert status(new(users, "bob")) == "200"
    browser = users.browser("bob")
    browser.open(f"{users.url}/@@my-outbox")
    assert "There is nothing here" in browser.contents, "what was before he had it is not his"


# A mail


def compose(browser, zmi, **texts):
    browser.open(f"{zmi.url}/@@compose")
    fill(browser, **{"to": CAROL, "subject": "Hello", "text": "Hello Carol.", **texts})
    browser.getForm().submit()


def test_write_and_take_back(users):
    own_account(users, ALICE, "alice")
    browser = users.browser("alice")
    compose(browser, users)
    assert re.search(r"It leaves in \d+ seconds", browser.contents)
    assert browser.headers["refresh"].startswith("2; url=http://localhost/@@my-outbox/mail?id=")
    (entry,) = users.outbox.spool.scan()
    assert entry.due > 0
    browser.getControl("Undo").click()
    assert alert(browser) == "Taken back."
    assert "taken back" in browser.contents
    assert "refresh" not in browser.headers
    assert list(users.outbox.spool.scan()) == []


def test_write_and_see_it_go(users):
    with SMTPServer() as server:
        own_account(users, ALICE, "alice", server)
        browser = users.browser("alice")
        browser.open(f"{users.url}/@@compose")
        fill(browser, to=f"Carol <{CAROL}>, dave@example.net", subject="Grüße", text="Hallo\nCarol")
        browser.getControl(name="attachment").add_file(b"\0\x01", "text/html", "../ü.html")
        browser.getForm().submit()
        browser.getControl("Send now").click()
        assert alert(browser) == "It is tried now."
        users.outbox.processor().run(forever=False)
        browser.open(browser.url)
        assert "taken it for all recipients" in browser.contents
        (mail,) = server.mails
        assert (mail.sender, mail.recipients) == (ALICE, (CAROL, "dave@example.net"))
        assert b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=" in mail.data
        assert b"attachment; filename" in mail.data
        browser.open(f"{users.url}/@@my-outbox?kind=sent")
        assert CAROL in browser.contents
        browser.getLink("Grüße").click()
        assert "<h1>Grüße</h1>" in browser.contents
    journal = Path(users.outbox.journal.path)
    for file in journal.parent.glob(f"{journal.name}*"):
        assert "Grüße".encode() not in file.read_bytes(), "it is for operators"


def test_subjects_of_mails_that_have_left(users):
    """For who wrote them alone, and not for ever."""
    day = 86_400.0
    with users.app() as app:
        subjects = Subjects(app.mail)
        assert subjects.of("alice", "1@example.org", 0.0) == ""
        subjects.note("alice", "1@example.org", "first", day - 1)
        subjects.note("alice", "1@example.org", "the same form, again", day - 1)
        subjects.note("alice", "2@example.org", "", day - 1)
        assert subjects.of("alice", "1@example.org", day + 1) == "first", "staged after midnight"
        assert subjects.of("alice", "2@example.org", day) == ""
        assert subjects.of("bob", "1@example.org", day) == ""
        subjects.note("bob", "3@example.org", "x", 30 * day)
        assert subjects.of("alice", "1@example.org", day) == "first"
        subjects.note("bob", "4@example.org", "x", 32 * day)
        assert subjects.of("alice", "1@example.org", day) == ""
        assert subjects.of("bob", "3@example.org", 30 * day) == "x"


@pytest.mark.parametrize(
    ("subject", "shown"),
    [
        ("=?raw_unicode_escape?q?=5Cud800?=", r"\ud800"),
        ("=?utf-8?q?a=0D=0Ab?=", r"a\x0d\x0ab"),
    ],
    ids=["surrogate", "lines"],
)
def test_a_subject_that_is_hard_to_read(users, subject, shown):
    own_account(users, ALICE, "alice")
    id = send(users, ALICE, subject=subject)
    browser = users.browser("alice")
    for page in ("", f"/mail?id={id}"):
        browser.open(f"{users.url}/@@my-outbox{page}")
        assert shown in browser.contents


def test_one_form_is_one_mail(users):
    own_account(users, ALICE, "alice")
    own_account(users, BOB, "bob")
    for user, mailbox, times in (("alice", ALICE, 3), ("bob", BOB, 1)):
        for _ in range(times):
            post(users, user, "@@compose/send", mailbox=mailbox, to=CAROL, key="the same")
    records = list(users.outbox.queue.records())
    assert [record.envelope.sender for record in records] == [ALICE, BOB]


def test_a_form_that_was_filled_in_anew_is_another_mail(users):
    """Whoever goes back in his browser finds the form with its key, and writes on."""
    own_account(users, ALICE, "alice")
    for changed in (
        {},
        {"subject": "2"},
        {"to": BOB},
        {"text": "4"},
        {"later": "2099-01-01T12:00"},
    ):
        data = {"mailbox": ALICE, "to": CAROL, "subject": "1", "text": "", "key": "k", **changed}
        browser = post(users, "alice", "@@compose/send", **data)
        assert "/@@my-outbox/mail?id=" in browser.url
    browser = users.browser("alice")
    browser.open(f"{users.url}/@@compose")
    for content in (b"a", b"b", b"b"):
        browser.open(f"{users.url}/@@compose")
        fill(browser, to=CAROL)
        browser.getControl(name="key").value = "k"
        browser.getControl(name="attachment").add_file(content, "text/plain", "a.txt")
        browser.getForm().submit()
    assert len(list(users.outbox.spool.scan())) == 5 + 2


def test_send_later(users):
    own_account(users, ALICE, "alice")
    browser = users.browser("alice")
    compose(browser, users, later="2099-12-24T18:00")
    assert "It leaves at 24 Dec 2099, 18:00" in browser.contents
    assert "refresh" not in browser.headers
    browser.open(f"{users.url}/@@my-outbox?kind=scheduled")
    assert "24 Dec 2099" in browser.contents


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"mailbox": BOB}, "Choose one of your mailboxes"),
        ({"mailbox": ""}, "Choose one of your mailboxes"),
        ({"mailbox": "*"}, "Choose one of your mailboxes"),
        ({"to": ""}, "has no recipients"),
        ({"to": "nobody"}, "has no domain"),
        ({"to": f"{CAROL}\r\nBcc: {BOB}"}, "CR, LF"),
        ({"subject": "x\r\nBcc: evil@example.net"}, "is one line"),
        ({"subject": HOSTILE, "later": HOSTILE}, "is no time"),
        ({"text": "x" * 3_000}, "the outbox takes"),
    ],
    ids=str,
)
def test_what_cannot_be_sent_is_said(users, data, words, monkeypatch):
    monkeypatch.setattr(users.outbox.delivery, "size_limit", 2_000)
    own_account(users, ALICE, "alice")
    own_account(users, BOB, "bob")
    typed = {"mailbox": ALICE, "to": CAROL, "subject": "kept", "text": "kept, too", **data}
    browser = post(users, "alice", "@@compose/send", **typed)
    assert status(browser) == "400"
    assert words in alert(browser)
    assert HOSTILE not in browser.contents
    assert browser.getControl(name="text").value.strip() == typed["text"]
    assert list(users.outbox.spool.scan()) == []


def test_who_has_no_mailbox(users):
    browser = users.browser("alice")
    browser.open(f"{users.url}/@@compose")
    assert "You have no mailbox to write from" in browser.contents


# The outbox


def send(zmi, mailbox, message_id="", to=CAROL, subject="x", **options) -> str:
    head = f"Message-Id: <{message_id}>\n" if message_id else ""
    message = f"{head}From: {mailbox}\nSubject: {subject}\n\nx\n".encode()
    with transaction.manager:
        zmi.outbox.delivery.send(mailbox, [to], message, **options)
    *_, entry = sorted(zmi.outbox.spool.scan(), key=lambda entry: entry.id)
    return entry.id


def test_every_fate_in_words(users):
    zmi = users
    with SMTPServer() as server:
        own_account(zmi, ALICE, "alice", server)
        server.on("RCPT", match="later@example.net", reply="450 4.2.0 come again")
        server.on("RCPT", match="never@example.net", reply=f"550 5.1.1 {HOSTILE}")
        for to in ("good@example.net", "later@example.net", "never@example.net"):
            send(zmi, ALICE, to=to, subject=HOSTILE)
        send(zmi, ALICE, undo=3_000)
        zmi.outbox.processor().run(forever=False)
    held = send(zmi, ALICE, subject="held")
    zmi.outbox.queue.hold(held, HOSTILE)
    browser = zmi.browser("alice")
    browser.open(f"{zmi.url}/@@my-outbox")
    for words in (
        "It could not be handed over yet. It is tried again at",
        "It was refused for good",
        "It leaves at",
        "It was set aside",
        "To good@example.net",
    ):
        assert words in browser.contents, words
    assert HOSTILE not in browser.contents
    assert "&lt;script&gt;" in browser.contents
    for kind, number in (("scheduled", 1), ("waiting", 2), ("sent", 1), ("refused", 1)):
        browser.open(f"{zmi.url}/@@my-outbox?kind={kind}")
        links = re.findall(r'mail\?id=[\w.%-]+"', browser.contents)
        assert len(set(links)) == number, kind
        for each in set(links):
            browser.open(f"{zmi.url}/@@my-outbox/{each[:-1]}")
            assert HOSTILE not in browser.contents
    browser.open(f"{zmi.url}/@@my-outbox?kind={HOSTILE}&start=x&done={HOSTILE}")
    assert HOSTILE not in browser.contents


def test_retry(users):
    with SMTPServer() as server:
        own_account(users, ALICE, "alice", server)
        server.on("RCPT", reply="550 5.1.1 unknown", times=1)
        id = send(users, ALICE)
        users.outbox.processor().run(forever=False)
        browser = users.browser("alice")
        browser.open(f"{users.url}/@@my-outbox/mail?id={id}")
        assert "550 5.1.1 unknown" in browser.contents
        browser.getControl("Try again now").click()
        assert alert(browser) == "It is tried now."
        users.outbox.processor().run(forever=False)
        browser.open(f"{users.url}/@@my-outbox/mail?id={id}")
        assert "taken it for all recipients" in browser.contents


def test_retries_are_not_for_scanning(users):
    own_account(users, ALICE, "alice")
    id = send(users, ALICE)
    for _ in range(2):
        post(users, "alice", "@@my-outbox/retry", id=id)
    assert "try again in" in alert(post(users, "alice", "@@my-outbox/retry", id=id))


def test_what_was_set_aside_is_not_his_to_release(users):
    own_account(users, ALICE, "alice")
    id = send(users, ALICE)
    users.outbox.queue.hold(id, "looks odd")
    for action in ("retry", "cancel"):
        assert "This mail cannot" in alert(post(users, "alice", f"@@my-outbox/{action}", id=id))
    assert users.outbox.spool.look_up(id).state is State.HELD


def test_never_another_s(users):
    """Not by its id, not by a Message-Id that one has chosen to be the same."""
    zmi = users
    with SMTPServer() as server:
        own_account(zmi, ALICE, "alice", server)
        own_account(zmi, BOB, "bob", server)
        put(zmi, Account(mailbox="*", host=server.host, port=server.port, security="plain"))
        for to in ("secret@example.net", BOB):
            send(zmi, ALICE, "same@example.org", to=to, subject="Alice's secret")
        send(zmi, BOB, "same@example.org", subject="Bob's own")
        zmi.outbox.processor().run(forever=False)
    waiting = send(zmi, ALICE, "same@example.org", to="secret@example.net", undo=3_000)
    bobs = send(zmi, BOB, "same@example.org", to="else@example.net", undo=3_000)
    send(zmi, "site@example.net", "same@example.org", to=BOB, subject="the site's", undo=3_000)
    browser = zmi.browser("bob")
    browser.open(f"{zmi.url}/@@my-outbox")
    assert len(set(re.findall(r"mail\?id=([\w.%-]+)", browser.contents))) == 2
    browser.raiseHttpErrors = False
    for page in (
        "@@my-outbox",
        f"@@my-outbox/mail?id={bobs}",
        f"@@my-outbox/mail?id={waiting}",
        f"@@my-outbox/mail?mailbox={ALICE}&message_id=same@example.org",
        f"@@my-outbox/mail?mailbox={BOB}&message_id=same@example.org",
    ):
        browser.open(f"{zmi.url}/{page}")
        for secret in ("secret", ALICE, "the site's"):
            assert secret not in browser.contents, page
    for action in ("cancel", "retry"):
        browser = post(zmi, "bob", f"@@my-outbox/{action}", id=waiting)
        assert status(browser) == "400"
        for name in ("same@example.org", "x", ""):
            assert status(post(zmi, "bob", f"@@my-outbox/{action}", id=name)) == "400"
    assert zmi.outbox.spool.look_up(waiting).due > 0
    post(zmi, "bob", "@@my-outbox/cancel", id=bobs)
    assert {entry.id for entry in zmi.outbox.spool.scan()} >= {waiting}
    assert bobs not in {entry.id for entry in zmi.outbox.spool.scan()}


# Who may, and how

ACTIONS = {
    "@@my-mailboxes/save": {"mailbox": OTHER, "host": "127.0.0.1"},
    "@@my-mailboxes/delete": {"mailbox": ALICE},
    "@@my-mailboxes/check": {"mailbox": ALICE},
    "@@my-outbox/cancel": {},
    "@@my-outbox/retry": {},
    "@@compose/send": {"mailbox": ALICE, "to": CAROL},
}


def test_every_change_needs_post_and_token(users):
    zmi = users
    mine = own_account(zmi, ALICE, "alice")
    id = send(zmi, ALICE, undo=3_000)
    browser, bob, again = zmi.browser("alice"), zmi.browser("bob"), zmi.browser("alice")
    tokens = [token_of(each, f"{zmi.url}/@@my-mailboxes/edit") for each in (browser, bob, again)]
    browser.raiseHttpErrors = False
    for name, data in ACTIONS.items():
        body = "&".join(f"{key}={value}" for key, value in {"id": id, **data}.items())
        browser.open(f"{zmi.url}/{name}?{body}&form_token={tokens[0]}")
        assert status(browser) == "404", name
        for wrong in ("", "&form_token=", *(f"&form_token={token}" for token in tokens[1:])):
            browser.post(f"{zmi.url}/{name}", body + wrong)
            assert status(browser) == "403", (name, wrong)
    assert zmi.outbox.accounts.list() == [mine]
    (entry,) = zmi.outbox.spool.scan()
    assert (entry.id, entry.due > 0) == (id, True)


@pytest.mark.parametrize("user", ["", "outsider"])
def test_others_may_nothing(users, user):
    zmi = users
    mine = own_account(zmi, ALICE, "alice")
    id = send(zmi, ALICE, undo=3_000)
    zmi.add_user("outsider")
    with zmi.app() as app:
        for permission in ("Use own accounts", "Send mail"):
            app.mail.manage_permission(f"cpsmailaccess_delivery: {permission}", ["Manager"])
    browser = zmi.browser(user)
    browser.raiseHttpErrors = False
    subpages = ("@@my-mailboxes/edit", f"@@my-outbox/mail?id={id}", "@@my-outbox/own_mails")
    for place in ("", "mail/"):
        for name in (*PAGES, *subpages, "@@compose/owner", "@@compose/show"):
            browser.open(f"{zmi.url}/{place}{name}")
            assert status(browser) in ("401", "403", "404"), name
            assert ALICE not in str(browser.contents)
        for name, data in ACTIONS.items():
            body = "&".join(f"{key}={value}" for key, value in {"id": id, **data}.items())
            browser.post(f"{zmi.url}/{place}{name}", body)
            assert status(browser) in ("401", "403"), name
    assert zmi.outbox.accounts.list() == [mine]
    assert [entry.id for entry in zmi.outbox.spool.scan()] == [id]


def test_the_administrator_s_own_is_not_everybody_s(users):
    """He sees all in the ZMI; here, he is a user."""
    own_account(users, ALICE, "alice")
    browser = users.browser(ADMIN[0])
    browser.open(f"{users.url}/@@my-mailboxes")
    assert ALICE not in browser.contents


def test_what_a_browser_is_told(users):
    browser = users.browser("alice")
    for name in PAGES:
        browser.open(f"{users.url}/{name}")
        assert "default-src 'none'" in browser.headers["content-security-policy"]
        assert browser.headers["cache-control"] == "no-store"
        assert "<script" not in browser.contents


def test_bytes_that_are_no_utf_8(users):
    own_account(users, ALICE, "alice")
    browser = users.browser("alice")
    token = token_of(browser, f"{users.url}/@@my-mailboxes/edit")
    browser.raiseHttpErrors = False
    for name in ("to", "subject", "text", "key", "later", "mailbox"):
        sent = {"mailbox": ALICE, "to": CAROL, "subject": "x", "text": "x", "form_token": token}
        body = "&".join(f"{field}={quote(value)}" for field, value in sent.items() if field != name)
        browser.post(f"{users.url}/@@compose/send", f"{body}&{name}=%ED%A0%80")
        assert status(browser) in ("200", "400"), name
    login = "username=a&password=%ED%A0%80&host=127.0.0.1"
    browser.post(f"{users.url}/@@my-mailboxes/save", f"existing={ALICE}&{login}&form_token={token}")
    assert status(browser) in ("200", "400")
    browser.open(f"{users.url}/@@my-outbox?kind=%ED%A0%80&start=%ED%A0%80")


def test_a_long_subject(users):
    """One of 300 kB was parsed for minutes, each time that the page was seen."""
    own_account(users, ALICE, "alice")
    with transaction.manager:
        message = b"Subject: " + b"a " * 150_000 + b"\r\nTo: x\r\n\r\nx\r\n"
        users.outbox.delivery.send(ALICE, [CAROL], message)
    browser = users.browser("alice")
    before = time.process_time()
    browser.open(f"{users.url}/@@my-outbox")
    assert "a a a" in browser.contents
    assert len(browser.contents) < 20_000
    assert time.process_time() - before < 15


def test_a_long_outbox(users, monkeypatch):
    """The newest are opened; an older one is found nevertheless."""
    monkeypatch.setattr(own_mails, "MOST_OPENED", 2)
    own_account(users, ALICE, "alice")
    ids = [send(users, ALICE, to=f"to{number}@example.net") for number in range(4)]
    browser = users.browser("alice")
    browser.open(f"{users.url}/@@my-outbox")
    assert [f"to{number}@" in browser.contents for number in range(4)] == [False, False, True, True]
    assert "2 older ones wait, too" in " ".join(re.sub(r"<[^>]+>", "", browser.contents).split())
    browser.open(f"{users.url}/@@my-outbox/mail?id={ids[0]}")
    assert "to0@example.net" in browser.contents
    assert alert(post(users, "alice", "@@my-outbox/cancel", id=ids[0])) == "Taken back."
    assert len(list(users.outbox.spool.scan())) == 3


def test_a_check_of_a_relay_that_never_ends(users, monkeypatch):
    """It has the thread of Zope for a time only, and its owner has one at a time."""
    monkeypatch.setattr(trial, "_DEADLINE", 1.0)
    monkeypatch.setattr(trial, "_turnstile", Turnstile(2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(10)
        account = own_account(users, ALICE, "alice").replace(port=silent.getsockname()[1])
        put(users, account, account.replace(mailbox=BOB, owner="/acl_users:bob"))
        pages = {}

        def check(user, mailbox):
            pages[user] = post(users, user, "@@my-mailboxes/check", mailbox=mailbox).contents

        thread = threading.Thread(target=check, args=("alice", ALICE))
        thread.start()
        held, _ = silent.accept()
        assert "Another check is not over yet" in alert(
            post(users, "alice", "@@my-mailboxes/check", mailbox=ALICE)
        )
        check("bob", BOB)
        thread.join(20)
        held.close()
    for page in pages.values():
        assert "is too slow: not done within 1 seconds" in page
    assert (
        "Another check" not in post(users, "alice", "@@my-mailboxes/check", mailbox=ALICE).contents
    )


def test_lists_and_records_in_the_place_of_texts(users):
    own_account(users, ALICE, "alice")
    browser = users.browser("alice")
    token = token_of(browser, f"{users.url}/@@my-mailboxes/edit")
    browser.raiseHttpErrors = False
    for name, body in (
        ("@@my-mailboxes/save", "mailbox:list=a@example.org&host=127.0.0.1"),
        ("@@my-mailboxes/save", "existing:int=1&password:list=x"),
        ("@@my-mailboxes/delete", f"mailbox:list={ALICE}"),
        ("@@compose/send", f"mailbox:list={ALICE}&to={CAROL}"),
        ("@@compose/send", f"mailbox={ALICE}&to:list={CAROL}&attachment=x"),
        ("@@my-outbox/cancel", "id.x:record=1"),
        ("@@compose/send", f"mailbox={ALICE}&to=x&attachment.filename:record=x"),
    ):
        browser.post(f"{users.url}/{name}", f"{body}&form_token={token}")
        assert status(browser) == "400", (name, body, browser.contents)
        assert "Traceback" not in browser.contents
    assert [account.mailbox for account in users.outbox.accounts.list()] == [ALICE]
