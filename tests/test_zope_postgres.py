"""The ZMI of an outbox on PostgreSQL: accounts, queue and processor as with a directory."""

from __future__ import annotations

import pytest

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")
pytest.importorskip("psycopg", reason="needs the extra [postgres]")

from conftest import KEY
from cpsmailaccess_delivery.testing import SMTPServer
from postgres_helpers import wait_for
from zope_helpers import (
    ALICE,
    BOB,
    alert,
    choose,
    put,
    queue_tab,
    relay_account,
    run_by_zcml,
    send,
    states,
    words,
)

CAROL = "carol@example.net"


@pytest.fixture
def outbox_path(database, monkeypatch):
    monkeypatch.setenv("CPSMAIL_KEY", KEY.hex())
    return database


def test_accounts(zmi):
    with SMTPServer(users={"alice": "s3cret"}) as server:
        put(zmi, relay_account(server, username="alice", password="wrong"))
        browser = zmi.browser()
        browser.open(f"{zmi.url}/mail/manage_account?mailbox={ALICE}")
        browser.getControl("Check").click()
        assert "username and password" in words(browser)
        browser.open(f"{zmi.url}/mail/manage_account?mailbox={ALICE}")
        browser.getControl(name="password").value = "s3cret"
        browser.getControl("Save").click()
        assert "s3cret" not in browser.contents
        browser.getControl("Check").click()
        assert "username and password" not in words(browser)
        assert [login.accepted for login in server.logins] == [False, True]


def test_queue(zmi):
    with SMTPServer() as server:
        put(zmi, relay_account(server))
        ids = [send(zmi, BOB), send(zmi, CAROL)]
        browser = queue_tab(zmi)
        first, second = zmi.outbox.queue.entries()
        choose(browser, first, second)
        browser.getControl("Hold").click()
        assert alert(browser) == "2 mails held."
        assert states(zmi) == ["held", "held"]
        choose(browser, first)
        browser.getControl("Release").click()
        assert alert(browser) == "1 mail released."
        choose(browser, second)
        browser.getControl("Cancel").click()
        browser.getControl("Cancel").click()
        assert alert(browser) == "1 mail cancelled."
        assert zmi.outbox.processor().run(forever=False).accepted == 1
        assert [mail.recipients for mail in server.mails] == [(BOB,)]
        browser = queue_tab(zmi, f"?search={ids[0]}")
        assert "accepted" in words(browser), words(browser)[-1500:]


def test_processor(zmi):
    with SMTPServer() as server:
        run_by_zcml(zmi)
        put(zmi, relay_account(server))
        send(zmi)
        page = f"{zmi.url}/mail/manage_processor"
        browser = zmi.browser()
        browser.open(page)
        assert "The oldest mail that is due has been so for" in words(browser)
        browser.getControl("Start").click()
        server.wait_for(1, 60)

        def runs() -> bool:
            browser.open(page)
            return 'id="processor">runs' in browser.contents

        wait_for(runs)
        browser.getControl("Stop").click()
        assert "Stopped: what is in the queue waits." in browser.contents
