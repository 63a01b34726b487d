"""`MailboxHost` in the place of a MailHost: what callers pass, catch and get on the wire.

The stock MailHost of Products.MailHost, with a relay of its own, is what it is compared with.
"""

from __future__ import annotations

import re
import smtplib
import ssl
from contextlib import contextmanager
from email import message_from_bytes
from email.header import Header
from email.message import EmailMessage, Message
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

import pytest
import transaction

from conftest import PASSWORD, mails_on_disk
from cpsmailaccess_delivery import Account, State
from cpsmailaccess_delivery.errors import (
    InvalidAddress,
    InvalidMessage,
    MessageTooLarge,
    NotQueued,
    SpoolError,
)
from cpsmailaccess_delivery.testing import SMTPServer
from cpsmailaccess_delivery.testing.certificates import Authority

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")

from AccessControl.SecurityManagement import newSecurityManager, noSecurityManager
from Products.MailHost import MailHost as stock
from Products.MailHost.interfaces import IMailHost
from zExceptions import Unauthorized
from zope.interface.verify import verifyObject
from zope.sendmail.mailer import SMTPMailer

from cpsmailaccess_delivery.zope import immediate
from cpsmailaccess_delivery.zope.mailhost import (
    IMailboxHost,
    MailboxHost,
    envelope_recipients,
    envelope_sender,
)

ALICE, BOB, CAROL = "alice@example.org", "bob@example.net", "carol@example.net"
TEXT = "Subject: Hello\n\nHello Bob.\n"


@pytest.fixture
def relays():
    """Two: for accounts, and for the stock MailHost, which sends lines that end with LF alone."""
    with SMTPServer() as account, SMTPServer(strict=False) as other:
        yield account, other


def account_at(server, mailbox="*", **changes) -> Account:
    settings = {"host": "127.0.0.1", "port": server.port, "security": "plain", **changes}
    return Account(mailbox=mailbox, **settings)


def put(zmi, *accounts):
    with transaction.manager:
        for each in accounts:
            zmi.outbox.accounts.put(each)


@contextmanager
def hosts(zmi, server=None, **settings):
    """Yield ours and the stock one; the latter's relay, and ours without account: `server`."""
    port = server.port if server else 1
    with zmi.app() as app:
        for name, made in (("ours", MailboxHost("ours")), ("stock", stock.MailHost("stock"))):
            made.smtp_host, made.smtp_port = "127.0.0.1", port
            app._setObject(name, made)
        for name, value in settings.items():
            setattr(app.ours, name, value)
    with zmi.app() as app:
        yield app.ours, app.stock


def deliver(zmi):
    zmi.outbox.processor().run(forever=False)


def wire(mail, *, drop_id: bool) -> tuple:
    """Return what was sent, less what differs from one second, or one machine, to the next."""
    data = mail.data
    if re.search(rb"(?<!\r)\n", data):  # of a Message; then smtplib adds an empty line, too
        data = re.sub(rb"\r?\n", b"\r\n", data).removesuffix(b"\r\n")
    if drop_id:
        data = re.sub(rb"^Message-Id: <[^>]*>\r\n", b"", data, count=1)
    data = re.sub(rb"^(Message-Id|Date): .*?\r\n", rb"\1: x\r\n", data, flags=re.I | re.M)
    return mail.sender, mail.recipients, data


def with_attachment() -> Message:
    message = MIMEMultipart(boundary="==a-boundary==")
    message["From"], message["To"], message["Subject"] = ALICE, BOB, "Grüße"
    message.attach(MIMEText("Grüße, Bob.\n", _charset="utf-8"))
    message.attach(MIMEText("a,b\n1,2\n", "csv"))
    return message


def modern() -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"] = f"Álice <{ALICE}>", BOB
    message["Subject"] = "Grüße"
    message.set_content("Grüße.\n")
    return message


