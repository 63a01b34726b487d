"""The transport, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
from collections.abc import Callable

import pytest
import trustme

from cpsmailaccess_delivery.account import Secret
from cpsmailaccess_delivery.outcome import Phase, Trouble, classify
from cpsmailaccess_delivery.smtp import session as session_module
from cpsmailaccess_delivery.smtp.check import check_async
from cpsmailaccess_delivery.smtp.session import Session
from cpsmailaccess_delivery.smtp.tls import client_context
from smtp_helpers import CHUNKING, MODES, PIPELINING, Relay, RelayServer, account, letter

DEADLINE = 20


class Lane:
    """A source that remembers."""

    def __init__(self, letters=()):
        self.queue = list(letters)
        self.given = []
        self.done = []
        self.unsent = []
        self.ready = 0
        self.closed = []
        self.changed = asyncio.Event()

    def next_mail(self):
        if not self.queue:
            return None
        self.given.append(self.queue.pop(0))
        return self.given[-1]

    def mail_done(self, mail, results):
        assert not self.closed
        self.done.append((mail, results))
        self.changed.set()

    def mail_unsent(self, mail):
        assert not self.closed
        self.unsent.append(mail)
        self.changed.set()

    def session_ready(self, session):
        self.ready += 1
        self.changed.set()

    def session_closed(self, session, failure):
        assert session.is_closed
        self.closed.append(failure)
        self.changed.set()

    async def until(self, condition: Callable[[], object]):
        async with asyncio.timeout(DEADLINE):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def states(self):
        return [
            str(classify(r.phase, r.reply, r.error).state)
            for _, results in self.done
            for r in results.values()
        ]


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    authority = trustme.CA()
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    authority.path = str(path)
    return authority


def server_context(ca, *names):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(*(names or ("127.0.0.1",))).configure_cert(context)
    return context


@contextlib.asynccontextmanager
async def serving(make=Relay, *, tls=None, starttls=None):
    """Serve relays made by `make`; yields the port, and the list of connections."""
    connections = []

    def factory():
        connections.append(RelayServer(make, starttls))
        return connections[-1]

    loop = asyncio.get_running_loop()
    server = await loop.create_server(factory, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1], connections
    finally:
        server.close()
        for connection in connections:
            if connection.transport is not None:
                connection.transport.abort()
        await server.wait_closed()
        for _ in range(3):
            await asyncio.sleep(0)


def open_session(lane, port, *, password=None, **settings):
    session = Session(
        account(port=port, **settings),
        Secret(password) if password else None,
        lane,
        helo_name="me.example.org",
        loop=asyncio.get_running_loop(),
    )
    session.connect()
    return session


def run(work):
    asyncio.run(work())
    gc.collect()  # an unclosed transport warns now, and here


@pytest.mark.parametrize("keywords", MODES.values(), ids=MODES)
@pytest.mark.parametrize("security", ["plain", "starttls", "tls"])
def test_drains_and_quits(keywords, security, ca):
    async def work():
        context = server_context(ca)
        keys = (*keywords, "STARTTLS", "AUTH PLAIN")
        relay = Relay(keys)
        serve = serving(
            lambda: relay,
            tls=context if security == "tls" else None,
            starttls=context if security == "starttls" else None,
        )
        async with serve as (port, _):
            lane = Lane([letter(n) for n in range(50)])
            session = open_session(
                lane, port, security=security, verify=ca.path, username="a", password="b"
            )
            await lane.until(lambda: len(lane.done) == 50)
            assert session.is_idle
            assert bool(session.cipher) is (security != "plain")
            lane.queue = [letter(51)]
            session.wake()
            await lane.until(lambda: len(lane.done) == 51)
            session.quit()
            await lane.until(lambda: lane.closed)
        assert lane.closed == [None]
        assert lane.ready == 1
        assert set(lane.states()) == {"accepted"}
        assert session.accepted == 51
        assert len(relay.delivered) == 51
        assert relay.commands[-1] == "QUIT"
        assert relay.logins == [("a", "b")]

    run(work)


@pytest.mark.parametrize("security", ["plain", "tls"])
@pytest.mark.parametrize("keywords", [PIPELINING, CHUNKING])
def test_big_mails_to_a_relay_that_reads_slowly(security, keywords, ca):
    async def work():
        context = server_context(ca) if security == "tls" else None
        relay = Relay(keywords=[k for k in keywords if "SIZE" not in k])
        async with serving(lambda: relay, tls=context) as (port, connections):
            body = b"Subject: x\r\n\r\n" + b".line of text\r\n" * 400_000
            lane = Lane([letter(1, message=body), letter(2), letter(3, message=body)])
            session = open_session(lane, port, security=security, verify=ca.path)
            await lane.until(lambda: lane.ready)
            transport = connections[0].transport
            transport.pause_reading()
            for _ in range(20):
                await asyncio.sleep(0)
            assert session._transport.get_write_buffer_size() < 2_000_000
            transport.resume_reading()
            await lane.until(lambda: len(lane.done) == 3)
            assert relay.delivered[0][2] == body
            session.quit()
            await lane.until(lambda: lane.closed)
        assert lane.closed == [None]

    run(work)


def test_nothing_listens():
    async def work():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            lane = Lane([letter(1)])
            open_session(lane, taken.getsockname()[1])
            await lane.until(lambda: lane.closed)
        (failure,) = lane.closed
        assert failure.phase is Phase.CONNECT
        assert classify(failure.phase, failure.reply, failure.error).trouble is Trouble.RELAY
        assert not lane.given

    run(work)


@pytest.mark.parametrize("how", ["quit", "stop", "abort"])
def test_ended_while_connecting(how):
    async def work():
        async with serving(lambda: Relay(greeting="")) as (port, _):
            lane = Lane([letter(1)])
            session = open_session(lane, port)
            getattr(session, how)()  # before the task has begun
            await lane.until(lambda: lane.closed)
            assert lane.closed == [None]
            lane = Lane([letter(1)])
            session = open_session(lane, port)
            while not session.peer:
                await asyncio.sleep(0)
            getattr(session, how)()
            getattr(session, how)()
            await lane.until(lambda: lane.closed)
            assert lane.closed == [None]
            assert not lane.given

    run(work)


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_certificate_of_another_name(security, ca):
    async def work():
        context = server_context(ca, "other.example")
        serve = serving(
            lambda: Relay(("STARTTLS",)),
            tls=context if security == "tls" else None,
            starttls=context if security == "starttls" else None,
        )
        async with serve as (port, _):
            lane = Lane([letter(1)])
            open_session(lane, port, security=security, verify=ca.path)
            await lane.until(lambda: lane.closed)
            (failure,) = lane.closed
            assert failure.phase is Phase.TLS
            assert isinstance(failure.error, ssl.SSLCertVerificationError)
            lane = Lane([letter(1)])
            session = open_session(lane, port, security=security, verify=False)
            await lane.until(lambda: lane.done)
            session.abort()
            await lane.until(lambda: lane.closed)
            assert lane.states() == ["accepted"]

    run(work)


@pytest.mark.parametrize(
    ("silent", "phase"),
    [
        ("", Phase.GREETING),
        ("EHLO", Phase.HELLO),
        ("MAIL", Phase.MAIL),
        ("RCPT", Phase.RCPT),
        ("DATA", Phase.DATA),
        ("END", Phase.BODY),
    ],
)
def test_every_silence_has_a_deadline(silent, phase):
    def rule(line, _):
        return "" if silent and line.startswith(silent) else None

    async def work():
        keywords = MODES["serial"]
        make = lambda: Relay(keywords, rule, greeting="220 hi" if silent else "")  # noqa: E731
        async with serving(make) as (port, _):
            lane = Lane([letter(1)])
            open_session(lane, port, command_timeout=0.1, data_timeout=0.1)
            await lane.until(lambda: lane.closed)
            (failure,) = lane.closed
            assert failure.phase is phase
            assert isinstance(failure.error, TimeoutError)
            assert "no reply within 0.1 seconds" in failure.text
            if phase is Phase.BODY:
                assert lane.states() == ["unclear"]
            elif lane.given:
                assert lane.states() == ["deferred"]

    run(work)


def test_a_relay_that_never_shakes_hands_has_a_deadline():
    async def work():
        async with serving(lambda: Relay(greeting="", deaf=True)) as (port, _):
            lane = Lane([letter(1)])
            open_session(lane, port, security="tls", verify=False, connect_timeout=0.3)
            await lane.until(lambda: lane.closed)
        (failure,) = lane.closed
        assert failure.phase is Phase.TLS
        assert "no connection within 0.3 seconds" in failure.text
        assert not lane.given

    run(work)


def test_slow_drip_extends_nothing():
    async def work():
        async with serving(lambda: Relay(greeting="")) as (port, connections):
            lane = Lane([letter(1)])
            open_session(lane, port, command_timeout=0.2)

            async def drip():
                while True:
                    for connection in connections:
                        connection.transport.write(b"220-x\r\n")
                    await asyncio.sleep(0.01)

            dripping = asyncio.ensure_future(drip())
            await lane.until(lambda: lane.closed)
            dripping.cancel()
            assert isinstance(lane.closed[0].error, TimeoutError)

    run(work)


def test_relay_that_never_reads_has_a_deadline():
    async def work():
        relay = Relay(keywords=["PIPELINING"])
        async with serving(lambda: relay) as (port, connections):
            lane = Lane([letter(1, message=b"x" * 30_000_000)])
            open_session(lane, port, command_timeout=0.3, data_timeout=0.3)
            await lane.until(lambda: lane.ready)
            async with asyncio.timeout(DEADLINE):
                while "DATA" not in relay.commands:
                    await asyncio.sleep(0)
            connections[0].transport.pause_reading()
            await lane.until(lambda: lane.closed)
            assert lane.states() == ["deferred"]  # the end of data was never written

    run(work)


def test_server_that_vanishes():
    async def work():
        async with serving(Relay) as (port, connections):
            lane = Lane([letter(1)])
            open_session(lane, port)
            await lane.until(lambda: lane.done)
            connections[0].transport.abort()
            await lane.until(lambda: lane.closed)
            assert lane.closed == [None]

    run(work)


def test_stop_finishes_what_is_past_its_end_of_data():
    async def work():
        relay = Relay(PIPELINING)
        lane = Lane([letter(n) for n in range(5)])

        def rule(line, _):
            if line == "END":
                session.stop()
            return

        relay.rule = rule
        async with serving(lambda: relay) as (port, _):
            session = open_session(lane, port)
            await lane.until(lambda: lane.closed)
        assert lane.closed == [None]
        assert lane.states() == ["accepted"]
        assert len(lane.unsent) == len(lane.given) - 1
        assert len(relay.delivered) == 1

    run(work)


def test_abort_in_flight():
    async def work():
        relay = Relay(PIPELINING)
        lane = Lane([letter(n) for n in range(5)])
        relay.rule = lambda line, _: session.abort() if line == "END" else None
        async with serving(lambda: relay) as (port, _):
            session = open_session(lane, port)
            await lane.until(lambda: lane.closed)
        assert lane.closed == [None]
        assert lane.states() == ["unclear"]
        assert len(lane.unsent) == len(lane.given) - 1

    run(work)


def test_source_may_call_back_from_within():
    async def work():
        class Restless(Lane):
            def mail_done(self, mail, results):
                super().mail_done(mail, results)
                session.wake()
                if len(self.done) == 3:
                    session.quit()

            def next_mail(self):
                session.wake()
                return super().next_mail()

        async with serving(Relay) as (port, _):
            lane = Restless([letter(n) for n in range(9)])
            session = open_session(lane, port)
            await lane.until(lambda: lane.closed)
        assert len(lane.done) + len(lane.unsent) == len(lane.given) < 9
        assert lane.closed == [None]

    run(work)


def test_a_source_that_raises_loses_nothing():
    async def work():
        said = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))

        class Broken(Lane):
            def mail_done(self, mail, results):
                super().mail_done(mail, results)
                raise RuntimeError("a bug")

            def next_mail(self):
                mail = super().next_mail()
                if mail is None:
                    raise OSError("disk")
                return mail

        async with serving(lambda: Relay(CHUNKING)) as (port, _):
            lane = Broken([letter(n) for n in range(5)])
            session = open_session(lane, port)
            await lane.until(lambda: len(lane.done) == 5)
            session.quit()
            await lane.until(lambda: lane.closed)
        assert lane.closed == [None]
        assert lane.states() == ["accepted"] * 5
        assert "mail_done failed" in str(said)
        assert "next_mail failed" in str(said)

    run(work)


def test_three_sessions_share_the_receive_buffer():
    async def work():
        async with serving(Relay) as (port, connections):
            lane = Lane([letter(n) for n in range(300)])
            sessions = [open_session(lane, port) for _ in range(3)]
            await lane.until(lambda: len(lane.done) == 300)
            for session in sessions:
                session.quit()
            await lane.until(lambda: len(lane.closed) == 3)
            assert sum(len(c.relay.delivered) for c in connections) == 300
            assert all(c.relay.delivered for c in connections)

    run(work)


def test_contexts_are_kept_and_renewed(ca, tmp_path):
    assert client_context(True) is client_context(True)
    assert client_context(True).verify_mode is ssl.CERT_REQUIRED
    assert client_context(True).check_hostname
    assert client_context(False).verify_mode is ssl.CERT_NONE
    path = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(path))
    first = client_context(str(path))
    assert client_context(str(path)) is first
    assert first.minimum_version is ssl.TLSVersion.TLSv1_2
    os.utime(path, (1, 1))
    assert client_context(str(path)) is not first


def test_one_timer_per_session():
    async def work():
        async with serving(Relay) as (port, _):
            lane = Lane([letter(n) for n in range(100)])
            session = open_session(lane, port)
            await lane.until(lambda: len(lane.done) == 100)
            live = [t for t in asyncio.get_running_loop()._scheduled if not t.cancelled()]
            assert len([t for t in live if t._callback == session._on_timer]) == 1
            session.quit()
            await lane.until(lambda: lane.closed)

    run(work)


def test_stopped_in_the_middle_of_a_handshake():
    async def work():
        def only_220(line, relay):
            relay.deaf = line == "STARTTLS"
            return "220 go" if relay.deaf else None

        def make():
            return Relay(("STARTTLS",), only_220)

        async with serving(make) as (port, connections):
            lane = Lane([letter(1)])
            session = open_session(lane, port, security="starttls", verify=False)
            async with asyncio.timeout(DEADLINE):
                while not connections or connections[0].relay.commands[-1:] != ["STARTTLS"]:
                    await asyncio.sleep(0)
                while session._shaken is None:
                    await asyncio.sleep(0)
            session.stop()
            session.get_buffer(0)[:8] = b"no TLS.."  # it was on its way
            session.buffer_updated(8)
            await lane.until(lambda: lane.closed)
            assert lane.closed == [None]
            lane = Lane([letter(1)])
            open_session(lane, port, security="starttls", verify=False, connect_timeout=0.3)
            await lane.until(lambda: lane.closed)
            assert lane.closed[0].phase is Phase.TLS
            assert "within 0.3 seconds" in lane.closed[0].text

    run(work)


# check


def check(port, ca=None, password=None, **settings):
    if ca is not None:
        settings["verify"] = ca.path
    secret = Secret(password) if password else None
    return check_async(account(port=port, **settings), secret, helo_name="me.example.org")


def test_check_of_a_good_account(ca):
    async def work():
        relay = Relay(("STARTTLS", "AUTH PLAIN", "PIPELINING"))
        async with serving(lambda: relay, starttls=server_context(ca)) as (port, _):
            report = await check(port, ca, "secret", security="starttls", username="alice")
        assert report.ok
        assert not report.problem
        assert report.tls.startswith("TLSv1.")
        assert report.capabilities.pipelining
        assert [step.split()[0] for step in report.steps] == [
            "connected", "encrypted:", "offers", "logged",
        ]  # fmt: skip
        assert relay.commands[-1] == "QUIT"
        assert "secret" not in repr(report)

    run(work)


def test_check_says_what_to_do(ca):
    async def work():
        wrong = lambda line, _: "535 5.7.8 no" if line == "LOGIN" else None  # noqa: E731
        plain = lambda: Relay((), wrong)  # noqa: E731
        logins = lambda: Relay(("AUTH PLAIN",), wrong)  # noqa: E731
        login = {"username": "alice", "password": "wrong"}
        async with serving(plain) as (port, _):
            report = await check(port, security="starttls")
            assert "does not offer STARTTLS" in report.problem
            report = await check(port, security="tls")
            assert 'security="starttls"' in report.problem
            report = await check(port, **login)
            assert "does not let us log in" in report.problem
        async with serving(logins) as (port, _):
            report = await check(port, **login)
            assert "username and password" in report.problem
        async with serving(plain, tls=server_context(ca, "other.example")) as (port, _):
            report = await check(port, ca, security="tls")
            assert "another name than 127.0.0.1" in report.problem
            report = await check(port, security="tls")
            assert "CA file" in report.problem
            report = await check(port, security="plain", command_timeout=0.2)
            assert 'security="tls"' in report.problem
            report = await check(port, security="tls", verify="/nonexistent.pem")
            assert "CA file" in report.problem
        report = await check(port)
        assert "Nothing listens" in report.problem
        report = await check(25, host="no-such-host.invalid")
        assert "no host" in report.problem or "looked up" in report.problem
        assert not report.ok
        assert report.failure.phase is Phase.CONNECT

    run(work)


def test_the_buffer_belongs_to_the_thread():
    assert session_module._receive_buffer() is session_module._receive_buffer()
