"""`cpsmail run`, as a process: signals, logs, other processes that send."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_helpers import DEADLINE, Site
from cpsmailaccess_delivery.envelope import digest
from cpsmailaccess_delivery.interfaces import LaneNote
from cpsmailaccess_delivery.testing import SMTPServer


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


class Running:
    """``cpsmail run`` in a process; its log, line by line."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.log = b""

    def wait_for(self, text: bytes) -> None:
        assert self.process.stderr is not None
        while text not in self.log:
            line = self.process.stderr.readline()
            assert line, self.log
            self.log += line

    def end(self) -> int:
        _, rest = self.process.communicate(timeout=DEADLINE)
        self.log += rest
        return self.process.returncode


@pytest.fixture
def running(site: Site) -> Iterator[Running]:
    process = site.process("run", "-v", "--stop-timeout", "20")
    running = Running(process)
    try:
        running.wait_for(b"delivering ")
        yield running
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_delivers_until_a_signal(site: Site, running: Running, number: signal.Signals) -> None:
    with SMTPServer() as server:
        site.account(server)
        site.send()
        server.wait_for(1, DEADLINE)
        running.process.send_signal(number)
        assert running.end() == 0
    assert b"stopped: 1 accepted, 0 deferred" in running.log
    assert site.json("queue")["mails"] == []


def test_second_signal_ends_it_at_once(site: Site, running: Running) -> None:
    with SMTPServer() as server:
        rule = server.on("BODY", silence=True)
        site.account(server)
        site.send()
        server.wait_until(lambda: rule.hits, DEADLINE)
        running.process.send_signal(signal.SIGTERM)
        running.wait_for(b"stopping, within 20 s")
        running.process.send_signal(signal.SIGTERM)
        assert running.end() == 128 + signal.SIGTERM
    assert len(site.json("queue")["mails"]) == 1


def test_what_relays_say_does_no_harm_in_the_log(site: Site, running: Running) -> None:
    with SMTPServer() as server:
        server.on("GREETING", reply="554 go away \x1b[31m")
        site.account(server)
        site.send()
        running.wait_for(b"go away")
        running.process.send_signal(signal.SIGTERM)
        assert running.end() == 0
    assert b"\x1b" not in running.log


def test_dead_by_kill_then_drained(site: Site, running: Running) -> None:
    with SMTPServer() as server:
        rule = server.on("MAIL", silence=True)
        site.account(server)
        site.send()
        server.wait_until(lambda: rule.hits, DEADLINE)
        running.process.kill()
        running.end()
        server.forget(rule)
        assert site.run("drain").output.startswith("1 accepted")
        assert len(server.mails) == 1


def test_log_begins_with_what_waits(site: Site) -> None:
    note = LaneNote("*", "relay", "nobody \x1b listens", time.time(), time.time() + 600)
    with site.outbox() as outbox:
        outbox.spool.note_lane(digest("*"), note)
    process = site.process("run")
    try:
        running = Running(process)
        running.wait_for(b"INFO * waits already, next try in 10m: nobody \\x1b listens")
        process.send_signal(signal.SIGTERM)
        assert running.end() == 0
    finally:
        process.kill()
        process.communicate()


def test_makes_the_outbox(site: Site, running: Running) -> None:
    running.process.send_signal(signal.SIGTERM)
    assert running.end() == 0
    assert site.path.stat().st_mode & 0o777 == 0o700
