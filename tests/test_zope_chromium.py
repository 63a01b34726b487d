"""The main paths in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import time

import pytest
import transaction

from conftest import PASSWORD
from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.interfaces import LaneNote
from cpsmailaccess_delivery.testing import SMTPServer

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

import Zope2.App.zcml

from zope_helpers import picture

ALICE = "alice@example.org"


def test_an_account_is_added_checked_mended_and_used(zmi, chromium):
    processor = zmi.outbox.processor()
    with SMTPServer(users={"alice": PASSWORD}) as server, zmi.served() as root:
        processor.start()
        page = chromium(root)
        page.goto(f"{root}/mail/manage_main")
        page.get_by_role("link", name="Add an account").click()
        page.get_by_label("Mailbox").fill(ALICE)
        page.get_by_label("Relay").fill("127.0.0.1")
        page.get_by_label("Security").select_option("plain")
        page.get_by_label("Port").fill(str(server.port))
        page.get_by_label("User name").fill("alice")
        page.get_by_label("Password", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text(f"Added the account {ALICE}").wait_for()

        page.get_by_role("button", name="Check").click()
        page.get_by_text("The relay does not accept this username and password").wait_for()
        page.get_by_role("link", name="Back to the account").click()
        page.get_by_label("Password", exact=True).fill(PASSWORD)
        page.get_by_role("button", name="Save").click()
        page.get_by_text("Saved the account").wait_for()
        page.reload()
        page.get_by_role("button", name="Check").click()
        page.get_by_text("It works").wait_for()

        page.get_by_role("link", name="Back to the account").click()
        page.get_by_label("To", exact=True).fill("bob@example.net")
        page.get_by_role("button", name="Send a test mail").click()
        page.locator("#state", has_text="accepted").wait_for()
        (mail,) = server.wait_for(1)
        assert (mail.username, mail.recipients) == ("alice", ("bob@example.net",))
        assert PASSWORD not in page.content()
        assert processor.stop(timeout=10)


def test_a_relay_goes_down_and_the_queue_says_why(zmi, chromium):
    configuration = f"""
    <configure xmlns:mail="http://namespaces.zope.org/mail">
      <mail:queueProcessor queuePath="{zmi.outbox.location}" />
    </configure>"""
    Zope2.App.zcml.load_string(configuration)
    with SMTPServer() as server, zmi.served() as root:
        account = Account(mailbox=ALICE, host="127.0.0.1", port=server.port, security="plain")
        with transaction.manager:
            zmi.outbox.accounts.put(account)
        page = chromium(root, viewport={"width": 860, "height": 700})
        page.goto(f"{root}/mail/manage_processor")
        page.get_by_text("Nobody delivers").wait_for()
        page.get_by_role("button", name="Start").press("Enter")
        page.get_by_text("Started.").wait_for()
        send(zmi, "bob@example.net")
        server.wait_for(1)

        server.stop_accepting()
        server.drop_sessions()
        send(zmi, "carol@example.net")
        send(zmi, "dave@example.net", subject="<b>Hostile</b> & co")
        page.get_by_role("link", name="Queue", exact=True).click()
        waiting = page.get_by_text("Nothing listens at 127.0.0.1")
        _look_until(page, lambda: waiting.count() == 3)  # the account, and each of its mails
        page.get_by_text("2 mails wait").wait_for()
        picture(page, "queue")

        page.get_by_role("link", name="dave@example.net").click()
        page.get_by_text("<b>Hostile</b> & co").wait_for()
        page.get_by_role("button", name="Hold").click()
        page.get_by_text("1 mail held.").wait_for()
        picture(page, "mail")
        page.get_by_role("link", name="To the queue").click()

        server.start_accepting()
        page.get_by_role("button", name=f"Resume {ALICE}").click()
        page.get_by_text(f"{ALICE} is tried again now.").wait_for()
        server.wait_for(2)
        page.get_by_label("Choose the mail to dave@example.net").check()
        page.get_by_role("button", name="Release").click()
        page.get_by_text("1 mail released.").wait_for()
        server.wait_for(3)
        page.goto(f"{root}/mail/manage_queue")
        _look_until(page, lambda: page.get_by_text("The queue is empty").count())
        page.get_by_role("link", name="Processor").click()
        page.get_by_role("img", name="Recipients of the last hour").wait_for()
        picture(page, "processor")
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("Nobody delivers").wait_for()


def test_a_narrow_screen_shows_all(zmi, chromium):
    mailbox = "a.rather.long.name.of.a.person@department.example.org"
    login = {"username": mailbox, "password": PASSWORD}
    account = Account(mailbox=mailbox, host="smtp.department.example.org", **login)
    reason = "x" * 60 + " Nothing listens at smtp.department.example.org port 587"
    with transaction.manager:
        zmi.outbox.accounts.put(account.replace(mailbox=ALICE))
        zmi.outbox.accounts.put(account)
    send(zmi, mailbox)
    (entry,) = zmi.outbox.queue.entries()
    zmi.outbox.queue.hold(entry.id, reason)
    with zmi.served() as root:
        page = chromium(root, viewport={"width": 360, "height": 640})
        for path, seen in (
            ("manage_main", "Owner"),
            ("manage_queue", "Why"),
            (f"manage_mail?id={entry.id}", "Recipient"),
            ("manage_processor", ""),
        ):
            page.goto(f"{root}/mail/{path}")
            assert page.evaluate(_CUT_OFF) == [], path
            labels = page.evaluate(_LABELS)
            assert not seen or seen in labels, "cells have lost the heading of their column"


#: What one has to scroll sideways to see all of.
_CUT_OFF = """Array.from(document.querySelectorAll("html, .table-responsive"))
    .filter(each => each.scrollWidth > each.clientWidth + 1)
    .map(each => each.tagName + " " + each.className)"""

#: The headings that stand before cells.
_LABELS = """Array.from(document.querySelectorAll("td[data-label]"))
    .filter(each => getComputedStyle(each, "::before").content != "none")
    .map(each => each.dataset.label)"""


def test_an_object_is_added_in_the_dialog_of_the_zmi(zmi, chromium):
    with zmi.served() as root:
        page = chromium(root)
        page.goto(f"{root}/manage_main")
        page.get_by_role("combobox").first.select_option(label="Mail accounts")
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Id", exact=True).fill("post")
        assert dialog.get_by_role("navigation").count() == 0, "a page in a page"
        dialog.get_by_role("button", name="Add").click()
        page.get_by_text("Added post.").wait_for()


def send(zmi, recipient: str, subject: str = "Hello") -> None:
    message = f"From: {ALICE}\r\nTo: {recipient}\r\nSubject: {subject}\r\n\r\nHello.\r\n"
    with transaction.manager:
        zmi.outbox.delivery.send(ALICE, [recipient], message)


def _look_until(page, predicate) -> None:
    """Load a page again until it shows something."""
    deadline = time.monotonic() + 30
    while not predicate():
        assert time.monotonic() < deadline, page.content()
        page.reload()


def test_it_fits_a_narrow_screen(zmi, chromium):
    with transaction.manager:
        zmi.outbox.accounts.put(Account(mailbox=ALICE, host="127.0.0.1", port=1, security="plain"))
    send(zmi, "bob@example.net", "x" * 200)
    (entry,) = zmi.outbox.queue.entries()
    reason = "535 a word of the relay that is verylong" * 5
    zmi.outbox.spool.note_lane(entry.lane, LaneNote(ALICE, "login", reason, 1.0, 2e9))
    with zmi.served() as root:
        page = chromium(root, viewport={"width": 360, "height": 640})
        for name in (
            *("manage_main", "manage_account", "manage_defaults", "manage_queue"),
            *("manage_queue?by=age", "manage_queue?by=reason", f"manage_mail?id={entry.id}"),
            *(f"manage_confirmCancel?ids:list={entry.id}", "manage_processor"),
        ):
            page.goto(f"{root}/mail/{name}")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 360, f"{name} is {wide} pixels wide"
