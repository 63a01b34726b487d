"""TLS without sockets, and what relays do with it: the end of a connection, and faults."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

import pytest
import trustme

from cpsmailaccess_delivery.outcome import Phase
from cpsmailaccess_delivery.smtp import tls as tls_module
from cpsmailaccess_delivery.smtp.tls import Tls, client_context
from smtp_helpers import PIPELINING, Relay, letter
from test_smtp_session import DEADLINE, Lane, open_session, run, server_context, serving

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
REPLY = b"250 2.0.0 queued\r\n"


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    authority = trustme.CA()
    authority.path = str(tmp_path_factory.mktemp("ca") / "ca.pem")
    authority.cert_pem.write_to_path(authority.path)
    return authority


class Server:
    """The relay's side of TLS: bytes of the wire in and out."""

    def __init__(self, ca, version):
        context = server_context(ca)
        context.maximum_version = version
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.established = False

    def receive(self, data: bytes) -> bytes:
        """Return what is decrypted."""
        self._incoming.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            if not self.established:
                self._object.do_handshake()
                self.established = True
            return self._object.read(65536)
        return b""

    def say(self, data: bytes) -> bytes:
        self._object.write(data)
        return self.output()

    def close(self) -> bytes:
        """Return close_notify."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._object.unwrap()
        return self.output()

    def output(self) -> bytes:
        return self._outgoing.read()


@pytest.fixture(params=VERSIONS, ids=lambda version: version.name)
def pair(ca, request):
    client, server = Tls(client_context(ca.path), "127.0.0.1"), Server(ca, request.param)
    while not (client.cipher and server.established):
        client.shake_hands()
        server.receive(client.output())
        client.feed(server.output())
    assert client.decrypt() == b""
    assert client.over is None
    return client, server


def test_with_a_ca_file_the_authorities_of_the_system_do_not_count(ca, tmp_path, monkeypatch):
    system = trustme.CA()
    system.cert_pem.write_to_path(str(tmp_path / "system.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "system.pem"))
    monkeypatch.setattr(tls_module, "_contexts", {})

    def shake_hands(verify):
        client = Tls(client_context(verify), "127.0.0.1")
        server = Server(system, ssl.TLSVersion.TLSv1_3)
        while not client.shake_hands():
            server.receive(client.output())
            client.feed(server.output())

    shake_hands(True)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(ca.path)


def test_what_follows_the_end_of_the_connection_is_not_waited_for(pair):
    client, server = pair
    client.feed(server.say(REPLY) + server.close() + b"and more")
    assert client.decrypt() == REPLY
    assert isinstance(client.over, ConnectionResetError)
    client.feed(b"and more")
    assert client.decrypt() == b""


def test_a_reply_counts_that_came_before_a_fault(pair):
    client, server = pair
    reply, broken = server.say(REPLY), bytearray(server.say(b"220 more\r\n"))
    broken[-1] ^= 1
    client.feed(reply + broken)
    assert client.decrypt() == REPLY
    assert isinstance(client.over, ssl.SSLError)
    assert client.output()  # the alert


class Renegotiating:
    """An SSL object that cannot write before it has read: the relay's part of a handshake."""

    def __init__(self, wrapped):
        self._wrapped = wrapped
        self._busy = True

    def __getattr__(self, name):
        return getattr(self._wrapped, name)

    def read(self, size):
        self._busy = False
        return self._wrapped.read(size)

    def write(self, data):
        if self._busy:
            raise ssl.SSLWantReadError
        return self._wrapped.write(data)


def test_what_is_written_while_the_relay_renegotiates_goes_out_after_it(pair):
    client, server = pair
    client._object = Renegotiating(client._object)
    client.encrypt(b"RSET\r\n")
    client.encrypt(b"NOOP\r\n")
    assert client.output() == b""
    client.feed(server.say(REPLY))
    assert client.decrypt() == REPLY
    assert client.over is None
    heard = server.receive(client.output())
    assert heard + server.receive(b"") == b"RSET\r\nNOOP\r\n"


def test_what_cannot_be_encrypted_is_the_end(pair):
    client, _ = pair

    class Broken:
        def write(self, data):
            raise ssl.SSLError("broken")

    client._object = Broken()
    client.encrypt(b"RSET\r\n")
    assert isinstance(client.over, ssl.SSLError)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize("end", ["close", "close and more", "fault"])