#: Existing callers: name -> (method, arguments).
CALLERS = {
    "a text with headers": ("send", [f"From: {ALICE}\nTo: {BOB}\n{TEXT}"], {}),
    "headers with names": ("send", [f"From: A <{ALICE}>\nTo: B <{BOB}>\n{TEXT}"], {}),
    "bytes": ("send", [f"From: {ALICE}\nTo: {BOB}\nSubject: x\n\nGrüße\n".encode()],
              {"charset": "utf-8"}),
    "latin-1 bytes": ("send", ["Grüße\n".encode("latin-1"), BOB, ALICE], {"charset": "latin-1"}),
    "a body only": ("send", ["Hello Bob.\n"], {"mto": BOB, "mfrom": ALICE, "subject": "Hi"}),
    "no line end at the end": ("send", ["Hello"], {"mto": BOB, "mfrom": ALICE}),
    "an empty body": ("send", [""], {"mto": BOB, "mfrom": ALICE, "subject": "Hi"}),
    "positional": ("send", ["Hello.\n", BOB, ALICE, "Hi"], {}),
    "overrides": ("send", [f"From: x@example.com\nTo: y@example.com\n{TEXT}"],
                  {"mto": BOB, "mfrom": ALICE, "subject": "Another"}),
    "mfrom with a name": ("send", ["x\n"], {"mto": BOB, "mfrom": f'"Me, A." <{ALICE}>'}),
    "mfrom with an unquoted comma": ("send", ["x\n"], {"mto": BOB, "mfrom": f"Ä <{ALICE}>",
                                                       "charset": "utf-8"}),
    "no subject": ("send", [f"From: {ALICE}\nTo: {BOB}\n\nHello.\n"], {}),
    "recipients with commas": ("send", ["x\n"], {"mto": f"{BOB}, C <{CAROL}>", "mfrom": ALICE}),
    "recipients in a list": ("send", ["x\n"], {"mto": [BOB, f"C <{CAROL}>"], "mfrom": ALICE}),
    "recipients in a tuple": ("send", ["x\n"], {"mto": (BOB, CAROL), "mfrom": ALICE}),
    "To, Cc and Bcc": ("send", [f"From: {ALICE}\nTo: {BOB}\nCc: {CAROL}\n"
                                f"Bcc: secret@example.net\n{TEXT}"], {}),
    "Bcc beside mto": ("send", [f"Bcc: secret@example.net\n{TEXT}", BOB, ALICE], {}),
    "charset": ("send", ["Grüße\n"], {"mto": BOB, "mfrom": ALICE, "subject": "Grüße",
                                      "charset": "utf-8"}),
    "latin-1": ("send", ["Grüße\n"], {"mto": BOB, "mfrom": ALICE, "charset": "iso-8859-1"}),
    "html": ("send", ["<p>Grüße</p>\n"], {"mto": BOB, "mfrom": ALICE, "charset": "utf-8",
                                           "msg_type": "text/html"}),
    "base64": ("send", ["Hello\n"], {"mto": BOB, "mfrom": ALICE, "encode": "base64"}),
    "quoted-printable": ("send", ["H=llo\n"], {"mto": BOB, "mfrom": ALICE,
                                               "encode": "quoted-printable"}),
    "7bit": ("send", ["Hello\n"], {"mto": BOB, "mfrom": ALICE, "encode": "7bit"}),
    "lines of dots": ("send", [".\n..\n. x\n.\n"], {"mto": BOB, "mfrom": ALICE}),
    "From at line start": ("send", ["x\n\nFrom here on\n"], {"mto": BOB, "mfrom": ALICE}),
    "CRLF": ("send", [f"From: {ALICE}\r\nTo: {BOB}\r\nSubject: x\r\n\r\nHello\r\n"], {}),
    "a Message": ("send", [with_attachment()], {}),
    "a Message and overrides": ("send", [with_attachment()],
                                {"mto": CAROL, "mfrom": ALICE, "subject": "Ü", "charset": "utf-8"}),
    "an EmailMessage": ("send", [modern()], {}),
    "private names": ("send", [f"From: {ALICE}\nTo: {BOB}\nX-Zope-Hostname: evil\n{TEXT}"], {}),
    "a Message-Id": ("send", [f"Message-Id: <1@example.org>\n{TEXT}", BOB, ALICE], {}),
    "simple_send": ("simple_send", [BOB, ALICE, "Hi", "Hello.\n"], {}),
    "simple_send, commas": ("simple_send", [f"{BOB}, {CAROL}", ALICE, "Hi", "Hello.\n"], {}),
    "scheduledSend": ("scheduledSend", ["x\n"], {"mto": BOB, "mfrom": ALICE}),
}  # fmt: skip


