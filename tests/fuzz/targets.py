"""What is fuzzed: one function for each reader of what others wrote.

A target takes any bytes.  It swallows the exceptions that its code says it raises, asserts
what must hold of every answer, and lets everything else out: that is a finding.
``run.py`` feeds them with atheris, ``test_fuzz.py`` with hypothesis; ``corpus/`` keeps inputs that
reach far, and all that have ever failed.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import shutil
import sqlite3
import ssl
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.header import Header
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transaction

from cpsmailaccess_delivery import Outbox
from cpsmailaccess_delivery.account import Account
from cpsmailaccess_delivery.address import ascii_host, check_address, check_recipients
from cpsmailaccess_delivery.bounce import compose
from cpsmailaccess_delivery.delivery import MailboxDelivery
from cpsmailaccess_delivery.envelope import Envelope, Route, format_block, parse_block
from cpsmailaccess_delivery.errors import (
    InvalidAccount,
    InvalidAddress,
    InvalidEnvelope,
    InvalidSettings,
    SendError,
    SpoolError,
    WrongKey,
)
from cpsmailaccess_delivery.interfaces import LaneNote, Outcome, State
from cpsmailaccess_delivery.journal_file import Event, JournalFile
from cpsmailaccess_delivery.key import Key, KeySource
from cpsmailaccess_delivery.message import complete, find_message_id, to_bytes
from cpsmailaccess_delivery.report import Action, Notice
from cpsmailaccess_delivery.seal import parse, seal, staged_mailbox, unseal
from cpsmailaccess_delivery.settings import Settings, load_settings
from cpsmailaccess_delivery.smtp.reply import ProtocolError, ReplyParser
from cpsmailaccess_delivery.smtp.sevenbit import CannotConvert, fit
from cpsmailaccess_delivery.smtp.tls import Tls
from cpsmailaccess_delivery.smtp.wire import crlf, stuff
from cpsmailaccess_delivery.spool import names
from cpsmailaccess_delivery.spool.notes import LaneNotes
from cpsmailaccess_delivery.spool.outcomes import Side, SideFiles
from cpsmailaccess_delivery.testing.spool import MemorySpool

from .reader import Reader
from .relay import talk

CORPUS = Path(__file__).parent / "corpus"

Target = Callable[[bytes], None]
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@functools.cache
def _scratch() -> Path:
    """A directory for the files of this process."""
    path = tempfile.mkdtemp(prefix="fuzz-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    logging.getLogger("cpsmailaccess_delivery").addHandler(logging.NullHandler())
    logging.getLogger("cpsmailaccess_delivery").propagate = False
    return Path(path)


# The private block, and names of files


def block(data: bytes) -> None:
    try:
        envelope, end = parse_block(data)
    except InvalidEnvelope:
        return
    assert 0 < end <= len(data)
    assert envelope.recipients
    if data.startswith(b"X-Zope-Envelope"):
        again = format_block(envelope)
        assert parse_block(again + data[end:]) == (envelope, len(again))


def envelope(data: bytes) -> None:
    source = Reader(data)
    numbers = (0, 0.0, 1732369200.25, -1.0, 1e300, math.nan, math.inf, 0.0004, 99_999_999_999.5)
    given = Envelope(
        sender=source.text(),
        recipients=tuple(source.text() for _ in range(source.byte() % 5)),
        route=Route(source.text(), source.text(), source.pick((0, 25, 587, -1, 65536, 10**9))),
        message_id=source.text(),
        token=source.text(),
        not_before=source.pick(numbers),
        expires=source.pick(numbers),
        priority=source.pick((5, 0, 9, 10, -1)),
        key=source.text(),
        notify=source.pick(("", "never", "failure,delay", "x\n")),
        ret=source.pick(("", "full", "headers", "FULL")),
    )
    try:
        written = format_block(given)
    except InvalidEnvelope:
        return
    assert parse_block(written + source.rest()) == (given, len(written))


def file_names(data: bytes) -> None:
    name = data.decode("utf-8", "surrogateescape")
    for where in ("new", "cur"):
        entry = names.parse(name, where)
        if entry is not None:
            assert names.folder(entry.state) == where
            assert names.file_name(entry) == name
            assert "/" not in entry.id
            assert not entry.id.startswith(".")
            assert names.normal(entry) == entry
    names.usable_id(name)
    names.parse_staged(name)
    names.key_of(name)
    names.presence_of(name)


# What callers hand over


def address(data: bytes) -> None:
    for given in (data, data.decode("latin-1"), data.decode("utf-8", "surrogateescape")):
        with contextlib.suppress(InvalidAddress):
            bare = check_address(given)
            assert check_address(bare) == bare
            assert not _CONTROL.search(bare)
            assert "<" not in bare.partition('"')[0]
            assert len(bare.encode()) <= 254
            assert check_recipients([bare, bare]) == (bare,)
        with contextlib.suppress(InvalidAddress):
            host = ascii_host(given)
            assert host.isascii()
            assert ascii_host(host) == host


def message(data: bytes) -> None:
    source = Reader(data)
    kind = source.byte() % 4
    given: Any = source.rest()
    if kind == 1:
        given = given.decode("utf-8", "surrogateescape")
    elif kind > 1:
        rules = policy.compat32 if kind == 2 else policy.default
        try:
            given = message_from_bytes(given, policy=rules)
        except Exception:  # the standard library's affair
            return
    try:
        raw = to_bytes(given)
        stored, message_id = complete(raw, sender="alice@example.org", now=0.0)
    except SendError:
        return
    assert find_message_id(stored) == message_id
    assert complete(stored, sender="x@y.org", now=1.0) == (stored, message_id)
    header = stored.replace(b"\r\n", b"\n").replace(b"\r", b"\n").partition(b"\n\n")[0]
    assert not re.search(rb"(?im)^(resent-)?bcc[ \t]*:", header)


_ACCOUNT = Account(mailbox="*", host="smtp.example.org")
_ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**70, 0.5, math.nan, math.inf, -0.0, b"", "", "\0", "\udc80", [], {}, ()),
    *(
        [[]],
        {"a": 1},
        object,
        object(),
        range(3),
        iter(()),
        memoryview(b"a@b.org"),
        bytearray(b"x"),
    ),
    *(["bob@example.net"], "bob@example.net", b"bob@example.net", Header("Bob <bob@example.net>")),
    *(datetime(2030, 1, 1), datetime(2030, 1, 1, tzinfo=UTC), datetime.max, datetime.min),
    *(datetime.min.replace(tzinfo=UTC), "full", "never", "high", "success", 1e18, 2e9, "*", "@x"),
)


def send(data: bytes) -> None:
    source = Reader(data)

    def value(usual: Any = None) -> Any:
        kind = source.byte()
        if kind < 96:
            return usual
        if kind < 176:
            return source.pick(_ODD)
        if kind < 200:
            return [value("a@example.net") for _ in range(source.byte() % 4)]
        if kind < 216:
            return source.line()
        if kind < 224:
            return float(int.from_bytes(source.line()[:9], "big")) / 7
        return source.text()

    spool = MemorySpool()
    manager = transaction.TransactionManager()
    accounts = SimpleNamespace(find_once=lambda sender: check_address(sender) and _ACCOUNT)
    delivery = MailboxDelivery(spool, accounts, manager)
    arguments = (
        value("alice@example.org"),
        value(["bob@example.net"]),
        value(b"Subject: x\n\nx"),
    )
    options = ("mailbox", "hostname", "port", "not_before", "undo", "expires", "priority")
    options += ("idempotency_key", "notify", "ret")
    manager.begin()
    try:
        message_id = delivery.send(
            *arguments, **{name: given for name in options if (given := value()) is not None}
        )
    except SendError:
        assert not spool._staged, "refused, but something is left"
    else:
        manager.commit()
        (record,) = spool.find(message_id) or [None]
        if record is not None:
            written = format_block(record.envelope)
            assert parse_block(written) == (record.envelope, len(written))
            assert written.count(b"\n") <= 16
    finally:
        manager.abort()


# What a relay says


def smtp(data: bytes) -> None:
    talk(data)


def reply(data: bytes) -> None:
    """However the network splits it, a stream means the same."""

    def read(cuts: list[bytes]) -> tuple[list[Any], bool]:
        parser, found = ReplyParser(), []
        for piece in cuts:
            try:
                found += parser.feed(piece)
            except ProtocolError:
                break
        return found, parser.error is not None

    size = 1 + data[0] if data else 1
    stream = data[1:]
    whole = read([stream, b""])
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert read([*pieces, b""]) == whole
    for each in whole[0]:
        assert 200 <= each.code < 600
        assert each.text.isprintable()


@functools.cache
def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    from cpsmailaccess_delivery.testing.certificates import Authority

    authority = Authority(_scratch())
    return authority.server_context(), authority.client_context()


def tls(data: bytes) -> None:
    """A handshake with a server whose records are cut, flipped and followed by garbage."""
    source = Reader(data)
    theirs, ours = _contexts()
    client = Tls(ours, "localhost")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = theirs.wrap_bio(incoming, outgoing, server_side=True)
    try:
        for _ in range(4):
            client.shake_hands()
            if source.byte() % 4 == 3:
                client.feed(source.line())
            incoming.write(client.output())
            with contextlib.suppress(ssl.SSLWantReadError):
                server.do_handshake()
            record = bytearray(outgoing.read())
            if record and source.byte() % 8 == 7:
                record[source.byte() * len(record) // 256] ^= 1 + source.byte() % 255
            client.feed(bytes(record))
        if client.cipher:
            server.write(b"220 hello\r\n")
            client.feed(outgoing.read())
            assert client.decrypt() == b"220 hello\r\n" or client.over is not None
            client.encrypt(b"EHLO x\r\n")
            if source.byte() % 2:
                with contextlib.suppress(ssl.SSLWantReadError):
                    server.unwrap()
                client.feed(outgoing.read())
        client.feed(source.rest())
        client.decrypt()
        client.encrypt(b"QUIT\r\n")
    except ssl.SSLError:
        client.output()


# What goes to a relay, and back to senders


def wire(data: bytes) -> None:
    lines = crlf(data)
    stuffed = stuff(lines)
    rest = lines.replace(b"\r\n", b"")
    assert b"\r" not in rest
    assert b"\n" not in rest
    assert lines.endswith(b"\r\n")
    assert b"\r\n.\r\n" not in b"\r\n" + stuffed
    assert (b"\r\n" + stuffed).replace(b"\r\n.", b"\r\n")[2:] == lines
    plain = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert lines.replace(b"\r\n", b"\n") in (plain, plain + b"\n")


def sevenbit(data: bytes) -> None:
    flags, lines = data[:1], crlf(data[1:])
    offers = flags[0] if flags else 0
    try:
        out, needs_utf8 = fit(lines, eightbit=bool(offers & 1), smtputf8=offers & 3 == 3)
    except CannotConvert:
        return
    assert out.isascii() or offers & 1
    assert not needs_utf8 or offers & 3 == 3 or not offers & 1
    rest = out.replace(b"\r\n", b"")
    assert b"\r" not in rest
    assert b"\n" not in rest
    assert len(out) < 20 * len(lines) + 1000


def notice(data: bytes) -> None:
    source = Reader(data)
    recipients = {
        source.text() or "x@example.net": Outcome(source.pick(list(State)), source.text(), 1e9)
        for _ in range(1 + source.byte() % 3)
    }
    about = Notice(
        source.pick(list(Action)),
        source.pick(("alice@example.org", "ü@example.org", "a@ü.org")),
        recipients,
        b"",
        source.text(),
        1e9,
        1e9 + 60,
        full=bool(source.byte() % 2),
    )
    remote = source.text()
    about = dataclasses.replace(about, message=source.rest())
    made = compose(about, message_id="n@example.org", reporting_mta="me", remote_mta=remote)
    header = made.partition(b"\n\n")[0]
    for line in header.split(b"\n"):
        assert re.match(rb"[!-9;-~]+:|[ \t]", line), "a line of a stranger in our header"
    assert header.lower().count(b"\nto:") == 1
    assert b"\nbcc:" not in header.lower()


# Files


def _file(name: str, data: bytes) -> Path:
    path = _scratch() / name
    path.write_bytes(data)
    return path


@functools.cache
def _sealed() -> tuple[Key, Account, dict[str, Any]]:
    key = Key(bytes(range(32)), "the test")
    account = Account(mailbox="*", host="smtp.example.org", username="a", password="hunter2")
    return key, account, json.loads(seal(account, key))


def vault(data: bytes) -> None:
    """Whatever stands in a file: it opens to what was sealed, or not at all."""
    key, account, document = _sealed()
    staged_mailbox(data)
    with contextlib.suppress(ValueError):
        opened = unseal(parse(data), key)
        assert opened is None or opened == account
    with contextlib.suppress(ValueError, RecursionError):
        edited = json.loads(data)
        if isinstance(edited, dict):  # an edit of a whole file
            changed = json.dumps({**document, **edited}).encode()
            opened = unseal(parse(changed), key)
            assert opened in (None, account)


@functools.cache
def _sides() -> SideFiles:
    from cpsmailaccess_delivery.spool.maildir import Maildir
    from cpsmailaccess_delivery.spool.presence import Presence

    root = _scratch() / "spool"
    spool = Maildir(root, Presence(root / "presence"))
    return SideFiles(spool._layout, scrap=lambda entry_id: entry_id)


def side(data: bytes) -> None:
    sides = _sides()
    for mode in (0o400, 0o600):
        path = _file("spool/outcomes/entry", data)
        path.chmod(mode)
        try:
            found = sides.read("entry")
        except SpoolError:
            assert mode == 0o400
        else:
            assert isinstance(found, Side)
            assert all(isinstance(each, Outcome) for each in found.outcomes.values())
        path.unlink()


def note(data: bytes) -> None:
    _file("0123456789abcdef", data)
    for found in LaneNotes(_scratch()).all().values():
        assert isinstance(found, LaneNote)
        assert math.isfinite(found.since)
        assert math.isfinite(found.until)


def journal(data: bytes) -> None:
    path = str(_file("journal.sqlite", data))
    with contextlib.suppress(sqlite3.Error, OSError):
        JournalFile(path).find(message_id="a@b", address=None, limit=10)
    with contextlib.suppress(sqlite3.Error, OSError):
        JournalFile(path).count(0.0)
    writer = JournalFile(path)
    try:
        writer.write([Event(1.0, "queued", message_id="a@b")])
        assert JournalFile(path).find(message_id="a@b", address=None, limit=10)
    except (sqlite3.Error, OSError):
        pass
    finally:
        writer.close()
        for name in os.listdir(_scratch()):
            if name.startswith("journal.sqlite"):
                os.unlink(_scratch() / name)


def settings(data: bytes) -> None:
    path = _file("cpsmail.toml", data)
    with contextlib.suppress(InvalidSettings):
        assert isinstance(load_settings(path, environ={}), Settings)
    source = Reader(data)
    text = source.text().replace("\0", "")
    keys = ("outbox", "size_limit", "helo_name", "metrics_port", "metrics_address", "retry.first")
    with contextlib.suppress(InvalidSettings):
        load_settings(_file("empty.toml", b""), environ={}, options={source.pick(keys): text})
    with contextlib.suppress(InvalidSettings):
        load_settings(environ={"CPSMAIL_OUTBOX": text, "CPSMAIL_RETRY_GIVE_UP": text})


def key(data: bytes) -> None:
    path = _file("outbox.key", data)
    path.chmod(0o600)
    for source in (KeySource(file=path), KeySource(data), KeySource(data.decode("latin-1"))):
        try:
            found = source.load()
        except WrongKey as error:
            text = str(error)
        else:
            text = repr(found)
            assert found is None or len(found.reveal()) == 32
        assert len(data) < 8 or data.decode("latin-1") not in text


def account(data: bytes) -> None:
    """The settings of an account, as ZCML, the CLI and the ZMI hand them over."""
    source = Reader(data)
    fields = ("mailbox", "host", "port", "security", "username", "password", "password_from")
    fields += ("verify", "connect_timeout", "connections", "mails_per_minute")
    given: dict[str, Any] = {"mailbox": "*", "host": "h"}
    while source:
        name = source.pick(fields)
        given[name] = source.pick(_ODD) if source.byte() % 2 else source.text()
    try:
        made = Account(**given)
    except InvalidAccount as error:
        text = str(error)
    else:
        text = repr(made) + json.dumps(made.public())
        assert not _CONTROL.search(made.mailbox + made.host)
    password = given.get("password")
    others = "\0".join(str(value) for name, value in given.items() if name != "password")
    if isinstance(password, str) and len(password) > 8 and password not in others:
        assert password not in text


@functools.cache
def _outbox() -> Path:
    """An outbox with an account, a mail and a journal."""
    path = _scratch() / "box"
    with Outbox(path) as outbox:
        manager = transaction.manager
        with manager:
            outbox.accounts.put(_ACCOUNT)
            outbox.delivery.send("a@example.org", "b@example.net", b"Subject: x\n\nx")
        outbox.journal.record(Event(1.0, "queued", message_id="a@b", sender="a@example.org"))
    return path


def cli(data: bytes) -> None:
    """Any arguments, but to commands that deliver or wait."""
    from click.testing import CliRunner

    from cpsmailaccess_delivery.cli import cli as command

    words = data.decode("utf-8", "surrogateescape").split("\0")[:12]
    if {"run", "drain", "check", "--follow"} & set(words):
        return
    if any("--ou" in word or "--se" in word or "--con" in word for word in words):
        return  # elsewhere on this machine
    environ = {"CPSMAIL_OUTBOX": str(_outbox()), "HOME": str(_scratch())}
    result = CliRunner().invoke(command, words, input=b"To: b@example.net\n\n", env=environ)
    assert "a fault in cpsmail" not in result.output, (words, result.output)
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code != 70


#: With the share of all inputs that each gets in a full run: what costs a millisecond
#: gets few of them.
TARGETS: dict[str, tuple[Target, float]] = {
    "block": (block, 16),
    "envelope": (envelope, 10),
    "file_names": (file_names, 18),
    "address": (address, 10),
    "message": (message, 6),
    "send": (send, 6),
    "smtp": (smtp, 9),
    "reply": (reply, 8),
    "wire": (wire, 12),
    "sevenbit": (sevenbit, 3),
    "notice": (notice, 2),
    "vault": (vault, 4),
    "side": (side, 2),
    "note": (note, 2),
    "settings": (settings, 2),
    "key": (key, 2),
    "account": (account, 4),
    "tls": (tls, 0.2),
    "journal": (journal, 0.1),
    "cli": (cli, 0.1),
}
