"""Hosts that are cut off from the database: each in a network namespace, the links real."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import transaction

pytest.importorskip("psycopg", reason="needs the extra [postgres]")

from conftest import KEY
from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.recorder import _MANY_UNSETTLED
from cpsmailaccess_delivery.smtp.machine import WINDOW
from postgres_helpers import ALICE, BOB, MESSAGE, wait_for
from postgres_server import Server, why_none

HERE = Path(__file__).parent
LEASE = 2  # seconds

#: Where the relay listens; the hosts have a way to it that is not the way to the database.
RELAY = "10.215.0.1"

#: How soon a host notices that the database is not there.
_URL = f"?lease={LEASE}&connect_timeout=2&tcp_user_timeout=1500&keepalives_idle=1" + (
    "&keepalives_interval=1&keepalives_count=2"
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30, capture_output=True)


class Network:
    """A hub with database and relay, and two hosts, each with a link to either."""

    def __init__(self) -> None:
        mark = f"{os.getpid():x}"[-6:]
        self.hub, self.hosts = f"cm{mark}h", {"a": f"cm{mark}a", "b": f"cm{mark}b"}
        self._links = {
            (host, link): f"{mark}{host}{link[0]}"
            for host in "ab"
            for link in ("database", "relay")
        }
        self._made: list[str] = []
        for name in (self.hub, *self.hosts.values()):
            ip("netns", "add", name)
            self._made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.hub, "addr", "add", f"{RELAY}/32", "dev", "lo")
        for number, (host, name) in enumerate(self.hosts.items(), 1):
            for net, link in ((213, "database"), (214, "relay")):
                here, there = self._links[host, link], f"{self._links[host, link]}x"
                ip("link", "add", here, "netns", self.hub, "type", "veth", "peer", "name", there)
                ip("link", "set", there, "netns", name)
                for where, device, end in ((self.hub, here, 1), (name, there, 2)):
                    ip("-n", where, "addr", "add", f"10.{net}.{number}.{end}/24", "dev", device)
                    ip("-n", where, "link", "set", device, "up")
            ip("-n", name, "route", "add", RELAY, "via", f"10.214.{number}.1")

    @staticmethod
    def database_of(host: str) -> str:
        """Return the address at which a host reaches the database."""
        return f"10.213.{'ab'.index(host) + 1}.1"

    def cut(self, host: str, link: str = "database") -> None:
        ip("-n", self.hub, "link", "set", self._links[host, link], "down")

    def mend(self, host: str, link: str = "database") -> None:
        ip("-n", self.hub, "link", "set", self._links[host, link], "up")

    def remove(self) -> None:
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=30)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if shutil.which("ip") is None:
        pytest.skip("there is no ip (Debian: iproute2)")
    try:
        made = Network()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode()}")
    yield made
    made.remove()


@pytest.fixture(scope="module")
def server(network: Network) -> Iterator[Server]:
    if reason := why_none():
        pytest.skip(reason)
    made = Server(namespace=network.hub)
    yield made
    made.remove()


class Hosts:
    """What runs where.  `delivered`: (HELO name, Message-Id), as the relay took them."""

    def __init__(self, network: Network, server: Server, name: str) -> None:
        self.network = network
        self._server, self._name = server, name
        self._running: list[subprocess.Popen[str]] = []
        self.delivered: list[tuple[str, str]] = []
        relay = self._run(network.hub, str(HERE / "partition_scenes.py"), "relay", RELAY)
        port = int(relay.stdout.readline())
        threading.Thread(target=self._listen, args=[relay], daemon=True).start()
        self.outbox = Outbox(server.local_url(name), key=KEY)
        self.mailboxes = [ALICE, *(f"m{n}@example.org" for n in range(5))]
        with transaction.manager:
            for mailbox in self.mailboxes:
                self.outbox.accounts.put(
                    Account(mailbox=mailbox, host=RELAY, port=port, security="plain", connections=1)
                )

    def _listen(self, relay: subprocess.Popen[str]) -> None:
        for line in relay.stdout:
            hello, message_id = line.split()
            self.delivered.append((hello, message_id))

    def _run(self, namespace: str, *arguments: str, **environ: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, sys.executable, *arguments],
            env={**os.environ, **environ},
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._running.append(process)
        return process

    def url(self, host: str) -> str:
        return self._server.url(self._name, self.network.database_of(host)) + _URL

    def work(self, host: str) -> subprocess.Popen[str]:
        """Start a worker whose HELO name is the host's."""
        environ = {"CPSMAIL_KEY": KEY.hex(), "CPSMAIL_HELO_NAME": f"{host}.example.org"}
        arguments = ["-m", "cpsmailaccess_delivery", "--outbox", self.url(host), "run"]
        return self._run(self.network.hosts[host], *arguments, **environ)

    def commit(self, host: str, moment: str) -> subprocess.Popen[str]:
        """Start a commit; return when it waits at that moment."""
        arguments = [str(HERE / "partition_scenes.py"), "commit", self.url(host), moment]
        process = self._run(self.network.hosts[host], *arguments)
        assert process.stdout.readline() == f"at the {moment}\n"
        return process

    def send(self, count: int) -> list[str]:
        ids = []
        with transaction.manager:
            for number in range(count):
                mailbox = self.mailboxes[number % len(self.mailboxes)]
                ids.append(self.outbox.delivery.send(mailbox, [BOB], MESSAGE))
        return ids

    def by(self, host: str) -> list[str]:
        return [
            message_id for hello, message_id in self.delivered if hello == f"{host}.example.org"
        ]

    def end(self) -> None:
        for process in self._running:
            process.kill()
            process.communicate()
        self.outbox.close()