@pytest.mark.parametrize("immediate", [False, True], ids=["queued", "immediate"])
@pytest.mark.parametrize("caller", list(CALLERS))
def test_existing_callers(zmi, relays, caller, immediate):
    ours_relay, stock_relay = relays
    put(zmi, account_at(ours_relay))
    method, arguments, options = CALLERS[caller]
    with hosts(zmi, stock_relay) as (ours, others):
        assert getattr(others, method)(*arguments, immediate=immediate, **options) is None
        assert getattr(ours, method)(*arguments, immediate=immediate, **options) is None
        assert len(stock_relay.mails) == len(ours_relay.mails) == (1 if immediate else 0)
    deliver(zmi)
    (theirs,), (mail,) = stock_relay.wait_for(1), ours_relay.wait_for(1)
    # the stock one puts no Message-Id into what leaves at once
    drop_id = immediate and not theirs.message_id
    assert wire(mail, drop_id=drop_id) == wire(theirs, drop_id=False)
    assert mail.message_id
    assert zmi.outbox.status(mail.message_id).state is State.ACCEPTED


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"messageText": "x", "mfrom": ALICE}, stock.MailHostError),
        ({"messageText": "x", "mto": BOB}, stock.MailHostError),
        ({"messageText": f"Bcc: {BOB}\n\nx"}, stock.MailHostError),
        ({"messageText": b"x", "mto": BOB, "mfrom": ALICE}, TypeError),
        ({"messageText": b"x", "mto": BOB, "mfrom": ALICE, "charset": "none"}, LookupError),
    ],
    ids=str,
)
def test_what_the_stock_one_refuses_we_refuse(zmi, relays, arguments, error):
    put(zmi, account_at(relays[0]))
    with hosts(zmi, relays[1]) as (ours, others):
        for host in (others, ours):
            with pytest.raises(error):
                host.send(**arguments)
    assert mails_on_disk(zmi.outbox) == []


def test_send_template(zmi, relays):
    put(zmi, account_at(relays[0]))
    with hosts(zmi) as (ours, _):
        ours.aq_parent.manage_addProduct["OFSP"].manage_addDTMLMethod(
            "letter", "", f"From: {ALICE}\nTo: {BOB}\n{TEXT}"
        )
        ours.REQUEST = {}
        assert ours.sendTemplate(ours.aq_parent, "letter") == "SEND OK"
        del ours.REQUEST
    deliver(zmi)
    assert relays[0].mails[0].recipients == (BOB,)


def test_it_is_a_mail_host(zmi):
    with hosts(zmi) as (ours, others):
        assert verifyObject(IMailboxHost, ours)
        assert verifyObject(IMailHost, ours)
        assert isinstance(ours, stock.MailHost)
        root = ours.aq_parent
        assert sorted(root.objectIds("Mail Host")) == ["ours", "stock"]
        for name in vars(others.aq_base):
            assert hasattr(ours, name), name
        assert MailboxHost().smtp_host == "localhost", "GenericSetup gives no arguments"
        ours.manage_makeChanges("Title", "smtp.example.org", "587", "alice", "pw", True, "/q", True)
        assert (ours.title, ours.smtp_host, ours.smtp_port) == ("Title", "smtp.example.org", 587)
        assert (ours.smtp_uid, ours.smtp_pwd, ours.force_tls) == ("alice", "pw", True)


# Which account


def test_routes_by_sender(zmi, relays):
    with SMTPServer() as default:
        put(
            zmi,
            account_at(relays[0], ALICE),
            account_at(relays[1], "@example.com"),
            account_at(default),
        )
        with hosts(zmi) as (ours, _):
            for mfrom in (
                ALICE,
                f"Alice <{ALICE}>",
                Header(f"Alice <{ALICE}>"),
                "x@example.com",
                "somebody@example.edu",
            ):
                ours._send(mfrom, [BOB], b"Subject: x\r\n\r\nx\r\n")
        deliver(zmi)
        assert [mail.sender for mail in relays[0].mails] == [ALICE] * 3
        assert [mail.sender for mail in relays[1].mails] == ["x@example.com"]
        assert [mail.sender for mail in default.mails] == ["somebody@example.edu"]


