"""Metrics as Prometheus reads them: over HTTP, while mails are delivered."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transaction

from cli_helpers import DEADLINE, MAIL, Site
from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.errors import InvalidSettings
from cpsmailaccess_delivery.metrics import OTHERS, bounded, require_client, serve
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.summary import TIME_BOUNDS, Times
from cpsmailaccess_delivery.testing import SMTPServer

prometheus_parser = pytest.importorskip("prometheus_client.parser")

Samples = dict[tuple[str, str], float]


def free_ports(count: int) -> int:
    """Return the first of so many free ports in a row."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                for more in range(1, count):
                    with socket.socket() as other:
                        other.bind(("127.0.0.1", port + more))
            except (OSError, OverflowError):
                continue
            return port


def scrape(port: int) -> Samples:
    """Return all values, by name and the value of the only label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=DEADLINE) as answer:
        text = answer.read().decode()
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in prometheus_parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape_until(port: int, wanted: Callable[[Samples], bool]) -> Samples:
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            found = scrape(port)
            if wanted(found):
                return found
        except OSError:  # not yet
            found = {}
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox", schedule=Schedule(first=3600.0)) as outbox:
        yield outbox


def put(outbox: Outbox, server: SMTPServer, *mailboxes: str) -> None:
    with transaction.manager:
        for mailbox in mailboxes:
            outbox.accounts.put(
                Account(mailbox=mailbox, host="127.0.0.1", port=server.port, security="plain")
            )


def send(outbox: Outbox, sender: str, to: str = "bob@example.net") -> str:
    with transaction.manager:
        return str(outbox.delivery.send(sender, [to], MAIL))


def test_scraped_while_delivering_with_a_stuck_lane(outbox: Outbox) -> None:
    with SMTPServer() as server, SMTPServer() as stuck:
        stuck.on("MAIL", silence=True)
        server.on("RCPT", reply="450 4.2.0 later", match="later@")
        server.on("RCPT", reply="550 5.1.1 never", match="never@")
        put(outbox, server, "good@example.org")
        put(outbox, stuck, "stuck@example.org")
        processor = outbox.processor()
        port = free_ports(1)
        close = serve(processor, address="127.0.0.1", port=port)
        try:
            before = scrape(port)
            assert before["cpsmail_heartbeat_timestamp_seconds", ""] == 0
            processor.start()
            send(outbox, "stuck@example.org")  # in flight: none is ready
            for to in ("bob@x.org", "carol@x.org", "later@x.org", "never@x.org"):
                send(outbox, "good@example.org", to)
            done = scrape_until(
                port,
                lambda found: (
                    found.get(("cpsmail_mails_total", "accepted"))
                    == 3  # one is the notice of `never`
                    and found["cpsmail_mails_total", "deferred"] == 1
                    and found["cpsmail_mails_total", "refused"] == 1
                    and found["cpsmail_queue_mails", "queued"] == 1
                    and found["cpsmail_queue_mails", "deferred"] == 1  # its watch tells
                ),
            )
            assert done["cpsmail_mails_total", "unclear"] == 0
            assert done["cpsmail_oldest_due_seconds", "good@example.org"] == 0
            assert done["cpsmail_lanes", ""] == 2
            assert done["cpsmail_sessions", ""] >= 1
            assert done["cpsmail_lanes_waiting", "paused"] == 0
            assert done["cpsmail_attempt_seconds_count", ""] == 5
            assert done["cpsmail_attempt_seconds_bucket", "+Inf"] == 5
            assert abs(done["cpsmail_heartbeat_timestamp_seconds", ""] - time.time()) < DEADLINE
            age = done["cpsmail_oldest_due_seconds", "stuck@example.org"]
            scrape_until(
                port,
                lambda found: found["cpsmail_oldest_due_seconds", "stuck@example.org"] > age + 0.5,
            )
        finally:
            close()
            assert processor.stop(timeout=0.1)


def test_a_paused_lane_and_mails_for_a_person(outbox: Outbox) -> None:
    with SMTPServer() as server:
        server.on("RCPT", reply="550 5.1.1 never")
        put(outbox, server, "good@example.org")
        send(outbox, "good@example.org")
        outbox.processor().run(forever=False)
        server.stop_accepting()
        send(outbox, "good@example.org")
        processor = outbox.processor()
        processor.start()
        port = free_ports(1)
        close = serve(processor, address="127.0.0.1", port=port)
        try:
            scrape_until(
                port,
                lambda found: (
                    found.get(("cpsmail_lanes_waiting", "paused")) == 1
                    and found["cpsmail_queue_mails", "refused"] == 1  # its notice has left
                    and found["cpsmail_queue_mails", "queued"] == 1
                ),
            )
        finally:
            close()


def test_each_worker_has_its_port(tmp_path: Path) -> None:
    site = Site(tmp_path)
    port = free_ports(2)
    process = site.process("run", "--workers", "2", "--metrics-port", str(port))
    try:
        with SMTPServer() as server:
            site.account(server)
            site.send()
            server.wait_for(1, DEADLINE)
            both = [
                scrape_until(port + i, lambda found: ("cpsmail_sessions", "") in found)
                for i in range(2)
            ]
            assert sum(found["cpsmail_lanes", ""] for found in both) == 1
        process.terminate()
        _, log = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, log
        assert f"metrics at http://127.0.0.1:{port + 1}/metrics".encode() in log
    finally:
        process.kill()
        process.communicate()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(InvalidSettings, match=r"pip install 'cpsmailaccess_delivery\[metrics\]'"):
        require_client()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = site.run("run", "--metrics-port", port, code=74).output
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use: choose" in said


def test_imported_only_when_asked() -> None:
    code = (
        "import sys, cpsmailaccess_delivery.cli, cpsmailaccess_delivery.metrics\n"
        "assert 'prometheus_client' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE)


def test_labels_are_bounded() -> None:
    ages = {f"lane{n}": float(n) for n in range(10)}
    assert bounded(ages, 10) == ages
    assert bounded(ages, 2) == {"lane9": 9.0, "lane8": 8.0, OTHERS: 7.0}


def test_times() -> None:
    times = Times()
    for seconds in (0.0, TIME_BOUNDS[0], 0.006, 1000.0):
        times.add(seconds)
    assert times.counts[:2] == [2, 1]
    assert times.counts[-1] == 1
    assert times.total == pytest.approx(1000.011)
