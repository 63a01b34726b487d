"""The scriptable SMTP server, with smtplib and raw sockets as clients."""

from __future__ import annotations

import smtplib
import socket
import ssl
import threading
import time

import pytest

from cpsmailaccess_delivery.testing import Authority, ServerThread, SMTPServer

MAIL = b"From: alice@example.org\r\nMessage-Id: <1@example.org>\r\n\r\nHello\r\n"


class Raw:
    """A client that sends what it is told, and reads whole replies."""

    def __init__(self, server: SMTPServer, *lines: str) -> None:
        self.socket = socket.create_connection((server.host, server.port), timeout=10)
        self.file = self.socket.makefile("rb")
        self.greeting = self.read()
        for line in lines:
            assert self.ask(line)[:1] in "23"

    def read(self) -> str:
        lines = []
        while True:
            line = self.file.readline()
            lines.append(line.decode().rstrip("\r\n"))
            if line[3:4] != b"-":
                return "\n".join(lines)

    def send(self, data: str | bytes) -> None:
        self.socket.sendall(data if isinstance(data, bytes) else data.encode())

    def ask(self, line: str) -> str:
        self.send(line + "\r\n")
        return self.read()

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


READY = ("EHLO me", "MAIL FROM:<alice@example.org>", "RCPT TO:<bob@example.net>")


@pytest.fixture
def server():
    with SMTPServer() as server:
        yield server


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


def test_records_what_it_got(server):
    before = time.time()
    with smtplib.SMTP(server.host, server.port) as client:
        client.sendmail(
            "alice@example.org",
            ["bob@example.net", "carol@example.net"],
            MAIL,
            ["BODY=8BITMIME"],
            ["NOTIFY=NEVER"],
        )
    (mail,) = server.wait_for(1)
    assert (mail.sender, mail.recipients) == (
        "alice@example.org",
        ("bob@example.net", "carol@example.net"),
    )
    assert mail.data == MAIL
    assert mail.size == len(MAIL)
    assert mail.message_id == "1@example.org"
    assert mail.params == {"SIZE": str(len(MAIL)), "BODY": "8BITMIME"}
    assert mail.recipient_params["bob@example.net"] == {"NOTIFY": "NEVER"}
    assert (mail.username, mail.tls, mail.session, mail.private) == (None, False, 1, ())
    assert before <= mail.at <= time.time()
    assert [command.line for command in server.commands][-2:] == [".", "QUIT"]


@pytest.mark.parametrize("keep", [True, False])
def test_private_fields_are_seen(keep):
    with SMTPServer(keep=keep) as server:
        with smtplib.SMTP(server.host, server.port) as client:
            client.sendmail("a@b.c", "d@e.f", b"bcc: x@y.z\r\nX-Zope-Port: 1\r\n" + MAIL)
        (mail,) = server.wait_for(1)
    assert mail.private == ("bcc", "X-Zope-Port")
    assert mail.message_id == "1@example.org"
    assert bool(mail.data) is keep
    assert bool(server.commands) is keep


@pytest.mark.parametrize(
    ("wire", "data"),
    [
        (b".\r\n", b""),
        (b"\r\n.\r\n", b"\r\n"),
        (b"a\r\n.\r\n", b"a\r\n"),
        (b"..\r\n.\r\n", b".\r\n"),
        (b"...\r\n....\r\nx.\r\n.\r\n", b"..\r\n...\r\nx.\r\n"),
        (b"a\r\n\r\n..\r\n.\r\n", b"a\r\n\r\n.\r\n"),
    ],
)
@pytest.mark.parametrize("split", [False, True])
def test_dots(server, wire, data, split):
    with Raw(server, *READY, "DATA") as client:
        for piece in [wire[i : i + 1] for i in range(len(wire))] if split else [wire]:
            client.send(piece)
        assert client.read() == "250 2.0.0 taken"
        assert client.ask("NOOP")[:3] == "250"
    assert server.mails[0].data == data


