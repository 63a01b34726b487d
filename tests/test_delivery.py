"""The delivery utility: what `send` takes, refuses, routes and returns; and what it leaves."""

from __future__ import annotations

import smtplib
from email.header import Header
from email.message import EmailMessage
from pathlib import Path

import pytest
import transaction
from zope.interface.verify import verifyClass, verifyObject
from zope.sendmail.delivery import QueuedMailDelivery
from zope.sendmail.interfaces import IMailDelivery, IQueuedMailDelivery

from conftest import KEY, PASSWORD, mails_on_disk
from cpsmailaccess_delivery import Account, Outbox, State
from cpsmailaccess_delivery.delivery import MailboxDelivery
from cpsmailaccess_delivery.envelope import parse_block
from cpsmailaccess_delivery.errors import (
    InvalidAddress,
    InvalidMessage,
    MessageTooLarge,
    NoRecipients,
    NoSuchEntry,
    OutboxError,
    SendError,
    UnknownMailbox,
)
from cpsmailaccess_delivery.interfaces import (
    IAccounts,
    IMailboxDelivery,
    IOutbox,
    IQueueProcessor,
)

ALICE, BOB = "alice@example.org", "bob@example.net"
MESSAGE = b"Message-Id: <1@example.org>\nDate: today\nSubject: x\n\nbody\n"


def send(outbox, *args, **kwargs) -> str:
    with transaction.manager:
        return outbox.delivery.send(*(args or (ALICE, [BOB], MESSAGE)), **kwargs)


def only(outbox) -> tuple:
    """The one mail: its envelope and its message, as they are on disk."""
    (path,) = mails_on_disk(outbox)
    data = path.read_bytes()
    envelope, offset = parse_block(data)
    return envelope, data[offset:]


def test_contracts(outbox):
    assert verifyObject(IMailDelivery, outbox.delivery)
    assert verifyObject(IQueuedMailDelivery, outbox.delivery)
    assert verifyObject(IMailboxDelivery, outbox.delivery)
    assert verifyClass(IMailboxDelivery, MailboxDelivery)
    assert verifyObject(IMailDelivery, outbox.delivery.bind(ALICE))
    assert verifyObject(IAccounts, outbox.accounts)
    assert verifyObject(IOutbox, outbox)
    assert verifyObject(IQueueProcessor, outbox.processor())
    assert outbox.delivery.queuePath == outbox.location
    assert IMailDelivery.providedBy(outbox.delivery)


def test_the_file_is_as_designed(stocked):
    assert send(stocked) == "1@example.org"
    envelope, message = only(stocked)
    assert message == MESSAGE
    assert envelope.sender == ALICE
    assert envelope.recipients == (BOB,)
    assert str(envelope.route) == ALICE
    assert (envelope.route.host, envelope.route.port) == ("smtp.example.org", 587)
    assert envelope.message_id == "1@example.org"
    assert len(envelope.token) == 32
    (path,) = mails_on_disk(stocked)
    assert path.parent.name == "new"
    assert path.read_bytes().startswith(
        b"X-Zope-Envelope: 1\nX-Zope-From: alice@example.org\nX-Zope-To: bob@example.net\n"
        b"X-Zope-Hostname: smtp.example.org\nX-Zope-Port: 587\nX-Zope-Mailbox: alice@example.org\n"
    )
    assert path.stat().st_mode & 0o777 == 0o600
    for directory in (path.parent, path.parent.parent):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_no_secret_on_disk(stocked):
    send(stocked)
    for path in Path(stocked.location).parent.rglob("*"):
        if path.is_file():
            assert PASSWORD.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "message",
    [
        MESSAGE,
        MESSAGE.decode(),
        MESSAGE.replace(b"\n", b"\r\n"),
        b"Message-ID:  <abc.def$1@host>\n\n",
    ],
)
def test_returns_the_id_as_zope_sendmail_does(stocked, tmp_path, message):
    theirs = QueuedMailDelivery(str(tmp_path / "theirs"))
    assert send(stocked, ALICE, [BOB], message) == theirs.send(ALICE, [BOB], message)