def test_the_null_sender_goes_through_the_default_account(zmi, relays):
    put(zmi, account_at(relays[0], ALICE), account_at(relays[1]))
    with hosts(zmi) as (ours, _):
        ours._send("", BOB, b"Subject: x\r\n\r\nx\r\n")
        ours._send("<>", BOB, b"Subject: x\r\n\r\nx\r\n", immediate=True)
    deliver(zmi)
    assert [mail.sender for mail in relays[1].mails] == ["", ""]


@pytest.mark.parametrize(
    ("mfrom", "address"),
    [
        (ALICE, ALICE),
        (f"Alice <{ALICE}>", ALICE),
        (f"Liddell, Alice <{ALICE}>", ALICE),
        (f'"Liddell, Alice" <{ALICE}>', ALICE),
        (Header(f"Álice <{ALICE}>", "utf-8"), ALICE),
        (f"{ALICE}, {BOB}", ALICE),
        (ALICE.encode(), ALICE),
        ("root", "root"),
        ("", ""),
        (None, ""),
    ],
)
def test_envelope_sender(mfrom, address):
    assert envelope_sender(mfrom) == address


@pytest.mark.parametrize(
    ("mto", "addresses"),
    [
        (BOB, [BOB]),
        (f"B <{BOB}>, {CAROL}", [BOB, CAROL]),
        ([f"B <{BOB}>", Header(CAROL)], [BOB, CAROL]),
        ((f"{BOB}, {CAROL}",), [BOB, CAROL]),
        (BOB.encode(), [BOB]),
        ([""], [""]),
        (["b\nob@example.net"], ["b\nob@example.net"]),  # to be refused as it is
    ],
)
def test_envelope_recipients(mto, addresses):
    assert envelope_recipients(mto) == addresses


@pytest.fixture
def log_in(zmi):
    def log_in(host, name: str, *roles: str) -> None:
        users = host.aq_parent.acl_users  # of the same connection
        users._doAddUser(name, name, list(roles), [])
        newSecurityManager(None, users.getUser(name).__of__(users))

    yield log_in
    noSecurityManager()


def test_routes_by_user_only_when_switched_on(zmi, relays, log_in):
    his = account_at(relays[0], ALICE, owner="/acl_users:alice")
    put(zmi, his, account_at(relays[1]))
    with hosts(zmi) as (ours, _):
        log_in(ours, "alice", "Member")
        ours.send("x\n", BOB, "site@example.edu", "off")
        ours.route_by_user = True
        ours.send("x\n", BOB, "site@example.edu", "on")
        zmi.outbox.accounts.put(his.replace(mailbox="a@example.org"))
        ours.send("x\n", BOB, "site@example.edu", "which of two")
        ours.send("x\n", BOB, ALICE, "this of two")
        noSecurityManager()
        ours.send("x\n", BOB, "site@example.edu", "anonymous")
    deliver(zmi)
    assert subjects(relays[0]) == ["on", "this of two"]
    assert subjects(relays[1]) == ["anonymous", "off", "which of two"]


def subjects(server) -> list[str]:
    return sorted(message_from_bytes(mail.data)["Subject"] for mail in server.mails)


@pytest.mark.parametrize("at_once", [False, True])
def test_nobody_sends_as_another_user(zmi, relays, log_in, at_once):
    put(zmi, account_at(relays[0], ALICE, owner="/acl_users:alice"), account_at(relays[1]))
    with hosts(zmi) as (ours, _):
        log_in(ours, "bob", "Member")
        with pytest.raises(Unauthorized, match="may not send as this one"):
            ours.send("x\n", CAROL, ALICE, "forged", immediate=at_once)
        assert mails_on_disk(zmi.outbox) == []
        ours.send("x\n", CAROL, BOB, "his own", immediate=at_once)
        zmi.outbox.accounts.put(account_at(relays[1], BOB, owner="/acl_users:bob"))
        ours.route_by_user = True
        with pytest.raises(Unauthorized, match="may not send as this one"):
            ours.send("x\n", CAROL, ALICE, "forged, by his own account", immediate=at_once)
        ours.route_by_user = False
        log_in(ours, "alice", "Member")
        ours.send("x\n", CAROL, ALICE, "hers", immediate=at_once)
        log_in(ours, "manager", "Manager")
        ours.send("x\n", CAROL, ALICE, "of the site", immediate=at_once)
    deliver(zmi)
    assert subjects(relays[0]) == ["hers", "of the site"]
    assert subjects(relays[1]) == ["his own"]