@pytest.fixture
def hosts(network: Network, server: Server) -> Iterator[Hosts]:
    url = server.new_database()
    name = url.rpartition("/")[2]
    made = Hosts(network, server, name)
    try:
        yield made
    finally:
        for host in "ab":
            for link in ("database", "relay"):
                network.mend(host, link)
        made.end()
        server.clean(url)


def test_what_a_worker_had_is_sent_by_another(hosts: Hosts) -> None:
    """Cut from the database, not from the relay: it stops by itself, and comes back."""
    ids = hosts.send(300)
    first = hosts.work("a")
    wait_for(lambda: len(hosts.by("a")) >= 10)
    second = hosts.work("b")
    hosts.network.cut("a")
    wait_for(lambda: {message_id for _, message_id in hosts.delivered} == set(ids))
    assert hosts.by("b")
    wait_for(lambda: not list(hosts.outbox.spool.scan()))
    hosts.network.mend("a")
    more = hosts.send(60)
    wait_for(lambda: {message_id for _, message_id in hosts.delivered} == {*ids, *more})
    wait_for(lambda: not list(hosts.outbox.spool.scan()))
    for worker in (first, second):
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    times = Counter(message_id for _, message_id in hosts.delivered)
    again = [message_id for message_id, count in times.items() if count > 1]
    assert all(times[message_id] == 2 for message_id in again)
    # What was on its way in the session of each mailbox, and nothing that it began after so many
    # could not be recorded.
    assert len(again) <= _MANY_UNSETTLED + WINDOW * len(hosts.mailboxes)
    assert not set(again) & set(more)


def test_a_commit_that_cannot_vote_fails_and_sends_nothing(hosts: Hosts) -> None:
    process = hosts.commit("a", "vote")
    hosts.network.cut("a")
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() in ("failed: SpoolError\n", "failed: NotQueued\n")
    hosts.network.mend("a")
    assert list(hosts.outbox.spool.scan()) == []
    assert hosts.outbox.spool.sweep().held == ()


def test_what_was_voted_for_is_published_when_the_link_is_back(hosts: Hosts) -> None:
    process = hosts.commit("a", "finish")
    hosts.network.cut("a")
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "committed\n"  # the others have: there is no way back
    assert list(hosts.outbox.spool.scan()) == []
    hosts.work("b")
    hosts.network.mend("a")
    (message_id,) = wait_for(lambda: hosts.by("b"))  # type: ignore[misc]
    assert [mail for _, mail in hosts.delivered] == [message_id]


def test_a_vote_whose_answer_is_lost_is_not_sent(hosts: Hosts) -> None:
    """The server has the mail, the application has aborted, and cannot say so."""
    connection = hosts.outbox.spool.connections.connect()
    process = hosts.commit("a", "vote")
    with connection.transaction():
        connection.execute("LOCK TABLE cpsmail.mails IN EXCLUSIVE MODE")
        process.stdin.write("\n")
        process.stdin.flush()
        waits = "SELECT 1 FROM pg_locks WHERE NOT granted"
        other = hosts.outbox.spool.connections.connect()
        wait_for(lambda: other.execute(waits).fetchone())
        hosts.network.cut("a")
    assert process.stdout.readline() in ("failed: SpoolError\n", "failed: NotQueued\n")
    query = "SELECT state FROM cpsmail.mails"
    wait_for(lambda: connection.execute(query).fetchall() == [("staged",)])
    assert list(hosts.outbox.spool.scan()) == []  # no processor sees it
    connection.close()
    other.close()