@pytest.mark.parametrize("end", [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r\n.\r"])
def test_data_ends_at_crlf_dot_crlf_only(end):
    wire = b"a" + end + b"MAIL FROM:<smuggled@example.org>\r\n.\r\n"
    with SMTPServer(strict=False) as server, Raw(server, *READY, "DATA") as client:
        client.send(wire)
        assert client.read()[:3] == "250"
    assert server.mails[0].data == wire[:-3].replace(b"\r\n.", b"\r\n")
    with SMTPServer() as server, Raw(server, *READY, "DATA") as client:
        client.send(wire)
        assert client.read().startswith("550 5.5.2 bare")
    assert server.mails == []


def test_eight_bit_data_is_announced(server):
    with Raw(server, *READY, "DATA") as client:
        client.send("ü\r\n.\r\n")
        assert client.read()[:3] == "554"
    with Raw(server, "EHLO me", "MAIL FROM:<a@b.c> BODY=8BITMIME", READY[2], "DATA") as client:
        client.send("ü\r\n.\r\n")
        assert client.read()[:3] == "250"


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["MAIL FROM:<a@b.c>"], "503"),
        (["EHLO"], "501"),
        (["EHLO me", "RCPT TO:<a@b.c>"], "503"),
        (["EHLO me", "DATA"], "503"),
        ([*READY[:2], "DATA"], "554"),
        ([*READY, "MAIL FROM:<a@b.c>"], "503"),
        (["EHLO me", "MAIL FROM: <a@b.c>"], "501"),
        (["EHLO me", "MAIL FROM:a@b.c"], "501"),
        (["EHLO me", "MAIL FROM:<a b@c.d>"], "501"),
        (["EHLO me", "MAIL FROM:<a@b.c> NONSENSE=1"], "555"),
        (["EHLO me", "MAIL FROM:<a@b.c> SIZE=x"], "501"),
        (["EHLO me", "MAIL FROM:<a@b.c> SIZE=1 SIZE=1"], "501"),
        (["EHLO me", "MAIL FROM:<a@b.c> BODY=BINARYMIME"], "501"),
        (["EHLO me", "MAIL FROM:<ä@b.c>"], "553"),
        (["EHLO me", "MAIL FROM:<ä@b.c> SMTPUTF8"], "250"),
        (["EHLO me", "MAIL FROM:<>"], "250"),
        (["EHLO me", 'MAIL FROM:<"a b"@c.d>'], "250"),
        ([*READY[:2], "RCPT TO:<>"], "501"),
        ([*READY[:2], "RCPT TO:<Postmaster>"], "250"),
        ([*READY[:2], "RCPT TO:<ä@b.c>"], "553"),
        ([*READY[:2], "RCPT TO:<a@b.c> NOTIFY=NEVER"], "250"),
        (["EHLO me", "AUTH PLAIN AGEAYg=="], "504"),
        (["EHLO me", "STARTTLS"], "503"),
        (["EHLO me", "HELP"], "500"),
        (["HELO me", "MAIL FROM:<a@b.c> SIZE=1"], "555"),
        (["EHLO me", "BDAT x"], "501"),
    ],
)
def test_syntax_and_order(server, lines, code):
    with Raw(server, *lines[:-1]) as client:
        assert client.ask(lines[-1])[:3] == code


def test_bare_line_feed_in_a_command(server):
    with Raw(server) as client:
        client.send("EHLO me\n")
        assert client.read() == "500 bare <LF>"


def test_endless_line(server):
    with Raw(server) as client:
        client.send(b"x" * 13000)
        assert client.read()[:3] == "500"
        assert client.file.read() == b""


def test_pipelined_replies_come_in_order_and_the_next_mail_may_join(server):
    with Raw(server, "EHLO me") as client:
        group = "MAIL FROM:<a@b.c>\r\nRCPT TO:<bad>\r\nRCPT TO:<d@e.f>\r\nDATA\r\n"
        client.send(group)
        assert [client.read()[:3] for _ in range(4)] == ["250", "501", "250", "354"]
        client.send("1\r\n.\r\n" + group)
        assert [client.read()[:3] for _ in range(5)] == ["250", "250", "501", "250", "354"]
        client.send("2\r\n.\r\n")
        assert client.read()[:3] == "250"
    assert [mail.data for mail in server.mails] == [b"1\r\n", b"2\r\n"]
    groups = {c.line: c.group for c in server.commands}
    assert [c.group for c in server.commands if c.line in (".", "DATA")] == [2, 3, 3, 4]
    assert groups["EHLO me"] == 1


