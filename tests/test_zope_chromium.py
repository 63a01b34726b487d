"""The main paths in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import pytest

from conftest import PASSWORD
from cpsmailaccess_delivery.testing import SMTPServer

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

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


def test_it_fits_a_narrow_screen(zmi, chromium):
    with zmi.served() as root:
        page = chromium(root, viewport={"width": 360, "height": 640})
        for name in ("manage_main", "manage_account", "manage_defaults"):
            page.goto(f"{root}/mail/{name}")
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 360, f"{name} is {wide} pixels wide"