@pytest.mark.parametrize("message", [b"Message-Id: 1@x\n\n", b"Message-Id: <1@x\n\n"])
def test_malformed_id_as_zope_sendmail(stocked, tmp_path, message):
    for delivery in (QueuedMailDelivery(str(tmp_path / "theirs")), stocked.delivery):
        with pytest.raises(ValueError, match="Malformed Message-Id header"):
            delivery.send(ALICE, [BOB], message)


def test_a_new_id_is_in_the_message(stocked):
    message_id = send(stocked, ALICE, [BOB], b"Subject: x\n\n")
    envelope, message = only(stocked)
    assert message.startswith(b"Message-Id: <" + message_id.encode() + b">\nDate: ")
    assert envelope.message_id == message_id
    assert stocked.status(message_id).state is State.QUEUED


def test_message_objects_and_names(stocked):
    message = EmailMessage()
    message["Subject"] = "Grüße"
    message["Bcc"] = "eve@example.com"
    message.set_content("From me\n")
    send(
        stocked,
        Header("Älice <alice@example.org>", "utf-8"),
        ("Bob, the Builder <bob@example.net>".replace(",", ""), b"carol@example.net", BOB),
        message,
    )
    envelope, stored = only(stocked)
    assert envelope.sender == ALICE
    assert envelope.recipients == (BOB, "carol@example.net")
    assert b"bcc" not in stored.lower()
    assert b"\nFrom me\n" in stored


HOSTILE = ["a@x.org\nX-Zope-Hostname: evil", "a@x.org\r", "a\0@x.org", "a@x.org\x85"]