@pytest.mark.parametrize(
    ("extensions", "group"),
    [
        ([], "MAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\n"),
        (["PIPELINING"], "MAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\nDATA\r\nx\r\n.\r\n"),
    ],
)
def test_improper_pipelining_is_refused(extensions, group):
    with SMTPServer(extensions=extensions) as server, Raw(server, "EHLO me") as client:
        client.send(group)
        replies = client.file.read().decode()
    assert "554 improper use of pipelining" in replies
    assert server.mails == []


def test_chunking(server):
    with Raw(server, *READY) as client:
        client.send(b"BDAT 5\r\na\r\n.\r")
        assert client.read()[:3] == "250"
        client.send(
            b"BDAT 4 LAST\r\n\nb\r\nMAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\nBDAT 0 LAST\r\n"
        )
        assert [client.read()[:3] for _ in range(4)] == ["250"] * 4
        client.send(b"BDAT 6 LAST\r\nRSET\r\n")
        assert client.read()[:3] == "503"
        assert client.ask("NOOP")[:3] == "250"
    assert [mail.data for mail in server.mails] == [b"a\r\n.\r\nb\r\n", b""]


def test_size():
    with SMTPServer(max_size=10) as server, Raw(server, "EHLO me") as client:
        assert client.ask("MAIL FROM:<a@b.c> SIZE=11")[:3] == "552"
        client.ask("MAIL FROM:<a@b.c> SIZE=10")
        client.ask("RCPT TO:<d@e.f>")
        client.ask("DATA")
        client.send("12345678901\r\n.\r\n")
        assert client.read()[:3] == "552"


def test_a_large_mail(server):
    data = b"0123456789\r\n" * 500_000
    with smtplib.SMTP(server.host, server.port) as client:
        client.sendmail("a@b.c", "d@e.f", data)
    assert server.wait_for(1)[0].data == data


def test_what_is_offered(server):
    with Raw(server) as client:
        lines = client.ask("EHLO me").split("\n")
    assert [line[4:] for line in lines] == [
        "relay.test",
        "8BITMIME",
        "CHUNKING",
        "DSN",
        "ENHANCEDSTATUSCODES",
        "PIPELINING",
        f"SIZE {100 * 1024 * 1024}",
        "SMTPUTF8",
    ]
    server.extensions, server.esmtp = frozenset(), False
    with smtplib.SMTP(server.host, server.port) as client:
        client.ehlo_or_helo_if_needed()
        assert not client.does_esmtp
        assert client.noop() == (250, b"ok")  # no enhanced code


@pytest.mark.parametrize("mechanism", ["CRAM-MD5", "PLAIN", "LOGIN"])
@pytest.mark.parametrize("initial", [True, False])
def test_login(mechanism, initial):
    with SMTPServer(users={"alice": "pässword"}, mechanisms=(mechanism,)) as server:
        with smtplib.SMTP(server.host, server.port) as client:
            client.ehlo()
            assert client.mail("a@b.c")[0] == 530
            client.user, client.password = "alice", "wrong"
            authobject = getattr(client, "auth_" + mechanism.lower().replace("-", "_"))
            with pytest.raises(smtplib.SMTPAuthenticationError):
                client.auth(mechanism, authobject, initial_response_ok=initial)
            if mechanism == "CRAM-MD5":  # smtplib encodes passwords in ASCII
                server.users["alice"] = client.password = "password"
            elif mechanism == "PLAIN":
                server.users["alice"] = client.password = "s3cret"
            else:
                server.users["alice"] = client.password = "with space"
            client.auth(mechanism, authobject, initial_response_ok=initial)
            client.sendmail("a@b.c", "d@e.f", MAIL)
            assert client.docmd("AUTH", "PLAIN")[0] == 503
        assert server.wait_for(1)[0].username == "alice"
    assert [(login.mechanism, login.accepted) for login in server.logins] == [
        (mechanism, False),
        (mechanism, True),
    ]
    assert all(len(c.line.split()) <= 2 for c in server.commands if c.line.startswith("AUTH"))


def test_nonsense_in_a_login():
    with SMTPServer(users={"alice": "x"}) as server, Raw(server, "EHLO me") as client:
        assert client.ask("AUTH PLAIN !!!")[:3] == "501"
        assert client.ask("AUTH PLAIN AAAA")[:3] == "501"
        assert client.ask("AUTH PLAIN")[:4] == "334 "
        assert client.ask("*")[:3] == "501"
        assert client.ask("AUTH GSSAPI")[:3] == "504"
        assert client.ask("AUTH LOGIN") == "334 VXNlcm5hbWU6"