# Without an account


@pytest.mark.parametrize("at_once", [False, True])
def test_without_an_account_it_is_the_stock_one(zmi, relays, at_once):
    put(zmi, account_at(relays[0], ALICE))
    with hosts(zmi, relays[1]) as (ours, others):
        for host in (ours, others):
            host.send("Hello\n", f"{BOB}, {CAROL}", "Site <site@example.edu>", immediate=at_once)
        assert len(relays[1].mails) == (2 if at_once else 0)
        assert mails_on_disk(zmi.outbox) == []
    mails = [wire(mail, drop_id=False) for mail in relays[1].mails]
    assert mails[0] == mails[1]
    assert relays[0].mails == []


@pytest.mark.parametrize("at_once", [False, True])
def test_without_an_account_nobody_is_somebody_else(zmi, relays, log_in, at_once):
    """Not by an envelope that no account is for."""
    put(zmi, account_at(relays[0], ALICE, owner="/acl_users:alice"))
    zmi.add_user("bob")
    message = f"From: Alice <{ALICE}>\nSubject: forged\n\nx\n"
    with hosts(zmi, relays[1]) as (ours, _):
        log_in(ours, "bob", "Member")
        with pytest.raises(Unauthorized, match="may not send as this one"):
            ours._send("nobody@example.edu", [CAROL], message.encode(), at_once)
        ours.send("x\n", CAROL, "nobody@example.edu", "his own", immediate=at_once)
    assert subjects(relays[1]) == ["his own"]


def test_without_an_account_errors_are_those_of_the_stock_one(zmi):
    with hosts(zmi) as (ours, others):
        for host in (ours, others):
            with pytest.raises(ConnectionRefusedError):
                host.send("x", BOB, ALICE, immediate=True)
        ours.send("x", BOB, ALICE)
        with pytest.raises(ConnectionRefusedError):
            transaction.commit()
        transaction.abort()


