"""The tab *Processor*: who delivers, how much, and what is in the way."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

from zope.component import queryUtility

from cpsmailaccess_delivery.interfaces import IQueueProcessor
from cpsmailaccess_delivery.journal import Event
from cpsmailaccess_delivery.testing import SMTPServer
from zope_helpers import alert, errors_seen, put, relay_account, run_by_zcml, send, words

OTHER = """
import sys, time
from cpsmailaccess_delivery import Outbox
with Outbox(sys.argv[1]) as outbox:
    processor = outbox.processor()
    processor.start()
    while not outbox.presence.deliverers():  # which its thread says
        time.sleep(0.01)
    print("started", flush=True)
    sys.stdin.read()
    processor.stop()
"""


def processor():
    return queryUtility(IQueueProcessor, "Mail")


def opened(zmi, query: str = ""):
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_processor{query}")
    return browser


def until(predicate):
    deadline = time.monotonic() + 20
    while not predicate():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(zmi) -> bool:
    return processor().scheduler is not None and processor().scheduler.heartbeat > 0


def test_none_is_configured(zmi):
    browser = opened(zmi)
    assert "This process has no processor" in words(browser)
    assert "Nobody delivers: mails wait." in words(browser)
    assert "manage_startProcessor" not in browser.contents
    form = zmi.browser()
    form.open(f"{zmi.url}/mail/manage_account")
    token = re.search(r'name="form_token" value="(\w+)"', form.contents)[1]
    with errors_seen(form):
        form.post(f"{zmi.url}/mail/manage_startProcessor", f"form_token={token}")
    assert "mail:queueProcessor" in alert(form)


def test_start_stop_restart(zmi):
    run_by_zcml(zmi)
    with SMTPServer() as server:
        put(zmi, relay_account(server))
        send(zmi)
        browser = opened(zmi)
        assert 'id="processor">stopped' in browser.contents
        assert "The oldest mail that is due has been so for" in words(browser)
        browser.getControl("Start").click()
        assert alert(browser).startswith("Started.")
        server.wait_for(1)
        until(lambda: running(zmi))
        browser = opened(zmi)
        assert 'id="processor">runs' in browser.contents
        assert "Nobody delivers" not in browser.contents
        until(lambda: "1 0 0 0" in words(opened(zmi)))  # of the last minute
        first = processor()

        browser.getControl("Restart").click()
        assert alert(browser).startswith("Started anew.")
        assert not first.is_alive()
        second = processor()
        assert second is not first
        assert second.schedule.unclear == "hold", "as configured"
        send(zmi)
        server.wait_for(2)

        browser = opened(zmi)
        browser.getControl("Stop").click()
        assert "Stopped: what is in the queue waits." in browser.contents
        assert not second.is_alive()
        browser.getControl("Start").click()
        send(zmi)
        server.wait_for(3)
        assert len([each for each in zmi.outbox.processors if each.is_alive()]) == 1


def test_started_twice(zmi):
    run_by_zcml(zmi)
    first, second = opened(zmi), opened(zmi)
    first.getControl("Start").click()
    second.getControl("Start").click()
    assert "It runs already." in second.contents
    assert len([each for each in zmi.outbox.processors if each.is_alive()]) == 1


def test_one_of_another_process_is_seen_and_its_death(zmi):
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER, zmi.outbox.location],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        assert other.stdout.readline() == b"started\n"
        text = words(opened(zmi))
        assert f"Other processes that deliver from this outbox: process {other.pid}" in text
        assert "Nobody delivers" not in text
        other.kill()
        other.wait(10)
    assert "Nobody delivers" in words(opened(zmi))


def test_one_that_rests_is_no_deliverer(zmi):
    zmi.outbox.processor().run(forever=False)
    assert zmi.outbox.presence.deliverers() == []


def test_one_that_hangs_is_said(zmi, monkeypatch):
    run_by_zcml(zmi)
    opened(zmi).getControl("Start").click()
    until(lambda: running(zmi))
    processor().scheduler.heartbeat = time.time() - 600
    text = words(opened(zmi))
    assert "hangs : no sign of life for 10m" in text


def test_the_chart_says_the_same_in_words_and_as_a_table(zmi):
    now = time.time()
    for minutes, kind, number in ((1, "accepted", 7), (1, "refused", 2), (30, "deferred", 3)):
        for _ in range(number):
            zmi.outbox.journal.record(Event(now - 60 * minutes - 5, kind, entry="1.x"))
    zmi.outbox.journal.record(Event(now - 20 * 3600, "accepted", entry="1.x"))
    browser = opened(zmi)
    svg = re.search(r"<svg role=\"img\".*?</svg>", browser.contents, re.S)[0]
    assert 'aria-labelledby="chart-title chart-words"' in svg
    assert re.search(r"7 accepted, 3 deferred, 2 refused or unclear", svg)
    assert {*re.findall(r'fill="url\(#(\w+)\)"', svg)} == {"accepted", "deferred", "failed"}
    assert re.search(r"Most in one minute: 9, at \d\d:\d\d", words(browser))
    assert re.search(r"last minute 0 0 0 0 .*last 10 minutes 7 0 2 0 .*60 minutes 7 3 2 0",
                     words(browser))  # fmt: skip
    assert "8 accepted" in words(opened(zmi, "?span=day"))


def test_nothing_happened(zmi):
    text = words(opened(zmi))
    assert "Nothing was sent since" in text
    assert "Trouble None." in text


def test_trouble(zmi, monkeypatch):
    monkeypatch.setattr(zmi.outbox.journal, "trouble", "disk full <b>")
    with SMTPServer() as server:
        port = server.port
        put(zmi, relay_account(server, port=port))
    send(zmi)
    zmi.outbox.processor().run(forever=False)
    browser = opened(zmi)
    assert "The journal cannot be written: disk full &lt;b&gt;" in browser.contents
    assert re.search(r"alice@example.org waits since \d+s, next try in", words(browser))
