"""``cpsmail run --workers N``: real processes, real relays, real kills."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import transaction

from cli_helpers import DEADLINE, MAIL, Site
from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.cli.run import arguments_of
from cpsmailaccess_delivery.envelope import digest
from cpsmailaccess_delivery.share import Share
from cpsmailaccess_delivery.smtp.machine import WINDOW
from cpsmailaccess_delivery.supervisor import (
    SILENCE,
    Supervisor,
    delay_after,
    own_command,
)
from cpsmailaccess_delivery.testing import SMTPServer

#: Two mailboxes of each of two workers.
BOXES = [
    [b for b in (f"box{n}@example.org" for n in range(30)) if Share(i, 2).owns(digest(b))][:2]
    for i in range(2)
]


class Workers:
    """``cpsmail run --workers 2`` and its log."""

    def __init__(self, site: Site, *more: str, **options: object) -> None:
        self.log = site.path.with_name("log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                site.process_command("run", "--workers", "2", *more),
                env=site.environ,
                stdin=subprocess.DEVNULL,
                stderr=log,
                **options,
            )

    def wait_for(self, pattern: str, count: int = 1) -> list[str]:
        """Return what stands in the log so often."""
        deadline = time.monotonic() + DEADLINE
        while len(found := re.findall(pattern, self.text)) < count:
            assert time.monotonic() < deadline, self.text
            assert self.process.poll() is None or re.findall(pattern, self.text), self.text
            time.sleep(0.02)
        return found

    @property
    def text(self) -> str:
        return self.log.read_text()

    def pids(self, count: int = 2) -> list[int]:
        """Return the processes of worker 0 and worker 1, when they deliver."""
        self.wait_for(r"delivering ", count)
        found = re.findall(r"worker (\d) is process (\d+)", self.text)
        return [[int(pid) for index, pid in found if index == str(i)][-1] for i in range(2)]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)


def wait_until_dead(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return  # nobody waits for it here, but it is dead
        assert time.monotonic() < deadline, f"process {pid} still lives"
        time.sleep(0.02)


def stock(site: Site, server: SMTPServer, each: int, **settings: object) -> list[str]:
    """Queue mails for all four mailboxes; return their Message-Ids."""
    ids = []
    with site.outbox() as outbox, transaction.manager:
        for box in [*BOXES[0], *BOXES[1]]:
            outbox.accounts.put(
                Account(
                    mailbox=box, host="127.0.0.1", port=server.port, security="plain", **settings
                )
            )
            ids += [outbox.delivery.send(box, ["bob@example.net"], MAIL) for _ in range(each)]
    return ids


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def workers(site: Site) -> Iterator[Workers]:
    workers = Workers(site, "--stop-timeout", "15")
    try:
        yield workers
    finally:
        workers.process.kill()
        workers.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_delivered_and_stopped(site: Site, number: signal.Signals) -> None:
    with SMTPServer() as server:
        ids = stock(site, server, 20)
        workers = Workers(site)
        try:
            server.wait_for(len(ids), DEADLINE)
            pids = workers.pids()
            assert workers.end(number) == 0, workers.text
        finally:
            workers.process.kill()
        for pid in pids:
            wait_until_dead(pid)
        assert Counter(mail.message_id for mail in server.mails) == Counter(ids)
        assert len(workers.wait_for(r"stopped: 40 accepted, 0 deferred")) == 2  # each its lanes
    assert site.json("queue")["mails"] == []


def test_each_lane_has_one_owner_and_keeps_its_limits(site: Site, workers: Workers) -> None:
    with SMTPServer() as server:
        rule = server.on("MAIL", silence=True)
        stock(site, server, 40, connections=1)
        server.wait_until(lambda: rule.hits == 4, DEADLINE)
        workers.pids()
        assert server.open_sessions == 4  # one of each account, over all workers
        server.forget(rule)
        server.drop_sessions()


def test_killed_in_the_middle(site: Site, workers: Workers) -> None:
    with SMTPServer(latency=0.002) as server:
        ids = stock(site, server, 200)
        server.wait_for(100, DEADLINE)
        victim = workers.pids()[0]
        os.kill(victim, signal.SIGKILL)
        server.wait_until(lambda: len({m.message_id for m in server.mails}) == len(ids), DEADLINE)
        workers.wait_for(rf"worker 0, process {victim}, died of signal 9; starting another")
        assert workers.pids(count=3)[0] != victim
        assert workers.end() == 0, workers.text
        counts = Counter(mail.message_id for mail in server.mails)
    assert set(counts) == set(ids)
    # Twice: what was taken, and the reply not read or not recorded when the worker died.
    twice = [message_id for message_id, count in counts.items() if count > 1]
    assert max(counts.values()) <= 2
    assert len(twice) <= 2 * 3 * WINDOW  # lanes of a worker, sessions of each, mails in flight
    assert site.json("queue")["mails"] == []


def test_a_dead_supervisor_takes_its_workers_along(workers: Workers) -> None:
    pids = workers.pids()
    workers.process.kill()
    for pid in pids:
        wait_until_dead(pid)


def test_a_signal_to_every_process_is_one_order(workers: Workers) -> None:
    """As Ctrl-C on a terminal, or systemd without KillMode=mixed."""
    for pid in workers.pids():
        os.kill(pid, signal.SIGTERM)
    assert workers.end() == 0, workers.text


def test_second_signal_kills_all(site: Site, workers: Workers) -> None:
    with SMTPServer() as server:
        rule = server.on("BODY", silence=True)
        stock(site, server, 1)
        server.wait_until(lambda: rule.hits == 4, DEADLINE)
        pids = workers.pids()
        workers.process.send_signal(signal.SIGTERM)
        workers.wait_for("stopping, within 15 s", 2)
        assert workers.end() == 128 + signal.SIGTERM
        for pid in pids:
            wait_until_dead(pid)


def test_a_worker_that_cannot_live_is_started_later_and_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Patience:
        """A stop event; looking at it is what moves time."""

        looks = 0

        def wait(self, timeout: float) -> bool:
            time.sleep(0.01)
            self.looks += 1
            return self.looks > 400

    patience = Patience()
    supervisor = Supervisor([["false"]], clock=lambda: patience.looks / 20)
    supervisor.run(patience, 0.0)  # type: ignore[arg-type]
    delays = re.findall(r"ended with exit code 1; starting another in (\d+) s", caplog.text)
    assert delays[:4] == ["1", "2", "4", "8"]


def test_one_that_keeps_dying_is_said_louder(caplog: pytest.LogCaptureFixture) -> None:
    looks = iter(range(10**6))
    stop = threading.Event()

    def clock() -> float:
        if "in a row" in caplog.text:
            stop.set()
        return next(looks) / 2

    Supervisor([["false"]], clock=clock).run(stop, 0.0)
    (critical,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert "worker 0 has died young 5 times in a row: the mails of its" in critical.getMessage()


class Clock:
    """Time that passes when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_worker_that_hangs_is_killed_and_replaced(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped by SIGSTOP: it keeps its leases, so that nobody else may send its mails."""
    monkeypatch.setenv("CPSMAIL_OUTBOX", str(site.path))
    clock, stop = Clock(), threading.Event()
    supervisor = Supervisor([own_command(["run", "--worker", "0/2"])], clock=clock)
    thread = threading.Thread(target=supervisor.run, args=(stop, DEADLINE))

    def pid() -> int:
        found = re.search(r"\d+", repr(supervisor))
        return int(found[0]) if found else 0

    with SMTPServer() as server:
        rule = server.on("MAIL", silence=True)
        stock(site, server, 1)
        thread.start()
        try:
            server.wait_until(lambda: rule.hits == 2, DEADLINE)
            victim = pid()
            clock.now += SILENCE - 1  # a little patience
            os.kill(victim, signal.SIGSTOP)
            server.forget(rule)
            server.drop_sessions()
            deadline = time.monotonic() + DEADLINE
            while pid() == victim or not pid():
                assert time.monotonic() < deadline
                clock.now += SILENCE + 1
                time.sleep(0.3)
            server.wait_for(2, DEADLINE)
        finally:
            stop.set()
            thread.join(DEADLINE)
    assert not thread.is_alive()
    wait_until_dead(victim)
    assert f"worker 0, process {victim}: no sign of life for" in caplog.text


@pytest.mark.parametrize(("pulses", "beats"), [("1.0", 1), ("next(numbers)", 3), ("None", 3)])
def test_the_heart_beats_with_the_loop_only(pulses: str, beats: int) -> None:
    code = f"""
from itertools import count
from cpsmailaccess_delivery.supervisor import Heart
numbers = count(1.0)
heart = Heart(lambda: {pulses})
for _ in range(3):
    heart.beat()
heart.close()
heart.beat()
"""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        subprocess.run(
            [sys.executable, "-c", code], stdin=theirs.fileno(), timeout=DEADLINE, check=True
        )
        ours.settimeout(DEADLINE)
        assert ours.recv(100) == b"." * beats


def test_growth_has_an_end() -> None:
    assert [delay_after(n) for n in (0, 1, 2, 3, 1000)] == [0.0, 1.0, 2.0, 4.0, 60.0]


def test_workers_get_our_options() -> None:
    options = {"outbox": "a b", "retry.first": "3"}
    assert arguments_of("x.toml", options) == [
        *("--config", "x.toml", "--set", "outbox=a b", "--set", "retry.first=3")
    ]


def test_wrong_settings_end_it_before_any_worker(site: Site) -> None:
    done = subprocess.run(
        site.process_command("--set", "max_sessions=0", "run", "--workers", "2"),
        env=site.environ,
        capture_output=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 78
    assert b"max_sessions" in done.stderr


def test_open_files_are_raised(site: Site) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = (256, min(hard, 4096) if hard != resource.RLIM_INFINITY else 4096)
    workers = Workers(
        site, "-v", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    )
    try:
        for pid in (workers.process.pid, *workers.pids()):
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.search(rf"Max open files +{limit[1]} ", limits)
        assert f"open files: limit raised from 256 to {limit[1]}" in workers.text
        assert workers.end() == 0
    finally:
        workers.process.kill()