def test_starttls(authority):
    with SMTPServer(
        security="starttls", context=authority.server_context(), users={"alice": "pw"}
    ) as server:
        with smtplib.SMTP(server.host, server.port) as client:
            client.ehlo()
            assert not client.has_extn("auth")
            assert client.mail("a@b.c")[0] == 530
            assert client.docmd("AUTH", "PLAIN")[0] == 538
            client.starttls(context=authority.client_context())
            assert client.mail("a@b.c")[0] == 503  # EHLO again
            client.ehlo()
            assert not client.has_extn("starttls")
            client.login("alice", "pw")
            client.sendmail("a@b.c", "d@e.f", MAIL)
        (mail,) = server.wait_for(1)
    assert (mail.tls, mail.username, mail.data) == (True, "alice", MAIL)


def test_tls(authority):
    with SMTPServer(security="tls", context=authority.server_context()) as server:
        context = authority.client_context()
        with smtplib.SMTP_SSL(server.host, server.port, context=context) as client:
            client.sendmail("a@b.c", "d@e.f", MAIL)
        assert server.wait_for(1)[0].tls
        with pytest.raises(ssl.SSLCertVerificationError):
            smtplib.SMTP_SSL(server.host, server.port, context=ssl.create_default_context())
        server.wait_until(lambda: server.tls_failures or server.open_sessions == 0)


def test_expired_certificate(authority):
    context = authority.server_context("localhost", expired=True)
    with (
        SMTPServer(security="tls", context=context) as server,
        pytest.raises(ssl.SSLCertVerificationError, match="expired"),
    ):
        smtplib.SMTP_SSL("localhost", server.port, context=authority.client_context())


@pytest.mark.parametrize("fault", [{"drop": True}, {"silence": True}, {}])
def test_stops_in_the_middle_of_a_handshake(authority, fault):
    with SMTPServer(security="tls", context=authority.server_context()) as server:
        if fault:
            server.on("TLS", **fault)
        with socket.create_connection((server.host, server.port)) as client:
            server.wait_until(lambda: server.sessions)
            if fault == {"drop": True}:
                assert client.recv(1) == b""
            server.stop()
    assert server.open_sessions == 0


def test_a_context_is_needed():
    with pytest.raises(ValueError, match="context"):
        SMTPServer(security="tls")
    with pytest.raises(ValueError, match="XFOO"):
        SMTPServer(extensions=["XFOO"])


def test_rule_for_one_recipient_and_a_number_of_times(server):
    rule = server.on("RCPT", reply="450 4.2.0 greylisted", match="bob@", times=1)
    with Raw(server, *READY[:2]) as client:
        assert client.ask("RCPT TO:<carol@example.net>")[:3] == "250"
        assert client.ask("RCPT TO:<bob@example.net>") == "450 4.2.0 greylisted"
        assert client.ask("RCPT TO:<bob@example.net>")[:3] == "250"
        assert rule.hits == 1


def test_rule_after_some_mails(server):
    server.on("MAIL", reply="421 4.7.0 too many", drop=True, after=1)
    with Raw(server, *READY, "DATA") as client:
        client.send("x\r\n.\r\n")
        client.read()
        assert client.ask("MAIL FROM:<a@b.c>") == "421 4.7.0 too many"
        assert client.file.read() == b""
    server.forget()
    with Raw(server, *READY):
        pass


def test_rules_on_the_end_of_data(server):
    server.on("BODY", reply="554 5.7.1 spam\nreally", times=1)
    lying = server.on("TAKEN", reply="451 4.3.0 lost it", times=1)
    with Raw(server, *READY, "DATA") as client:
        client.send("x\r\n.\r\n")
        assert client.read() == "554 5.7.1 spam"
        assert client.read() == "really"
        assert server.mails == []
        for line in (*READY[1:], "DATA"):
            client.ask(line)
        client.send("x\r\n.\r\n")
        assert client.read() == "451 4.3.0 lost it"
        assert len(server.mails) == lying.hits == 1


@pytest.mark.parametrize(("phase", "mails"), [("CONTENT", 0), ("BODY", 0), ("TAKEN", 1)])
def test_drops_around_the_end_of_data(server, phase, mails):
    server.on(phase, drop=True)
    with Raw(server, *READY, "DATA") as client:
        client.send("x\r\n.\r\n")
        assert client.file.read() == b""
    server.wait_until(lambda: server.open_sessions == 0)
    assert len(server.mails) == mails


