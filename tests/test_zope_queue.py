"""The tab *Queue*: what waits and why, one mail's story, and what can be done about it."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import transaction

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

from cpsmailaccess_delivery import Account, State
from cpsmailaccess_delivery.envelope import Route, lane_key
from cpsmailaccess_delivery.errors import NoSuchEntry
from cpsmailaccess_delivery.interfaces import LaneNote
from cpsmailaccess_delivery.journal import Event
from cpsmailaccess_delivery.testing import SMTPServer
from cpsmailaccess_delivery.zope import choosing, queue_view
from zope_helpers import (
    ALICE,
    BOB,
    MESSAGE,
    alert,
    choose,
    errors_seen,
    put,
    queue_tab,
    relay_account,
    send,
    states,
    words,
)

CAROL = "carol@example.net"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"


def drain(zmi, **settings):
    return zmi.outbox.processor(**settings).run(forever=False)


def entries(zmi):
    return list(zmi.outbox.queue.entries())


@pytest.fixture
def server():
    with SMTPServer() as server:
        yield server


@pytest.fixture
def site(zmi, server):
    put(zmi, relay_account(server))
    return zmi


@pytest.fixture
def unclear(site, server):
    """A mail of which nobody knows whether the relay has taken it for carol and dave."""
    server.on("BODY", drop=True, times=1)
    message_id = send(site, CAROL, "dave@example.net")
    drain(site, unclear="hold")
    assert states(site) == ["unclear"]
    return message_id


# What is shown


def test_an_empty_queue(zmi):
    browser = queue_tab(zmi)
    assert "The queue is empty" in browser.contents
    assert "Try now" not in browser.contents
    assert "No mail fits" in queue_tab(zmi, "?state=held").contents
    assert "No mail fits" in queue_tab(zmi, "?by=lane").contents


def test_what_waits_and_why(site, server):
    server.on("RCPT", reply="450 come back later", match="bob")
    send(site, BOB)
    drain(site)
    send(site, CAROL, not_before=time.time() + 7200)
    browser = queue_tab(site)
    text = words(browser)
    assert "450 come back later" in text
    assert re.search(r"all 2 .*queued 1 .*deferred 1 .*held 0", text)
    assert "in 2h" in text
    browser.getLink("deferred").click()
    assert BOB in browser.contents
    assert CAROL not in browser.contents
    assert "secret plan" not in browser.contents, "the subject is for the page of the mail"


def test_by_lane_age_and_reason(site, server):
    put(site, Account(mailbox="dora@example.org", host="127.0.0.1", port=1, security="plain"))
    for _ in range(2):
        send(site, sender="dora@example.org")
    send(site)
    browser = queue_tab(site)
    browser.getControl(name="by").value = ["lane"]
    browser.getControl("Show", index=1).click()
    assert re.search(r"TOTAL 3 3 .*dora@example.org 2 2 .*alice@example.org 1 1", words(browser))
    browser.getLink("dora@example.org").click()
    assert len(browser.getControl(name="ids:list").options) == 2
    browser.getControl(name="by").value = ["age"]
    browser.getControl("Show", index=1).click()
    assert re.search(r"Mailbox Total 5m 10m .*1280m\+ TOTAL 2 2", words(browser))
    assert "waits for its turn" in queue_tab(site, "?by=reason").contents


def test_by_age(site):
    send(site)
    assert BOB in queue_tab(site, "?older=").contents
    assert "No mail fits" in queue_tab(site, "?older=5").contents
    assert BOB in queue_tab(site, "?older=nonsense&state=nonsense&by=nonsense&start=-3").contents


def test_a_large_queue_is_shown_a_page_at_a_time_and_not_opened(site, monkeypatch):
    with transaction.manager:
        for number in range(130):
            site.outbox.delivery.send(ALICE, [f"user{number}@example.net"], MESSAGE)
    read = []
    mails = site.outbox.spool._mails
    original = mails.read
    monkeypatch.setattr(mails, "read", lambda entry: read.append(entry) or original(entry))
    browser = queue_tab(site)
    assert "1 to 50 of 130" in browser.contents
    assert len(read) == 50
    browser.getLink("Later").click()
    browser.getLink("Later").click()
    assert "101 to 130 of 130" in browser.contents
    assert len(browser.getControl(name="ids:list").options) == 30
    assert "101 to 130 of 130" in queue_tab(site, "?start=9000").contents, "past the end"


def test_search_by_address_and_message_id(site, server, monkeypatch):
    gone = send(site, BOB)
    drain(site)
    waiting = send(site, CAROL)
    send(site, "dave@example.net")
    browser = queue_tab(site)
    browser.getControl(name="search").value = f"<{gone}>"
    browser.getControl("Search").click()
    assert "has left" in browser.contents
    assert "accepted" in words(browser)
    browser.getLink(BOB).click()
    assert "This mail has left the queue" in browser.contents
    assert re.search(
        r"queued bob@example.net .* accepted bob@example.net 1 127.0.0.1", words(browser)
    )

    for name in (CAROL.upper(), waiting):
        browser = queue_tab(site, f"?search={name}")
        assert len(browser.getControl(name="ids:list").options) == 1
        assert "dave@" not in browser.contents
    browser = queue_tab(site, f"?search={ALICE}")
    assert re.search("dave@.*carol@.*bob@", words(browser)), "the newest first"
    assert "No mail fits" in queue_tab(site, "?search=nobody@example.net").contents

    monkeypatch.setattr(queue_view, "MOST_OPENED", 1)
    assert "dave@" in queue_tab(site, "?search=dave@example.net").contents
    text = words(queue_tab(site, f"?search={CAROL}"))
    assert "and not 1 older ones" in text, "it says what it has not looked at"


def test_search_finds_what_was_sent_at_once(site):
    """Such a mail was never an entry: the journal alone knows it, by its Message-Id."""
    for recipient, reply in ((BOB, "550 nobody here"), (CAROL, "550 nor here")):
        site.outbox.journal.record(
            Event(
                time.time(),
                State.REFUSED,
                message_id="1@example.org",
                mailbox=ALICE,
                sender=ALICE,
                recipient=recipient,
                attempt=1,
                reply=reply,
            )
        )
    for name in (ALICE, "1@example.org"):
        browser = queue_tab(site, f"?search={name}")
        assert re.search(r"refused has left .* \d+s ago 1 550 nor here", words(browser))
    browser.getLink(BOB).click()
    assert re.search("refused bob@example.net 1 550 nobody here", words(browser))
    assert "Hold" not in browser.contents


def test_one_mail(site, server):
    server.on("RCPT", reply="450 come back later", match="bob")
    server.on("RCPT", reply="550 nobody here", match="carol")
    message_id = send(site, BOB, CAROL, "dave@example.net", message=(
        b"From: alice@example.org\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n continued\r\n\r\n"
        b"The body.\r\n"))  # fmt: skip
    drain(site)
    browser = queue_tab(site)
    browser.getLink(BOB).click()
    text = words(browser)
    assert 'id="state">deferred' in browser.contents
    assert re.search(r"bob@example.net deferred .*450 come back later", text)
    assert re.search(r"carol@example.net refused .*550 nobody here", text)
    assert re.search(r"dave@example.net accepted", text)
    assert "Grüße continued" in text
    assert message_id in text
    assert "The body." not in text
    assert re.search(r"queued bob.*deferred bob@example.net 1 127.0.0.1:\d+ 450 come back", text)


def test_a_mail_that_nobody_knows(zmi):
    browser = zmi.browser()
    with errors_seen(browser):
        for query in (
            "",
            "?id=1.x",
            "?id=../../etc/passwd",
            "?message_id=x@y.example",
            "?id:list=1",
        ):
            browser.open(f"{zmi.url}/mail/manage_mail{query}")
            assert browser.headers["status"].startswith("400"), query
            assert "neither the queue nor the journal" in browser.contents


def test_a_mail_that_cannot_be_read_can_be_cancelled(site):
    send(site)
    (entry,) = entries(site)
    (path,) = (Path(site.outbox.location) / "new").iterdir()
    path.write_bytes(b"no block\r\n")
    browser = queue_tab(site)
    assert "its private block cannot be read" in browser.contents
    browser.getLink(entry.id).click()
    assert "X-Zope-Envelope" in browser.contents or "block" in words(browser)
    browser.getControl("Cancel").click()
    browser.getControl("Cancel").click()
    assert alert(browser) == "1 mail cancelled."
    assert entries(site) == []


# What can be done


def test_hold_release_and_try_now(site, server):
    server.on("MAIL", reply="451 later", times=1)
    send(site, BOB)
    send(site, CAROL)
    first, second = entries(site)
    browser = queue_tab(site)
    choose(browser, first, second)
    browser.getControl("Hold").click()
    assert alert(browser) == "2 mails held."
    assert states(site) == ["held", "held"]
    assert "held by admin" in browser.contents

    choose(browser, first)
    browser.getControl("Release").click()
    assert alert(browser) == "1 mail released."
    assert states(site) == ["queued", "held"]
    drain(site)
    (first,) = [entry for entry in entries(site) if entry.state is State.DEFERRED]
    browser = queue_tab(site, "?state=deferred")
    choose(browser, first)
    browser.getControl("Try now").click()
    assert alert(browser) == "1 mail tried again now."
    assert "state=deferred" in browser.url, "it comes back to what was chosen"
    drain(site)
    assert [mail.recipients for mail in server.mails] == [(BOB,)]


def test_what_could_not_be_done_is_said(site):
    for recipient in (BOB, CAROL, "dave@example.net"):
        send(site, recipient)
    busy, gone, fine = entries(site)
    browser = queue_tab(site)
    choose(browser, busy, gone, fine)
    site.outbox.queue.cancel(gone)
    lease = site.outbox.spool.claim(busy)
    browser.getControl("Hold").click()
    lease.release()
    told = alert(browser)
    assert told.startswith("1 mail held. Not done: ")
    assert f"{busy.id}: is being delivered right now" in told
    assert gone.id in told
    assert "alert-warning" in browser.contents
    assert states(site) == ["queued", "held"]
    choose(browser, busy, fine)
    browser.getControl("Release").click()
    assert "1 mail released. Not done: " in alert(browser)
    assert f"{busy.id} is queued, not held" in alert(browser)
    browser.getControl("Hold").click()
    assert alert(browser) == "No mail is chosen: choose mails first."


def test_all_that_are_listed(site, monkeypatch):
    monkeypatch.setattr(choosing, "MOST_AT_ONCE", 60)
    with transaction.manager:
        for number in range(65):
            site.outbox.delivery.send(ALICE, [f"user{number}@example.net"], MESSAGE)
    site.outbox.queue.hold(entries(site)[-1], "not this one")
    browser = queue_tab(site, "?state=queued")
    browser.getControl(name="which").value = ["all"]
    browser.getControl("Cancel").click()
    assert "user0@example.net" in browser.contents
    assert "and 14 more" in words(browser)
    assert len(entries(site)) == 65
    browser.getControl("Cancel").click()
    assert alert(browser) == "60 mails cancelled. 4 more fit: do it again for them."
    browser = queue_tab(site)
    browser.getControl(name="which").value = ["all"]
    browser.getControl("Hold").click()
    assert alert(browser) == "4 mails held."
    browser.getControl(name="which").value = ["all"]
    browser.getControl("Release").click()
    assert alert(browser) == "5 mails released."
    browser.getControl(name="which").value = ["all"]
    browser.getControl("Try now").click()
    assert alert(browser) == "No mail is chosen: choose mails first."


def test_of_a_search_only_what_is_ticked(site):
    send(site, BOB)
    send(site, CAROL)
    browser = queue_tab(site, f"?search={BOB}")
    assert "which" not in re.findall(r'name="(\w+)"', browser.contents)
    token = re.search(r'name="form_token" value="(\w+)"', browser.contents)[1]
    browser.post(
        f"{site.url}/mail/manage_cancelMails", f"which=all&search={BOB}&form_token={token}"
    )
    assert len(entries(site)) == 2


def test_cancel_asks_first(site):
    send(site, BOB)
    send(site, CAROL)
    first, _ = entries(site)
    browser = queue_tab(site)
    choose(browser, first)
    browser.getControl("Cancel").click()
    assert f"{ALICE} to {BOB}" in browser.contents
    assert len(entries(site)) == 2
    browser.getLink("Change nothing").click()
    assert len(entries(site)) == 2
    choose(browser, first)
    browser.getControl("Cancel").click()
    browser.getControl("Cancel").click()
    assert alert(browser) == "1 mail cancelled."
    assert len(entries(site)) == 1


def test_unclear_settled_one_by_one(site, unclear, server):
    browser = queue_tab(site, "?state=unclear")
    browser.getLink(CAROL).click()
    assert "nobody knows" in words(browser)
    browser.getControl(name="recipients:list").value = []
    browser.getControl("It arrived").click()
    assert alert(browser) == "Choose recipients first."
    browser.getControl(name="recipients:list").value = [CAROL]
    browser.getControl("It arrived").click()
    assert CAROL in words(browser)
    browser.getControl("They arrived").click()
    assert alert(browser) == "1 mail settled as accepted."
    assert re.search("carol@example.net accepted settled by hand", words(browser))
    browser.getControl("It did not arrive").click()
    assert "the senders are told" in browser.contents
    browser.getControl("They did not arrive").click()
    assert alert(browser) == "1 mail settled as refused."
    assert "This mail has left the queue" in browser.contents
    outcomes = site.outbox.status(unclear).recipients
    assert [str(outcome.state) for outcome in outcomes.values()] == ["accepted", "refused"]
    (notice,) = entries(site)
    assert site.outbox.queue.find(notice)[0].envelope.recipients == (ALICE,)


def test_many_unclear_at_once(site, unclear, server):
    send(site, BOB)
    chosen = entries(site)
    browser = queue_tab(site)
    choose(browser, *chosen)
    browser.getControl("They arrived").click()
    browser.getControl("They arrived").click()
    told = alert(browser)
    assert told.startswith("1 mail settled as accepted. Not done: ")
    assert "no recipient is unclear" in told
    with pytest.raises(NoSuchEntry):
        site.outbox.queue.find(chosen[0].id)


def test_all_that_are_listed_and_unclear_in_part(site, server):
    """A mail that is deferred for some may be unclear for others: its name does not say so."""
    server.on("RCPT", reply="450 later", match="bob")
    server.on("BODY", drop=True, times=1)
    send(site, BOB, CAROL)
    drain(site, unclear="hold")
    send(site, BOB)
    drain(site)
    assert states(site) == ["deferred", "deferred"]
    for query in ("", "?state=deferred"):
        browser = queue_tab(site, query)
        browser.getControl(name="which").value = ["all"]
        browser.getControl("They arrived").click()
        assert f"{ALICE} to {BOB}, {CAROL}" in words(browser)
        assert words(browser).count(f"{ALICE} to ") == 1, "of the other one nothing is unclear"
    browser.getControl("They arrived").click()
    assert alert(browser) == "1 mail settled as accepted."
    browser.getControl(name="which").value = ["all"]
    browser.getControl("They arrived").click()
    assert alert(browser) == "No mail is chosen: choose mails first."


def test_not_all_are_opened_to_find_the_unclear_ones(site, server, monkeypatch):
    server.on("RCPT", reply="450 later")
    for recipient in (BOB, CAROL, "dave@example.net"):
        send(site, recipient)
    drain(site)
    monkeypatch.setattr(choosing, "MOST_OPENED", 2)
    browser = queue_tab(site)
    browser.getControl(name="which").value = ["all"]
    browser.getControl("They arrived").click()
    assert alert(browser) == (
        "No mail is chosen: choose mails first. Only the oldest 2 that might be unclear in part"
        " were opened: name a mailbox to look at fewer."
    )


def test_a_paused_account_is_resumed(site, server):
    server.users["alice"] = "right"
    put(site, relay_account(server, username="alice", password="wrong"))
    send(site)
    drain(site)
    lane = lane_key(Route(ALICE))
    browser = queue_tab(site)
    text = words(browser)
    assert re.search(r"alice@example.org is paused: the relay refuses the login.*535", text), text
    assert re.search(r"Since \d+s , next try in \d+[smh] . 1 mail waits", text)
    assert site.outbox.spool.lane_note(lane)
    browser.getControl("Resume").click()
    assert alert(browser) == f"{ALICE} is tried again now."
    assert site.outbox.spool.lane_note(lane) is None
    assert "Resume" not in browser.contents


def test_many_lanes_in_trouble(site):
    for number in range(52):
        route = f"user{number}@example.org"
        note = LaneNote(route, "relay", "down", 1000.0 + number, 2e9)
        site.outbox.spool.note_lane(lane_key(Route(route)), note)
    send(site)
    site.outbox.spool.note_lane(lane_key(Route(ALICE)), LaneNote(ALICE, "relay", "x", 2e9, 2e9))
    text = words(queue_tab(site))
    assert re.search(r"that wait alice@example.org waits.* user0@example.org waits", text)
    assert "And 3 more, for which fewer mails wait" in text


def test_resumed_while_the_processor_runs(site, server):
    """It does not wait for the half minute in which other processes notice."""
    processor = site.outbox.processor()
    server.stop_accepting()
    send(site)
    processor.start()
    deadline = time.monotonic() + 20
    while not site.outbox.spool.lane_notes() and time.monotonic() < deadline:
        time.sleep(0.02)
    server.start_accepting()
    browser = queue_tab(site)
    browser.getControl("Resume").click()
    server.wait_for(1, timeout=15)
    assert processor.stop(timeout=10)


@pytest.mark.parametrize("key", ["", "nonsense", "../../x", "0" * 16, "\N{SNOWMAN}"])
def test_what_does_not_wait_is_not_resumed(site, key):
    browser = queue_tab(site)
    token = re.search(r'name="form_token" value="(\w+)"', _form(site))[1]
    with errors_seen(browser):
        browser.open(f"{site.url}/mail/manage_queue")
        browser.post(
            f"{site.url}/mail/manage_resumeLane",
            f"lane_key={key}&form_token={token}".encode(),
        )
    assert browser.headers["status"][:3] in ("400", "403")


def _form(site) -> str:
    browser = site.browser()
    browser.open(f"{site.url}/mail/manage_account")
    return browser.contents


# Hostile text


class _Markup(HTMLParser):
    """Collects what a browser would run."""

    def __init__(self) -> None:
        super().__init__()
        self.dangerous: list[str] = []
        self.in_main = False

    def handle_starttag(self, tag, attrs):
        self.in_main = self.in_main or tag == "main"
        if self.in_main and tag in ("script", "img", "iframe", "object"):
            self.dangerous.append(tag)
        for name, value in attrs:
            if name.startswith("on") and "alert" in (value or ""):
                self.dangerous.append(name)
            if name in ("href", "action") and (value or "").strip().lower().startswith(
                "javascript"
            ):
                self.dangerous.append(value)

    def handle_endtag(self, tag):
        self.in_main = self.in_main and tag != "main"


def dangerous(contents: str) -> list[str]:
    parser = _Markup()
    parser.feed(contents)
    return parser.dangerous


def test_hostile_text_is_only_text(site, server):
    hostile = HOSTILE.encode()
    server.on("MAIL", reply=f"450 {HOSTILE}")
    sender = '"<script>alert(1)</script>"@example.org'
    put(site, relay_account(server, mailbox="*"))
    message = (
        b"From: alice@example.org\r\nSubject: " + hostile + b"\r\nX-Note: \x1b]0;x\x07"
        b"\xe2\x80\xaegpj.exe =?utf-8?q?=3Cscript=3Ealert(1)=3C/script=3E?= =?x-no?q?x?=\r\n"
        b"<script>alert(1)</script>: x\r\n\r\n<script>stolen</script>\r\n"
    )
    send(site, '"<img src=x onerror=alert(1)>"@example.net', sender=sender, message=message)
    drain(site)
    (entry,) = entries(site)
    site.outbox.queue.hold(entry, HOSTILE)
    assert dangerous(f"<main>{HOSTILE}</main>"), "the test would see it"
    for page in (
        "manage_queue",
        "manage_queue?by=lane",
        "manage_queue?by=reason",
        f"manage_queue?search={sender}",
        "manage_queue?search=%3Cscript%3Ealert(1)&lane=%3Cscript%3E&failed=%3Cscript%3E",
        "manage_queue?manage_tabs_message=%3Cscript%3Ealert(1)%3C/script%3E",
        f"manage_mail?id={entry.id}",
        f"manage_mail?id={entry.id}&message_id=%22%3E%3Cscript%3Ealert(1)%3C/script%3E",
        f"manage_confirmCancel?ids:list={entry.id}&recipients:list=%3Cscript%3E&search=%22%3E%3Cscript%3E",
        "manage_processor",
        "manage_processor?span=%3Cscript%3Ealert(1)",
    ):
        browser = site.browser()
        with errors_seen(browser):
            browser.open(f"{site.url}/mail/{page}")
        assert dangerous(browser.contents) == [], page
        assert "\u202e" not in browser.contents
        assert "\x1b" not in browser.contents
    browser.open(f"{site.url}/mail/manage_mail?id={entry.id}")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in browser.contents
    assert "stolen" not in browser.contents, "the body is not shown"