def test_no_queue_thread_is_ever_started(zmi, relays, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(stock.QueueProcessorThread, "start", lambda self: started.append(self))
    queue = tmp_path / "old"
    with hosts(zmi, relays[1], smtp_queue=True, smtp_queue_directory=str(queue)) as (ours, _):
        ours.send("x", BOB, ALICE, "without an account")
        ours.manage_restartQueueThread("start")
        ours.manage_restartQueueThread("stop")
        with pytest.raises(ValueError, match="Unsupported action"):
            ours.manage_restartQueueThread("jump")
        ours._startQueueProcessorThread()
        assert ours.queueThreadAlive() is False
    assert started == []
    assert stock.queue_threads == {}
    assert not queue.exists()
    assert subjects(relays[1]) == ["without an account"], "it does not wait for a thread"


def test_an_outbox_that_is_not_there(zmi):
    with hosts(zmi, delivery_name="nowhere") as (ours, _):
        for at_once in (False, True):
            with pytest.raises(NotQueued, match="no mail:mailboxDelivery of this name"):
                ours.send("x", BOB, ALICE, immediate=at_once)


# The transaction


def test_follows_the_transaction(zmi, relays):
    put(zmi, account_at(relays[0]))
    with hosts(zmi) as (ours, _):
        ours.send("x", BOB, ALICE, "aborted")
        transaction.abort()
        ours.send("x", BOB, ALICE, "committed")
        savepoint = transaction.savepoint()
        ours.send("x", BOB, ALICE, "rolled back")
        savepoint.rollback()
        ours.send("x", BOB, ALICE, "after it")
    deliver(zmi)
    assert subjects(relays[0]) == ["after it", "committed"]


# Immediate


def test_immediate_is_queued_when_the_administrator_says_so(zmi, relays):
    put(zmi, account_at(relays[0]))
    with hosts(zmi, immediate="queue") as (ours, _):
        ours.send("x", BOB, ALICE, "waits", immediate=True)
        assert relays[0].mails == []
        relays[0].stop_accepting()
    relays[0].start_accepting()
    deliver(zmi)
    assert subjects(relays[0]) == ["waits"]


def test_immediate_logs_in_and_verifies_tls(zmi, tmp_path):
    authority = Authority(tmp_path)
    with SMTPServer(
        security="starttls", context=authority.server_context(), users={"alice": PASSWORD}
    ) as server:
        account = account_at(
            server, ALICE, security="starttls", username="alice", password=PASSWORD
        )
        put(zmi, account)
        with hosts(zmi) as (ours, _):
            with pytest.raises(ssl.SSLCertVerificationError):
                ours.send("x", BOB, ALICE, immediate=True)
            assert server.logins == []
            put(zmi, account.replace(verify=str(authority.ca_file)))
            ours.send("x", BOB, ALICE, immediate=True)
        (mail,) = server.mails
        assert (mail.username, mail.tls) == ("alice", True)


#: How the relay fails -> what callers of MailHost catch.
FAILURES = {
    "turned away": ({"phase": "GREETING", "reply": "554 go away"}, smtplib.SMTPConnectError),
    "hello refused": ({"phase": "EHLO", "reply": "421 no"}, smtplib.SMTPHeloError),
    "sender refused": ({"phase": "MAIL", "reply": "550 5.7.1 no"}, smtplib.SMTPSenderRefused),
    "recipient refused": ({"phase": "RCPT", "reply": "550 no"}, smtplib.SMTPRecipientsRefused),
    "greylisted": ({"phase": "RCPT", "reply": "450 later"}, smtplib.SMTPRecipientsRefused),
    "data refused": ({"phase": "DATA", "reply": "554 no"}, smtplib.SMTPDataError),
    "message refused": ({"phase": "BODY", "reply": "554 spam"}, smtplib.SMTPDataError),
    "gone in MAIL": ({"phase": "MAIL", "drop": True}, OSError),
    "gone after the data": ({"phase": "BODY", "drop": True}, smtplib.SMTPServerDisconnected),
    "busy": ({"phase": "MAIL", "reply": "421 busy"}, smtplib.SMTPSenderRefused),
    "no SMTP": ({"phase": "MAIL", "reply": b"hello\r\n"}, smtplib.SMTPServerDisconnected),
    "silent": ({"phase": "RCPT", "silence": True}, TimeoutError),
}


@pytest.mark.parametrize("how", list(FAILURES))
def test_immediate_fails_as_callers_expect(zmi, relays, how, monkeypatch):
    monkeypatch.setattr(immediate, "_PATIENCE", (10.0, 0.5, 10.0))
    script, error = FAILURES[how]
    script = dict(script)
    relays[0].extensions -= {"CHUNKING"}
    relays[0].on(script.pop("phase"), **script)
    put(zmi, account_at(relays[0]))
    with hosts(zmi) as (ours, _):
        with pytest.raises(error) as caught:
            ours.send("x", f"{BOB}, {CAROL}", ALICE, immediate=True)
        assert isinstance(caught.value, OSError), "which is what most of them catch"
        if isinstance(caught.value, smtplib.SMTPRecipientsRefused):
            assert set(caught.value.recipients) == {BOB, CAROL}
            code, said = caught.value.recipients[BOB]
            assert code in (450, 550)
            assert isinstance(said, bytes)
        if how == "gone after the data":
            assert "nobody knows" in str(caught.value)
    assert relays[0].mails == []
    assert mails_on_disk(zmi.outbox) == [], "what has failed now is not tried again later"
    events = zmi.outbox.journal.events(address=ALICE)
    assert {event.recipient for event in events} == {BOB, CAROL}
    for event in events:
        assert event.kind == ("unclear" if how == "gone after the data" else "refused")
        is_final = how in ("sender refused", "recipient refused", "data refused", "message refused")
        assert ("not tried again" in event.reply) is (event.kind == "refused" and not is_final)
        assert event.relay == f"127.0.0.1:{relays[0].port}"


@pytest.mark.parametrize(
    ("phase", "error"),
    [
        ("GREETING", TimeoutError),
        ("RCPT", TimeoutError),
        ("BODY", smtplib.SMTPServerDisconnected),
    ],
)
def test_immediate_ends(zmi, relays, phase, error, monkeypatch):
    """However slowly the relay of a user's choice answers: it has a thread of Zope for so long."""
    monkeypatch.setattr(immediate, "_DEADLINE", 1.0)
    relays[0].extensions -= {"CHUNKING"}
    relays[0].on(phase, silence=True)
    put(zmi, account_at(relays[0]))
    with hosts(zmi) as (ours, _), pytest.raises(error, match=r"within 1 sec|nobody knows"):
        ours.send("x", BOB, ALICE, immediate=True)
    assert mails_on_disk(zmi.outbox) == []


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"port": 1}, ConnectionRefusedError),
        ({"host": "nowhere.invalid"}, OSError),
        ({"security": "starttls"}, smtplib.SMTPException),
        ({"username": "alice", "password": "wrong"}, smtplib.SMTPAuthenticationError),
        ({"username": "alice", "password_from": "env:NOT_SET"}, NotQueued),
        ({"networks": ("public",)}, smtplib.SMTPServerDisconnected),
    ],
    ids=str,
)
def test_immediate_with_an_account_that_does_not_work(zmi, settings, error):
    with SMTPServer(users={"alice": PASSWORD}) as server:
        put(zmi, account_at(server, **settings))
        with hosts(zmi) as (ours, _), pytest.raises(error) as caught:
            ours.send("x", BOB, ALICE, immediate=True)
        assert isinstance(caught.value, OSError)
        assert "wrong" not in str(caught.value)
        assert server.mails == []


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("mto", "text", "error"),
    [
        ("bob", "x", InvalidAddress),
        ("b\nob@example.net", "x", InvalidAddress),
        (BOB, "Message-Id: 1\n\nx", InvalidMessage),
        (BOB, "x" * 2000, MessageTooLarge),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_an_account_cannot_send_is_refused_alike(zmi, relays, mto, text, error, at_once):
    put(zmi, account_at(relays[0]))
    zmi.outbox.delivery.size_limit = 1000
    with hosts(zmi) as (ours, _), pytest.raises(error) as caught:
        ours._send(
            ALICE,
            [mto],
            text.encode() if "\n" in text else b"Subject: x\n\n" + text.encode(),
            at_once,
        )
    assert isinstance(caught.value, smtplib.SMTPException)
    assert relays[0].mails == []


def test_immediate_to_some_of_them(zmi, relays):
    """Who was deferred is tried again, who was refused is told of: nobody is lost silently."""
    server = relays[0]
    server.on("RCPT", reply="450 greylisted", match=CAROL, times=1)
    server.on("RCPT", reply="550 unknown", match="dave")
    put(zmi, account_at(server))
    with hosts(zmi) as (ours, _):
        ours.send("x", [BOB, CAROL, "dave@example.net"], ALICE, "Hi", immediate=True)
        assert [mail.recipients for mail in server.mails] == [(BOB,)]
    deliver(zmi)
    first, second, notice = server.wait_for(3)
    assert second.recipients == (CAROL,)
    assert first.data == second.data
    assert (notice.sender, notice.recipients) == ("", (ALICE,))
    found = zmi.outbox.status(first.message_id).recipients
    assert {who: outcome.state for who, outcome in found.items()} == {
        BOB: State.ACCEPTED,
        CAROL: State.ACCEPTED,
        "dave@example.net": State.REFUSED,
    }


def test_immediate_to_some_of_them_and_no_room_for_the_rest(zmi, relays, monkeypatch):
    """The error names who has not got it, and nobody else: they would get it twice."""

    def full(*_):
        raise SpoolError("no space left on device")

    monkeypatch.setattr(zmi.outbox.spool, "stage", full)
    relays[0].on("RCPT", reply="450 greylisted", match=CAROL)
    put(zmi, account_at(relays[0]))
    with hosts(zmi) as (ours, _), pytest.raises(smtplib.SMTPRecipientsRefused) as caught:
        ours.send("x", [BOB, CAROL], ALICE, immediate=True)
    ((who, (code, said)),) = caught.value.recipients.items()
    assert (who, code) == (CAROL, 450)
    assert b"greylisted" in said
    assert b"no space left on device; the other recipients have got it" in said
    (mail,) = relays[0].mails
    assert mail.recipients == (BOB,)
    found = zmi.outbox.status(mail.message_id).recipients
    assert [str(found[each].state) for each in (BOB, CAROL)] == ["accepted", "refused"]
    assert "no space left on device" in found[CAROL].reply


def test_immediate_introduces_itself_as_the_outbox_does(zmi, relays, monkeypatch):
    monkeypatch.setattr(zmi.outbox, "_helo_name", "app.example.org")
    relays[0].on("EHLO", reply="421 I know you", match="app.example.org")
    put(zmi, account_at(relays[0]))
    with hosts(zmi) as (ours, _), pytest.raises(smtplib.SMTPHeloError, match="I know you"):
        ours.send("x", BOB, ALICE, immediate=True)


def test_immediate_does_not_lock_a_mailbox(zmi):
    with SMTPServer(users={"alice": PASSWORD}) as server:
        account = account_at(server, username="alice", password="wrong")
        put(zmi, account)
        with hosts(zmi) as (ours, _):
            ours.send("x", BOB, ALICE, "queued")
            transaction.commit()
            deliver(zmi)
            tries = len(server.logins)
            with pytest.raises(smtplib.SMTPAuthenticationError, match="is paused"):
                ours.send("x", BOB, ALICE, immediate=True)
            assert len(server.logins) == tries
            put(zmi, account.replace(password=PASSWORD))
            ours.send("x", BOB, ALICE, "mended", immediate=True)
        assert subjects(server) == ["mended"]


def test_immediate_alone_does_not_lock_a_mailbox(zmi, monkeypatch):
    """Where nothing is queued, no processor pauses the account; a form may be sent often."""
    with SMTPServer(users={"alice": PASSWORD}) as server:
        account = account_at(server, username="alice", password="wrong")
        put(zmi, account)
        with hosts(zmi) as (ours, _):
            for words in (
                "user name or password is",
                "refused a moment ago",
                "refused a moment ago",
            ):
                with pytest.raises(smtplib.SMTPAuthenticationError, match=words):
                    ours.send("x", BOB, ALICE, immediate=True)
            assert len(server.logins) == 1
            monkeypatch.setattr(immediate, "_REFUSED_FOR", 0.0)
            with pytest.raises(smtplib.SMTPAuthenticationError):
                ours.send("x", BOB, ALICE, immediate=True)
            assert len(server.logins) == 2, "not for ever"
            monkeypatch.undo()
            put(zmi, account.replace(password=PASSWORD))
            ours.send("x", BOB, ALICE, "mended", immediate=True)
        assert subjects(server) == ["mended"]


# Others that change MailHost


def test_with_the_patch_of_cmfplone(zmi, relays, monkeypatch):
    """It takes keyword arguments only, and asks the registry of a site that a thread has not."""
    original = SMTPMailer.__init__
    calls = []

    def patched(self, **settings):
        calls.append(settings)
        raise LookupError("no site, no registry")

    monkeypatch.setattr(SMTPMailer, "__init__", patched)
    assert original is not SMTPMailer.__init__
    put(zmi, account_at(relays[0]), account_at(relays[1], ALICE))
    with hosts(zmi) as (ours, _):
        for at_once in (False, True):
            ours.send("x", BOB, ALICE, "hers", immediate=at_once)
            ours.send("x", BOB, "site@example.edu", "default", immediate=at_once)
    deliver(zmi)
    assert (subjects(relays[0]), subjects(relays[1])) == (["default"] * 2, ["hers"] * 2)
    assert calls == []


def test_with_printing_mail_host(zmi, relays, monkeypatch):
    """A development machine sends nothing, whatever accounts there are."""
    printed = []

    def _send(self, mfrom, mto, messageText, immediate=False):
        printed.append((mfrom, mto, immediate))

    monkeypatch.setattr(stock.MailBase, "_send", _send)
    put(zmi, account_at(relays[0]))
    with hosts(zmi, relays[1]) as (ours, _):
        ours.send("x", BOB, ALICE)
        ours.send("x", BOB, ALICE, immediate=True)
    deliver(zmi)
    assert [(each[0], each[2]) for each in printed] == [(ALICE, False), (ALICE, True)]
    assert relays[0].mails == relays[1].mails == []