def test_positive_reply_in_other_words(server):
    server.on("BODY", reply="250 2.0.0 queued as 4711")
    server.on("EHLO", reply="250-other\n250 SIZE")
    with Raw(server) as client:
        assert client.ask("EHLO me") == "250-other\n250 SIZE"
        for line in (*READY[1:], "DATA"):
            client.ask(line)
        client.send("ä\r\n.\r\n")
        assert client.read()[:3] == "554"  # a refusal stays one
        for line in (*READY[1:], "DATA"):
            client.ask(line)
        client.send("x\r\n.\r\n")
        assert client.read() == "250 2.0.0 queued as 4711"


def test_garbage_and_injection(authority):
    with SMTPServer(security="starttls", context=authority.server_context()) as server:
        server.on("GREETING", reply=b"\xff\xfe no smtp\r\n", times=1)
        with socket.create_connection((server.host, server.port)) as client:
            assert client.recv(99) == b"\xff\xfe no smtp\r\n"
        server.on("STARTTLS", reply=b"220 go\r\n250 injected\r\n")
        with Raw(server, "EHLO me") as raw:
            assert raw.ask("STARTTLS") == "220 go"
            assert raw.read() == "250 injected"


def test_silence_and_delay(server):
    server.on("NOOP", delay=0.05, times=1)
    server.on("NOOP", silence=True)
    with Raw(server, "EHLO me") as client:
        start = time.monotonic()
        client.send("NOOP\r\n")
        assert client.read()[:3] == "250"
        assert time.monotonic() - start >= 0.05
        client.send("NOOP\r\n")
        client.socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.file.readline()
    server.wait_until(lambda: server.open_sessions == 0)


def test_bad_rules(server):
    with pytest.raises(ValueError, match="phase 'FOO'"):
        server.on("FOO")
    with pytest.raises(ValueError, match="three digits"):
        server.on("MAIL", reply="no")


def test_limits():
    with SMTPServer(max_sessions=1, mails_per_session=1) as server:
        with Raw(server, *READY, "DATA") as client:
            with Raw(server) as second:
                assert second.greeting[:3] == "421"
                assert second.file.read() == b""
            client.send("x\r\n.\r\n")
            client.read()
            assert client.ask("MAIL FROM:<a@b.c>")[:3] == "421"
        server.wait_until(lambda: server.open_sessions == 0)
        with Raw(server, *READY):
            pass
    assert server.sessions == 3


@pytest.mark.parametrize("settings", [{"split_replies": True}, {"latency": 0.02}])
def test_late_and_split_replies(settings):
    with SMTPServer(**settings) as server:
        start = time.monotonic()
        with Raw(server, "EHLO me") as client:
            client.send("MAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\nDATA\r\n")
            assert [client.read()[:3] for _ in range(3)] == ["250", "250", "354"]
            client.send("x\r\n.\r\n")
            assert client.read()[:3] == "250"
            assert client.ask("QUIT")[:3] == "221"
            assert client.file.read() == b""
        # five groups: greeting, EHLO, MAIL to DATA, end of data, QUIT
        assert time.monotonic() - start >= 5 * settings.get("latency", 0)


def test_down_and_up_again(server):
    with Raw(server, "EHLO me") as client:
        server.stop_accepting()
        with pytest.raises(ConnectionRefusedError):
            Raw(server)
        assert client.ask("NOOP")[:3] == "250"
        server.start_accepting()
        with Raw(server):
            pass
        server.drop_sessions()
        assert client.file.read() == b""


def test_many_servers_share_a_thread():
    before = set(threading.enumerate())
    with ServerThread() as thread:
        servers = [SMTPServer(thread=thread).start() for _ in range(20)]
        assert len(set(threading.enumerate()) - before) == 1
        for server in servers:
            with smtplib.SMTP(server.host, server.port) as client:
                client.sendmail("a@b.c", "d@e.f", MAIL)
        for server in servers:
            server.wait_for(1)
            server.stop()
            server.stop()
    assert set(threading.enumerate()) <= before


def test_waiting_in_vain_says_so(server):
    with pytest.raises(TimeoutError, match=r"waited 0.01 s for 1 mails: <SMTPServer plain .*>"):
        server.wait_for(1, timeout=0.01)