@pytest.mark.parametrize(
    ("args", "kwargs", "error"),
    [
        (("", [BOB], MESSAGE), {}, InvalidAddress),
        ((None, [BOB], MESSAGE), {}, InvalidAddress),
        (("<>", [BOB], MESSAGE), {}, InvalidAddress),
        (("alice", [BOB], MESSAGE), {}, InvalidAddress),
        ((["a@x.org"], [BOB], MESSAGE), {}, InvalidAddress),
        *(((bad, [BOB], MESSAGE), {}, InvalidAddress) for bad in HOSTILE),
        *(((ALICE, [BOB, bad], MESSAGE), {}, InvalidAddress) for bad in HOSTILE),
        *(((ALICE, [BOB], MESSAGE), {"mailbox": bad}, SendError) for bad in HOSTILE),
        *(((ALICE, [BOB], MESSAGE), {"hostname": bad}, InvalidAddress) for bad in HOSTILE),
        ((ALICE, [], MESSAGE), {}, NoRecipients),
        ((ALICE, (), MESSAGE), {}, NoRecipients),
        ((ALICE, "", MESSAGE), {}, InvalidAddress),
        ((ALICE, None, MESSAGE), {}, InvalidAddress),
        ((ALICE, [""], MESSAGE), {}, InvalidAddress),
        ((ALICE, [BOB, None], MESSAGE), {}, InvalidAddress),
        ((ALICE, 7, MESSAGE), {}, InvalidAddress),
        ((ALICE, ["a@x.org, b@x.org"], MESSAGE), {}, InvalidAddress),
        (("eve@example.net", [BOB], MESSAGE), {}, UnknownMailbox),
        ((ALICE, [BOB], MESSAGE), {"mailbox": "eve@example.net"}, UnknownMailbox),
        ((ALICE, [BOB], MESSAGE), {"mailbox": "@example.net"}, UnknownMailbox),
        ((ALICE, [BOB], MESSAGE), {"mailbox": "*"}, UnknownMailbox),
        ((ALICE, [BOB], MESSAGE), {"mailbox": "@"}, UnknownMailbox),
        ((ALICE, [BOB], MESSAGE), {"mailbox": ""}, SendError),
        ((ALICE, [BOB], MESSAGE), {"mailbox": 7}, SendError),
        ((ALICE, [BOB], MESSAGE), {"mailbox": [ALICE]}, SendError),
        ((ALICE, [BOB], MESSAGE), {"mailbox": b"\xff"}, SendError),
        ((ALICE, [BOB], MESSAGE), {"hostname": ""}, InvalidAddress),
        ((ALICE, [BOB], MESSAGE), {"hostname": 7}, InvalidAddress),
        ((ALICE, [BOB], MESSAGE), {"hostname": "x.org", "port": 0}, InvalidAddress),
        ((ALICE, [BOB], MESSAGE), {"hostname": "x.org", "port": 65536}, InvalidAddress),
        ((ALICE, [BOB], MESSAGE), {"hostname": "x.org", "port": "25"}, InvalidAddress),
        ((ALICE, [BOB], MESSAGE), {"hostname": "x.org", "port": True}, InvalidAddress),
        ((ALICE, [BOB], MESSAGE), {"port": 25}, InvalidAddress),
        ((ALICE, [BOB], MESSAGE), {"hostname": "x.org", "mailbox": ALICE}, InvalidAddress),
        ((ALICE, [BOB], None), {}, InvalidMessage),
        ((ALICE, [BOB], 7), {}, InvalidMessage),
        ((ALICE, [BOB], b""), {}, InvalidMessage),
        ((ALICE, [BOB], "just text"), {}, InvalidMessage),
        ((ALICE, [BOB], "Subject: \ud800\n\n"), {}, InvalidMessage),
        ((ALICE, [BOB], b"Message-Id: x\n\n"), {}, InvalidMessage),
        ((ALICE, [BOB], MESSAGE + b"x" * 51 * 1024 * 1024), {}, MessageTooLarge),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_errors_at_send(stocked, args, kwargs, error):
    with pytest.raises(error) as caught:
        stocked.delivery.send(*args, **kwargs)
    assert isinstance(caught.value, OutboxError)
    assert isinstance(caught.value, smtplib.SMTPException)  # what callers of MailHost catch
    assert PASSWORD not in str(caught.value)
    assert mails_on_disk(stocked) == []
    transaction.commit()
    assert mails_on_disk(stocked) == []


def test_an_error_does_not_spoil_the_transaction(stocked):
    with transaction.manager:
        with pytest.raises(SendError):
            stocked.delivery.send("nobody", [BOB], MESSAGE)
        stocked.delivery.send(ALICE, [BOB], MESSAGE)
    assert only(stocked)[1] == MESSAGE


@pytest.mark.parametrize(
    ("sender", "kwargs", "route"),
    [
        (ALICE, {}, ALICE),
        ("ALICE@EXAMPLE.ORG", {}, ALICE),
        ("x@example.com", {}, "@example.com"),
        ("*x@example.com", {}, "@example.com"),
        ("x@EXAMPLE.com", {}, "@example.com"),
        ("eve@example.net", {"mailbox": ALICE}, ALICE),
        ("eve@example.net", {"mailbox": "Alice <alice@example.org>"}, ALICE),
        ("eve@example.net", {"mailbox": "x@example.com"}, "@example.com"),
        ("eve@example.net", {"mailbox": "@example.com"}, "@example.com"),
        ("", {"mailbox": ALICE}, ALICE),
        (None, {"mailbox": ALICE}, ALICE),
        ("<>", {"mailbox": ALICE}, ALICE),
        ("eve@example.net", {"hostname": "Relay.Example.org"}, "relay.example.org:25"),
        ("eve@example.net", {"hostname": "relay.example.org", "port": 2525}, None),
        ("eve@example.net", {"hostname": "bücher.example"}, "xn--bcher-kva.example:25"),
        ("", {"hostname": "relay.example.org"}, "relay.example.org:25"),
    ],
)
def test_routes(stocked, sender, kwargs, route):
    send(stocked, sender, [BOB], MESSAGE, **kwargs)
    envelope, _ = only(stocked)
    assert str(envelope.route) == (route or "relay.example.org:2525")
    assert envelope.sender == (sender if sender not in (None, "<>") else "")
    if "hostname" in kwargs:
        assert envelope.route.mailbox == ""


def test_the_default_account(stocked, account):
    with transaction.manager:
        stocked.accounts.put(account.replace(mailbox="*", host="default.example.org"))
    send(stocked, "eve@example.net", [BOB], MESSAGE)
    assert str(only(stocked)[0].route) == "*"


def test_unknown_mailbox_says_what_to_do(stocked):
    with pytest.raises(UnknownMailbox) as caught:
        stocked.delivery.send("eve@example.net", [BOB], MESSAGE)
    for words in ("eve@example.net", "@example.net", "*", "accounts.put", "cpsmail accounts set"):
        assert words in str(caught.value)
    assert str(stocked.location) in str(caught.value)  # another outbox may be meant


def test_bind(stocked):
    bound = stocked.delivery.bind("ALICE@example.org")
    assert bound.mailbox == ALICE
    with transaction.manager:
        assert bound.send("eve@example.net", [BOB], MESSAGE) == "1@example.org"
    envelope, _ = only(stocked)
    assert envelope.sender == "eve@example.net"
    assert str(envelope.route) == ALICE


def test_bind_before_the_account(outbox, account):
    bound = outbox.delivery.bind(ALICE)
    with pytest.raises(UnknownMailbox):
        bound.send("eve@example.net", [BOB], MESSAGE)
    with transaction.manager:
        outbox.accounts.put(account)
        bound.send("", [BOB], MESSAGE)
    assert only(outbox)[0].sender == ""


@pytest.mark.parametrize("bad", ["", None, 7, "alice", "@", "a@x.org\r\nb", b"\xff", "**"])
def test_bind_to_nothing(outbox, bad):
    with pytest.raises(UnknownMailbox):
        outbox.delivery.bind(bad)


def test_size_limit(tmp_path, account):
    with Outbox(tmp_path / "small", key=KEY, size_limit=len(MESSAGE)) as outbox:
        with transaction.manager:
            outbox.accounts.put(account)
        send(outbox)
        with pytest.raises(MessageTooLarge, match="size_limit"):
            outbox.delivery.send(ALICE, [BOB], MESSAGE + b"x")
        assert len(mails_on_disk(outbox)) == 1


def test_stamped_is_the_relay_but_never_a_secret(stocked):
    """A later change of the account does not touch what waits."""
    send(stocked)
    with transaction.manager:
        stocked.accounts.put(Account(mailbox=ALICE, host="new.example.org"))
    envelope, _ = only(stocked)
    assert envelope.route.host == "smtp.example.org"


def test_a_hostile_message_changes_nothing(stocked):
    hostile = MESSAGE.replace(
        b"Subject", b"X-Zope-Hostname: evil.example\nX-Zope-Mailbox: eve@example.net\nSubject"
    )
    hostile += b"\nX-Zope-To: eve@example.net\nX-Zope-Port: 1\n\nBcc: x\n"
    send(stocked, ALICE, [BOB], hostile)
    envelope, message = only(stocked)
    assert message == hostile
    assert str(envelope.route) == ALICE
    assert envelope.recipients == (BOB,)


def test_aborted_is_unknown(stocked):
    message_id = stocked.delivery.send(ALICE, [BOB], MESSAGE)
    transaction.abort()
    with pytest.raises(NoSuchEntry):
        stocked.status(message_id)


def test_the_same_mail_twice_is_two_mails(stocked):
    with transaction.manager:
        stocked.delivery.send(ALICE, [BOB], MESSAGE)
        stocked.delivery.send("x@example.com", ["carol@example.net"], MESSAGE)
    assert len(mails_on_disk(stocked)) == 2
    status = stocked.status("1@example.org")
    assert set(status.recipients) == {BOB, "carol@example.net"}
