"""Hostile mail and hostile relays, over real sockets: smuggling, bombs, servers that attack."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import transaction

from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.errors import InvalidMessage, SendError
from cpsmailaccess_delivery.smtp.sevenbit import CannotConvert, fit
from cpsmailaccess_delivery.smtp.wire import crlf
from cpsmailaccess_delivery.testing import SMTPServer

DEADLINE = 60.0  # seconds: for what takes milliseconds

#: What some programs take for a line end, and what they might take for one.
ENDS = {
    "crlf": b"\r\n",
    "lf": b"\n",
    "cr": b"\r",
    "none": b"",
    "lfcr": b"\n\r",
    "crcrlf": b"\r\r\n",
}
SMUGGLED = b"MAIL FROM:<evil@example.com>"


def put_account(outbox: Outbox, port: int, **settings) -> None:
    with transaction.manager:
        outbox.accounts.put(
            Account(mailbox="*", host="127.0.0.1", port=port, **{"security": "plain", **settings})
        )


def send(outbox: Outbox, message: bytes, *recipients: str) -> str:
    with transaction.manager:
        return outbox.delivery.send(
            "alice@example.org", recipients or ("bob@example.net",), message
        )


@contextmanager
def processing(outbox: Outbox) -> Iterator[None]:
    processor = outbox.processor()
    processor.start()
    try:
        yield
    finally:
        processor.stop()


# SMTP smuggling


def lines_of(message: bytes) -> list[bytes]:
    """Return its lines, byte by byte: CRLF, CR and LF each end one."""
    lines, line, at = [], b"", 0
    while at < len(message):
        byte = message[at : at + 1]
        at += 1
        if byte == b"\r":
            at += message[at : at + 1] == b"\n"
        if byte in b"\r\n":
            lines.append(line)
            line = b""
        else:
            line += byte
    return [*lines, line] if line else lines


def smuggling_set() -> list[bytes]:
    """Return messages with a dot between any two line ends, at the start, middle and end."""
    messages = []
    for before, after in itertools.product(ENDS.values(), repeat=2):
        dot = before + b"." + after
        for body in (dot + SMUGGLED, b"one" + dot + SMUGGLED + b"\r\ntwo", b"one\r\n" + dot):
            number = len(messages)
            head = b"Message-Id: <%d@example.org>\nDate: x\nSubject: %d\n\n" % (number, number)
            messages.append(head + body)
    return messages


@pytest.mark.parametrize("chunking", [False, True], ids=["data", "bdat"])
@pytest.mark.parametrize("pipelining", [False, True], ids=["serial", "pipelined"])
def test_no_dot_ends_a_mail(outbox: Outbox, chunking: bool, pipelining: bool) -> None:
    """What arrives is, byte by byte, what was meant; and no mail more."""
    extensions = {"8BITMIME"} | ({"CHUNKING"} if chunking else set())
    extensions |= {"PIPELINING"} if pipelining else set()
    messages = smuggling_set()
    with SMTPServer(extensions=extensions) as server:
        put_account(outbox, server.port)
        for message in messages:
            send(outbox, message)
        with processing(outbox):
            server.wait_for(len(messages), DEADLINE)
    arrived = {mail.message_id: mail for mail in server.mails}
    assert len(server.mails) == len(arrived) == len(messages) == 3 * len(ENDS) ** 2
    for number, message in enumerate(messages):
        mail = arrived[f"{number}@example.org"]
        assert mail.data == b"".join(line + b"\r\n" for line in lines_of(message)), message
        assert mail.sender == "alice@example.org"
    print(f"{len(messages)} mails with a dot between line ends, each as it was meant")
    used = {line.split()[0] for _, _, line in server.commands}
    assert ("BDAT" in used) is chunking
    assert ("DATA" in used) is not chunking


# Mail bombs


def within(seconds: float, work: Callable[[], object]) -> None:
    """Run, and compare with a bound that is far over what it takes: a square shows."""
    begun = time.process_time()
    work()
    assert time.process_time() - begun < seconds


def test_ten_thousand_recipients(outbox: Outbox) -> None:
    recipients = [f"user{number}@example.net" for number in range(10_000)]
    with SMTPServer() as server:
        put_account(outbox, server.port)
        message_id = send(outbox, b"Subject: all\n\nx\n", *recipients)
        with processing(outbox):
            (mail,) = server.wait_for(1, DEADLINE)
    assert list(mail.recipients) == recipients
    assert str(outbox.status(message_id).state) == "accepted"


def test_more_recipients_than_a_spool_file_holds(outbox: Outbox) -> None:
    put_account(outbox, 1)
    with pytest.raises(SendError, match="fewer recipients"):
        send(outbox, b"Subject: all\n\nx\n", *(f"{'u' * 50}{n}@example.net" for n in range(80_000)))
    transaction.abort()
    assert list(outbox.queue.entries()) == []


MULTIPART = b"MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n\n"
PART = b"--b\nContent-Type: text/plain; charset=utf-8\n\n\xc3\xbc\n"


def test_ten_thousand_parts(outbox: Outbox) -> None:
    """As they are where the relay takes 8 bits, converted where it does not."""
    bomb = MULTIPART + PART * 9_999 + b"--b--\n"
    for extensions in ({"8BITMIME"}, set()):
        with SMTPServer(extensions=extensions) as server:
            put_account(outbox, server.port)
            send(outbox, bomb)
            with processing(outbox):
                (mail,) = server.wait_for(1, DEADLINE)
        assert mail.data.count(b"\r\n--b\r\n") == 9_999
        assert mail.data.isascii() is not extensions


def test_header_of_ten_megabytes(outbox: Outbox) -> None:
    put_account(outbox, 1)
    for header in (b"Subject: " + b"x" * 10_000_000, b"Subject: x" + b"\n y" * 3_000_000):
        with pytest.raises(InvalidMessage, match=r"header has [0-9,]+ bytes, and at most"):
            within(10, lambda header=header: send(outbox, header + b"\n\nx"))
        transaction.abort()


NESTED = b"".join(
    b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n" % (n, n) for n in range(5_000)
)
BOMBS = {
    "parts": (MULTIPART + PART * 20_000 + b"--b--\n", "more than 10,000 parts"),
    "nested": (NESTED + b"\n\xff", "nested too deep"),
    "nested messages": (b"Content-Type: message/rfc822\n\n" * 5_000 + b"\n\xff", "too deep"),
    "subject": (b"Subject: " + b"\xc3\xbc" * 500_000 + b"\n\nx", "header has more than"),
    "fields": (b"X: \xc3\xbc\n" * 100_000 + b"\nx", "header has more than"),
    "parameters": (b"Content-Type: a/b" + b"; a=\xc3\xbc" * 20_000 + b"\n\nx", "Content-Type has"),
    "semicolons": (b"Content-Type: a/b" + b";" * 200_000 + b"\n\n\xff", "Content-Type has"),
    "comments": (b"To: " + b"(" * 200_000 + b"\xc3\xbc\n\nx", "broken"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_for_the_conversion(name: str) -> None:
    """In the thread that serves all lanes: better refused than slow."""
    message, why = BOMBS[name]
    with pytest.raises(CannotConvert, match=why):
        within(10, lambda: fit(crlf(message), eightbit=False, smtputf8=False))


def test_a_bomb_is_refused_and_the_next_mail_leaves(outbox: Outbox) -> None:
    with SMTPServer(extensions=set()) as server:
        put_account(outbox, server.port)
        message_id = send(outbox, BOMBS["semicolons"][0])
        send(outbox, b"Subject: next\n\nx\n")
        with processing(outbox):
            mails = server.wait_for(1, DEADLINE)
    assert any(b"Subject: next" in mail.data for mail in mails)
    assert "cannot be converted" in str(outbox.status(message_id))


# Servers that attack


class Attacker:
    """A server that says to each connection what a script says, until nobody listens.

    ``sent``: bytes that the system took from it, over all connections.
    """

    def __init__(self, script: Callable[[socket.socket], Iterator[bytes]]) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.sent = 0
        self.heard = b""
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._attack, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _attack(self, client: socket.socket) -> None:
        client.settimeout(DEADLINE)
        with client:
            try:
                for piece in self._script(client):
                    self.sent += client.send(piece)
                while data := client.recv(65536):
                    self.heard += data
            except OSError:
                return

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in (self._accepting, *self._threads):
            thread.join(DEADLINE)


def after(line: bytes, *pieces: bytes, forever: bytes = b""):
    """Return a script: greet, answer up to a command, then the pieces, then the same for ever."""

    def script(client: socket.socket) -> Iterator[bytes]:
        yield b"220 relay\r\n"
        heard = b""
        answers = {b"EHLO": b"250-relay\r\n250 8BITMIME\r\n", b"MAIL": b"250 ok\r\n"}
        answers |= {b"RCPT": b"250 ok\r\n", b"DATA": b"354 go\r\n"}
        while line:
            data = client.recv(65536)
            if not data:
                return
            heard += data
            if line in data:
                break
            yield answers.get(data[:4].upper(), b"250 ok\r\n")
        yield from pieces
        while forever:
            yield forever

    return script


EHLO = b"250-relay\r\n"
ATTACKS = {
    "a line without end": after(b"EHLO", forever=b"2" * 4096),
    "a greeting without end": after(b"", forever=b"220-hello\r\n" * 100),
    "a reply without end": after(b"MAIL", forever=b"250-ok\r\n" * 100),
    "a million EHLO lines": after(b"EHLO", EHLO * 1_000_000, b"250 OK\r\n"),
    "8 bits": after(b"MAIL", b"550 5.7.1 \xff\xfe\x1b[2J\xe2\x80\xae\r\n"),
    "NUL": after(b"MAIL", b"451 \0\0\r\n"),
    "an early 354": after(b"MAIL", b"354 go on\r\n"),
    "a 354 for RCPT": after(b"RCPT", b"354 go on\r\n"),
    "replies nobody asked for": after(b"EHLO", EHLO, b"250 X\r\n" + b"250 ok\r\n" * 20),
    "replies for ever": after(b"EHLO", EHLO, b"250 X\r\n", forever=b"250 ok\r\n" * 100),
    "two finals": after(b"MAIL", b"250 ok\r\n250 ok\r\n250 ok\r\n250 ok\r\n250 accepted\r\n"),
    "another protocol": after(b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "silence": after(b"MAIL"),
}


def check_attack(outbox: Outbox, attacker: Attacker, **settings) -> str:
    """Send a mail through the attacker, and a good one beside it; return what is said of it."""
    with SMTPServer() as server:
        put_account(outbox, attacker.port, command_timeout=1, connect_timeout=20, **settings)
        with transaction.manager:
            outbox.accounts.put(
                Account(
                    mailbox="@good.example", host="127.0.0.1", port=server.port, security="plain"
                )
            )
        message_id = send(outbox, b"Subject: x\n\nsecret text\n")
        with processing(outbox):
            deadline = time.monotonic() + DEADLINE
            while time.monotonic() < deadline:
                if outbox.spool.lane_notes() or str(outbox.status(message_id).state) != "queued":
                    break
                threading.Event().wait(0.02)
            else:
                pytest.fail("the attacker holds its lane for ever")
            with transaction.manager:
                outbox.delivery.send("a@good.example", ["b@example.net"], b"Subject: y\n\ny\n")
            server.wait_for(1, DEADLINE)
    status = outbox.status(message_id)
    assert str(status.state) != "accepted"
    notes = " ".join(note.reason for note in outbox.spool.lane_notes().values())
    said = f"{status} {notes}"
    assert all(character.isprintable() or character == "\n" for character in said)
    assert len(said) < 20_000
    # What the system buffers for a socket comes on top of what we have read.
    assert attacker.sent < 32 * 1024 * 1024
    return said


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(outbox: Outbox, name: str) -> None:
    with Attacker(ATTACKS[name]) as attacker:
        check_attack(outbox, attacker)
    assert b"secret text" not in attacker.heard


def drip(client: socket.socket) -> Iterator[bytes]:
    yield b"220-"
    while True:
        threading.Event().wait(0.05)
        yield b"x"


def test_slow_drip(outbox: Outbox) -> None:
    """A byte now and then is no reply: the deadline stands."""
    with Attacker(drip) as attacker:
        said = check_attack(outbox, attacker)
    assert "no reply within 1 seconds" in said


def inject(client: socket.socket) -> Iterator[bytes]:
    """CVE-2021-38371 and its like: what is said in clear must not count after the handshake."""
    yield b"220 relay\r\n"
    client.recv(4096)
    yield b"250-relay\r\n250 STARTTLS\r\n"
    client.recv(4096)
    yield b"220 go\r\n250-relay\r\n250-AUTH PLAIN\r\n250 ok\r\n235 ok\r\n"


def strip(client: socket.socket) -> Iterator[bytes]:
    yield b"220 relay\r\n"
    client.recv(4096)
    yield b"250-relay\r\n250 AUTH PLAIN LOGIN\r\n"


@pytest.mark.parametrize("script", [inject, strip])
def test_starttls_injected_or_stripped(outbox: Outbox, script) -> None:
    with Attacker(script) as attacker:
        check_attack(
            outbox, attacker, security="starttls", username="alice", password="hunter2-hunter2"
        )
    assert b"AUTH" not in attacker.heard
    assert b"MAIL" not in attacker.heard