def test_a_relay_that_ends_tls_with_its_reply_and_keeps_the_connection(ca, version, end):
    """The mail is accepted, the session over at once: what else comes is nothing to us."""

    async def work():
        gone = asyncio.Event()

        async def serve(reader, writer):
            server, relay = Server(ca, version), Relay(PIPELINING)
            greeted = False
            while data := await reader.read(65536):
                if relay.delivered:
                    continue
                heard = server.receive(data)
                writer.write(server.output())
                if server.established and not greeted:
                    greeted = True
                    writer.write(server.say(b"220 relay ESMTP\r\n"))
                if heard:
                    writer.write(server.say(relay.receive(heard)))
                if relay.delivered:
                    writer.write(server.close() if end != "fault" else b"")
                    writer.write(b"" if end == "close" else b"\x17\x03\x03\x00\x20" + b"?" * 32)
            gone.set()
            writer.close()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        lane = Lane([letter(1)])
        open_session(lane, listening.sockets[0].getsockname()[1], security="tls", verify=ca.path)
        try:
            await lane.until(lambda: lane.closed)
            async with asyncio.timeout(DEADLINE):
                await gone.wait()
        finally:
            listening.close()
            await listening.wait_closed()
        assert lane.states() == ["accepted"]

    run(work)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
@pytest.mark.parametrize(("fault", "alert"), [("ca", "UNKNOWN_CA"), ("record", "BAD_RECORD_MAC")])
def test_a_relay_is_told_what_was_wrong(ca, version, fault, alert):
    async def work():
        told = asyncio.get_running_loop().create_future()

        async def serve(reader, writer):
            server, greeted = Server(trustme.CA() if fault == "ca" else ca, version), False
            try:
                while data := await reader.read(65536):
                    server.receive(data)
                    writer.write(server.output())
                    if server.established and not greeted:
                        greeted = True
                        broken = bytearray(server.say(b"220 relay\r\n"))
                        broken[-1] ^= 1
                        writer.write(broken)
                told.set_result("nothing")
            except ssl.SSLError as error:
                told.set_result(error.reason)
            writer.close()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with listening:
            lane = Lane([letter(1)])
            port = listening.sockets[0].getsockname()[1]
            open_session(lane, port, security="tls", verify=ca.path)
            await lane.until(lambda: lane.closed)
            async with asyncio.timeout(DEADLINE):
                assert (await told).endswith(f"_ALERT_{alert}")

    run(work)


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_a_relay_that_closes_instead_of_shaking_hands(security):
    def hang_up(line, relay):
        relay.closing = line == "STARTTLS"
        return "220 go" if relay.closing else None

    async def work():
        async def serve(reader, writer):
            relay = Relay(("STARTTLS",), hang_up)
            if security == "starttls":
                writer.write(b"220 relay\r\n")
                while not relay.closing:
                    writer.write(relay.receive(await reader.read(65536)))
            await reader.read(1)
            writer.close()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with listening:
            lane = Lane([letter(1)])
            port = listening.sockets[0].getsockname()[1]
            open_session(lane, port, security=security, verify=False)
            await lane.until(lambda: lane.closed)
        (failure,) = lane.closed
        assert failure.phase is Phase.TLS
        assert isinstance(failure.error, ConnectionError)

    run(work)


def test_a_session_that_cannot_encrypt_ends_and_its_mail_waits(ca, monkeypatch):
    """At once, though the relay has nothing to say."""

    def encrypt(self, data):
        self.over = ssl.SSLError("broken")

    async def work():
        relay = Relay(PIPELINING)
        async with serving(lambda: relay, tls=server_context(ca)) as (port, _):
            lane = Lane()
            session = open_session(lane, port, security="tls", verify=ca.path)
            await lane.until(lambda: lane.ready)
            monkeypatch.setattr(Tls, "encrypt", encrypt)
            lane.queue.append(letter(1))
            session.wake()
            await lane.until(lambda: lane.closed)
        assert isinstance(lane.closed[0].error, ssl.SSLError)
        assert lane.states() == ["deferred"]

    run(work)
