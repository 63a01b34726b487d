"""A user's main path in a real browser: he sets up a mailbox, takes a mail back, sends one."""

from __future__ import annotations

import pytest

from conftest import PASSWORD
from cpsmailaccess_delivery.testing import SMTPServer

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

from zope_helpers import allow, own_account, picture

ALICE, BOB = "alice@example.org", "bob@example.net"


def write(page, root, subject):
    page.goto(f"{root}/@@compose")
    page.get_by_label("To", exact=True).fill(BOB)
    page.get_by_label("Subject").fill(subject)
    page.get_by_label("Text").fill("Hello Bob,\n\nthe figures are attached.\n\nAlice\n")


def test_a_user_writes_takes_back_and_sends(zmi, chromium):
    zmi.add_user("alice")
    allow(zmi, domains=("example.org",), networks=("127.0.0.0/8",))
    processor = zmi.outbox.processor()
    with SMTPServer(users={"alice": PASSWORD}) as server, zmi.served() as root:
        processor.start()
        page = chromium(root, user="alice", viewport={"width": 800, "height": 600})
        page.goto(f"{root}/@@my-mailboxes")
        page.get_by_role("link", name="Set up a mailbox").click()
        page.get_by_label("Address").fill(ALICE)
        page.get_by_label("Mail server").fill("127.0.0.1")
        page.get_by_label("Security").select_option("plain")
        page.get_by_label("Port").fill(str(server.port))
        page.get_by_label("User name").fill("alice")
        page.get_by_label("Password").fill(PASSWORD)
        page.get_by_role("button", name="Save").click()
        page.get_by_text("The mailbox is set up").wait_for()
        page.get_by_role("button", name="Check").click()
        page.get_by_text("It works").wait_for()
        page.get_by_role("link", name="My mailboxes").click()
        page.get_by_text("ready").wait_for()
        picture(page, "my-mailboxes")

        write(page, root, "A mail that is taken back")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("Until then you can take it back").wait_for()
        page.get_by_role("button", name="Undo").click()
        page.get_by_role("alert").get_by_text("Taken back.").wait_for()

        write(page, root, "Figures of November")
        page.get_by_label("Attachment").set_input_files(
            {"name": "figures.csv", "mimeType": "text/csv", "buffer": b"a,b\n1,2\n"}
        )
        picture(page, "compose")
        page.get_by_role("button", name="Send").click()
        page.get_by_text("Until then you can take it back").wait_for()
        picture(page, "undo")
        page.locator("#kind", has_text="sent").wait_for()
        (mail,) = server.wait_for(1)
        assert (mail.sender, mail.recipients, mail.username) == (ALICE, (BOB,), "alice")
        assert b"Subject: Figures of November" in mail.data
        assert b"figures.csv" in mail.data
        page.get_by_role("link", name="My outbox").click()
        page.get_by_role("link", name="all 2").wait_for()
        picture(page, "my-outbox")
        assert len(server.mails) == 1
        assert processor.stop(timeout=10)


def test_they_fit_a_narrow_screen_and_a_keyboard(zmi, chromium):
    zmi.add_user("alice")
    allow(zmi, domains=("example.org",))
    own_account(zmi, f"{'long' * 15}@{'a.' * 20}example.org", "alice")
    with zmi.served() as root:
        page = chromium(root, user="alice", viewport={"width": 320, "height": 640})
        for name in ("@@my-mailboxes", "@@my-mailboxes/edit", "@@my-outbox", "@@compose"):
            page.goto(f"{root}/{name}")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 320, f"{name} is {wide} pixels wide"
        page.get_by_label("To", exact=True).fill(BOB)
        page.get_by_label("Subject").fill("Keys alone")
        page.keyboard.press("Enter")
        page.get_by_text("Until then you can take it back").wait_for()
