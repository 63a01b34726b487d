"""The ZCML directives, read by zope.configuration from strings and from files."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import transaction
from zope.component import getGlobalSiteManager, getUtilitiesFor, getUtility, queryUtility
from zope.configuration.config import ConfigurationConflictError
from zope.configuration.exceptions import ConfigurationError
from zope.configuration.xmlconfig import XMLConfig, string
from zope.event import notify
from zope.security.interfaces import ForbiddenAttribute, IPermission, Unauthorized
from zope.security.management import endInteraction, newInteraction, setSecurityPolicy
from zope.security.proxy import ProxyFactory
from zope.security.simplepolicies import ParanoidSecurityPolicy
from zope.sendmail.delivery import QueuedMailDelivery
from zope.sendmail.interfaces import IMailDelivery, IQueuedMailDelivery

from conftest import PASSWORD, clean_components, mails_on_disk
from cpsmailaccess_delivery import QueueProcessorThread, zcml
from cpsmailaccess_delivery.errors import MessageTooLarge
from cpsmailaccess_delivery.interfaces import IMailboxDelivery, IOutbox, IQueueProcessor
from cpsmailaccess_delivery.zcml import outbox_for

ALICE, BOB = "alice@example.org", "bob@example.net"
MESSAGE = b"Message-Id: <1@example.org>\nDate: today\n\nbody\n"

HEAD = """\
<configure xmlns="http://namespaces.zope.org/zope"
           xmlns:mail="http://namespaces.zope.org/mail" i18n_domain="x">
  <include package="zope.component" file="meta.zcml" />
  <include package="zope.security" file="meta.zcml" />
  <include package="cpsmailaccess_delivery" file="meta.zcml" />
  <include package="cpsmailaccess_delivery" />
"""


@pytest.fixture(autouse=True)
def _registry(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("CPSMAIL_KEY", "00" * 32)
    clean_components()
    threads = threading.enumerate()
    yield
    for _, processor in getUtilitiesFor(IQueueProcessor):
        processor.stop()
    for _, outbox in list(getUtilitiesFor(IOutbox)):
        outbox.close()
    endInteraction()
    clean_components()
    assert set(threading.enumerate()) <= set(threads), "a thread is left"


@pytest.fixture
def queue(tmp_path) -> str:
    return str(tmp_path / "outbox")


def read(body: str, **values: str) -> None:
    string(HEAD + body.format(**values) + "\n</configure>\n")


DELIVERY = '<mail:mailboxDelivery queuePath="{queue}" />'
ACCOUNT = (
    '<mail:smtpAccount queuePath="{queue}" mailbox="*" hostname="smtp.example.org"'
    ' port="587" security="starttls" username="site" passwordFrom="env:SITE_SMTP_PASSWORD" />'
)


def test_as_designed(queue):
    read(
        '<mail:mailboxDelivery name="Mail" permission="zope.SendMail" queuePath="{queue}" />'
        + ACCOUNT,
        queue=queue,
    )
    delivery = getUtility(IMailDelivery, "Mail")
    with transaction.manager:
        assert delivery.send(ALICE, [BOB], MESSAGE) == "1@example.org"
    outbox = getUtility(IOutbox, os.path.realpath(queue))
    assert [entry.state for entry in outbox.spool.scan()] == ["queued"]
    kept = outbox.vault.get("*")
    assert (kept.host, kept.port, kept.security) == ("smtp.example.org", 587, "starttls")
    assert (kept.username, kept.password_from) == ("site", "env:SITE_SMTP_PASSWORD")


def test_every_look_up(queue):
    read(DELIVERY + '<mail:mailboxDelivery name="Other" queuePath="{queue}" />', queue=queue)
    for interface in (IMailDelivery, IQueuedMailDelivery, IMailboxDelivery):
        found = getUtility(interface, "Mail")
        assert IQueuedMailDelivery.providedBy(found)
        assert sorted(name for name, _ in getUtilitiesFor(interface)) == ["Mail", "Other"]
    assert queryUtility(IMailDelivery) is None
    assert getUtility(IMailDelivery, "Mail").queuePath == os.path.realpath(queue)


def test_one_outbox_for_one_path(queue, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(queue)
    read(
        DELIVERY
        + '<mail:mailboxDelivery name="Link" queuePath="{link}" />'
        + '<mail:mailboxDelivery name="Dots" queuePath="{queue}/../outbox" />'
        + '<mail:mailboxDelivery name="Else" queuePath="{queue}2" />',
        queue=queue,
        link=str(link),
    )
    assert len(list(getUtilitiesFor(IOutbox))) == 2


def test_size_limit_belongs_to_its_directive(queue):
    read(
        DELIVERY + '<mail:mailboxDelivery name="Small" queuePath="{queue}" sizeLimit="10" />',
        queue=queue,
    )
    read(ACCOUNT, queue=queue)
    with pytest.raises(MessageTooLarge):
        getUtility(IMailDelivery, "Small").send(ALICE, [BOB], MESSAGE)
    assert getUtility(IMailDelivery, "Mail").send(ALICE, [BOB], MESSAGE)
    transaction.abort()


def test_every_attribute_of_an_account(queue, tmp_path):
    authority = tmp_path / "ca.pem"
    authority.write_text("")
    read(
        '<mail:smtpAccount queuePath="{queue}" mailbox="Alice@Example.org"'
        ' hostname="SMTP.example.org" port="2465" security="tls" username="alice"'
        ' passwordFrom="file:/run/secrets/alice" caFile="{authority}" connections="2"'
        ' mailsPerSession="5" mailsPerMinute="7" connectTimeout="1.5" commandTimeout="20"'
        ' dataTimeout="30" />'
        '<mail:smtpAccount queuePath="{queue}" mailbox="@example.com" hostname="10.0.0.1"'
        ' security="plain" username="x" passwordFrom="env:X" verify="no" />',
        queue=queue,
        authority=str(authority),
    )
    full, plain = outbox_for(queue).accounts.list()[::-1]
    assert full.public() == {
        "mailbox": ALICE,
        "host": "smtp.example.org",
        "port": 2465,
        "security": "tls",
        "username": "alice",
        "password_from": "file:/run/secrets/alice",
        "verify": str(authority),
        "connect_timeout": 1.5,
        "command_timeout": 20.0,
        "data_timeout": 30.0,
        "connections": 2,
        "mails_per_session": 5,
        "mails_per_minute": 7,
        "owner": "",
        "networks": (),
    }
    assert (plain.mailbox, plain.port, plain.verify) == ("@example.com", 25, False)


def test_defaults_of_an_account(queue):
    read('<mail:smtpAccount queuePath="{queue}" mailbox="*" hostname="x.org" />', queue=queue)
    (kept,) = outbox_for(queue).accounts.list()
    assert (kept.port, kept.security, kept.verify, kept.username) == (587, "starttls", True, None)


def test_an_account_is_written_only_when_it_differs(queue):
    read(ACCOUNT, queue=queue)
    vault = outbox_for(queue).vault
    version = vault.version("*")
    read(ACCOUNT, queue=queue)
    assert vault.version("*") == version
    read(ACCOUNT.replace("587", "2525"), queue=queue)
    assert vault.version("*") != version
    assert vault.get("*").port == 2525


def test_accounts_do_not_wait_for_the_threads_transaction(queue):
    """Configuration is read outside of it, and an abort there changes nothing."""
    read(ACCOUNT, queue=queue)
    transaction.abort()
    assert outbox_for(queue).accounts.get("*")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (DELIVERY.replace("queuePath", "wrong"), "queuePath"),
        (DELIVERY.replace("{queue}", '{queue}" sizeLimit="0'), "sizeLimit"),
        (DELIVERY.replace("{queue}", '{queue}" sizeLimit="x'), "sizeLimit"),
        (DELIVERY.replace("{queue}", '{queue}" unknown="x'), "unknown"),
        (ACCOUNT.replace("587", "0x"), "port"),
        (ACCOUNT.replace("587", "65536"), "port"),
        (ACCOUNT.replace("starttls", "ssl"), "security"),
        (ACCOUNT.replace("passwordFrom", "password"), "password"),
        (ACCOUNT.replace("env:SITE_SMTP_PASSWORD", PASSWORD), "password_from"),
        (ACCOUNT.replace('mailbox="*"', 'mailbox="nobody"'), "nobody"),
        (ACCOUNT.replace('mailbox="*"', ""), "mailbox"),
        (ACCOUNT.replace("smtp.example.org", "smtp example"), "host"),
        (ACCOUNT.replace('username="site"', ""), "username"),
        (ACCOUNT.replace("port", 'verify="no" caFile="/x" port'), "contradicts"),
        (ACCOUNT.replace("port", 'connections="0" port'), "connections"),
        (ACCOUNT.replace("port", 'dataTimeout="0" port'), "data_timeout"),
        (ACCOUNT.replace("starttls", "plain"), "in clear"),
        ('<mail:queueProcessor queuePath="{queue}" start="now" />', "start"),
        ('<mail:queueProcessor queuePath="{queue}" unclear="ask" />', "unclear"),
    ],
)
def test_errors_name_file_and_line(tmp_path, queue, body, words):
    path = tmp_path / "site.zcml"
    path.write_text(HEAD + "\n" + body.format(queue=queue) + "\n</configure>\n")
    line = HEAD.count("\n") + 2
    with pytest.raises(ConfigurationError) as caught:
        XMLConfig(str(path))()
    text = str(caught.value)
    assert words in text
    assert f'File "{path}", line {line}.' in text
    assert PASSWORD not in text.replace(f'"{PASSWORD}"', "")
    assert not Path(queue).exists()  # nothing happens before all is read


def test_errors_while_it_is_done_name_file_and_line(tmp_path):
    path = tmp_path / "site.zcml"
    (tmp_path / "file").write_text("no directory")
    path.write_text(HEAD + DELIVERY.format(queue=tmp_path / "file") + "\n</configure>\n")
    config = XMLConfig(str(path))
    with pytest.raises(ConfigurationError, match=r"site\.zcml"):
        config()


@pytest.mark.parametrize(
    "body",
    [
        DELIVERY + DELIVERY.replace("{queue}", "{queue}2"),
        ACCOUNT + ACCOUNT.replace("587", "25"),
        ACCOUNT + ACCOUNT.replace("{queue}", "{queue}/../outbox"),
        ACCOUNT.replace('"*"', '"a@b.org"') + ACCOUNT.replace('"*"', '"A@B.org"'),
        '<mail:queueProcessor queuePath="{queue}" /><mail:queueProcessor queuePath="{queue}2" />',
        DELIVERY + '<mail:queuedDelivery queuePath="{queue}2" mailer="smtp" processorThread="no"'
        ' permission="zope.Public" />',
    ],
)
def test_conflicts(queue, body):
    path = Path(queue).with_suffix(".zcml")
    # Two files: what one file includes, it may override.
    for number, part in enumerate(body.format(queue=queue).split("/>")[:-1]):
        path.with_suffix(f".{number}").write_text(HEAD + part + "/>\n</configure>")
    includes = "".join(f'<include file="{path.with_suffix(f".{n}")}" />' for n in range(2))
    with pytest.raises(ConfigurationConflictError) as caught:
        read(includes)
    assert ".0" in str(caught.value)
    assert ".1" in str(caught.value)


def test_different_ones_do_not_conflict(queue):
    read(
        DELIVERY
        + DELIVERY.replace("queuePath", 'name="B" queuePath')
        + ACCOUNT
        + ACCOUNT.replace('"*"', '"a@b.org"')
        + ACCOUNT.replace("{queue}", "{queue}2"),
        queue=queue,
    )
    assert len(outbox_for(queue).accounts.list()) == 2


class Principal:
    id = "somebody"


class Participation:
    principal = Principal()
    interaction = None


class Policy(ParanoidSecurityPolicy):
    """Grants what it is told to; and the components are asked through a proxy."""

    granted: frozenset[str] = frozenset()

    def checkPermission(self, permission, object):
        return permission in self.granted


def interact(monkeypatch, granted: set[str]) -> None:
    monkeypatch.setattr(Policy, "granted", frozenset(granted))
    setSecurityPolicy(Policy)
    newInteraction(Participation())


@pytest.mark.parametrize("interface", [IMailDelivery, IQueuedMailDelivery, IMailboxDelivery])
def test_permission(queue, monkeypatch, interface):
    read(
        DELIVERY.replace("queuePath", 'permission="zope.SendMail" queuePath') + ACCOUNT,
        queue=queue,
    )
    assert getUtility(IPermission, "zope.SendMail")
    delivery = ProxyFactory(getUtility(interface, "Mail"))
    interact(monkeypatch, set())
    for use in (lambda: delivery.send, lambda: delivery.bind, lambda: delivery.queuePath):
        with pytest.raises(Unauthorized):
            use()
    endInteraction()
    interact(monkeypatch, {"zope.SendMail"})
    assert delivery.send(ALICE, [BOB], MESSAGE) == "1@example.org"
    assert delivery.bind(ALICE).send(ALICE, [BOB], MESSAGE)
    with pytest.raises(ForbiddenAttribute):
        delivery._spool  # noqa: B018
    transaction.abort()


def test_public(queue, monkeypatch):
    read(
        DELIVERY.replace("queuePath", 'permission="zope.Public" queuePath') + ACCOUNT,
        queue=queue,
    )
    delivery = ProxyFactory(getUtility(IMailDelivery, "Mail"))
    interact(monkeypatch, set())
    assert delivery.send(ALICE, [BOB], MESSAGE)
    transaction.abort()


def test_unknown_permission(queue):
    with pytest.raises(ConfigurationError, match=r"no\.such"):
        read(DELIVERY.replace("queuePath", 'permission="no.such" queuePath'), queue=queue)


def test_permission_of_zope_sendmail_itself(queue):
    """Who has defined it keeps it, and there is no conflict."""
    read(
        '<permission id="zope.SendMail" title="Theirs" />'
        + DELIVERY.replace("queuePath", 'permission="zope.SendMail" queuePath'),
        queue=queue,
    )
    assert getUtility(IPermission, "zope.SendMail").title == "Theirs"


def test_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTBOX_OF_TEST", str(tmp_path / "from-env"))
    site = tmp_path / "site"
    site.mkdir()
    (site / "site.zcml").write_text(
        HEAD
        + DELIVERY.format(queue="$OUTBOX_OF_TEST/a")
        + DELIVERY.format(queue="var/relative").replace("queuePath", 'name="B" queuePath')
        + "</configure>"
    )
    XMLConfig(str(site / "site.zcml"))()
    assert getUtility(IMailDelivery, "Mail").queuePath == str(tmp_path / "from-env" / "a")
    assert getUtility(IMailDelivery, "B").queuePath == str(site / "var" / "relative")


# The processor

PROCESSOR = '<mail:queueProcessor queuePath="{queue}" />'
STARTING = '<mail:queueProcessor queuePath="{queue}" start="IProcessStarting" />'


def test_reading_starts_no_thread(queue):
    pytest.importorskip("zope.processlifetime")
    before = set(threading.enumerate())
    read(DELIVERY + ACCOUNT + STARTING, queue=queue)
    processor = getUtility(IQueueProcessor, "Mail")
    assert isinstance(processor, QueueProcessorThread)
    assert processor.ident is None
    assert set(threading.enumerate()) <= before


def test_what_becomes_of_the_unclear(queue):
    read('<mail:queueProcessor queuePath="{queue}" unclear="hold" />' + DELIVERY, queue=queue)
    processor = getUtility(IQueueProcessor, "Mail")
    assert processor.schedule.unclear == "hold"


def test_by_hand(queue):
    read(DELIVERY + PROCESSOR, queue=queue)
    processor = getUtility(IQueueProcessor, "Mail")
    processor.start()
    assert processor.is_alive()
    assert processor.stop(timeout=30)


@pytest.mark.parametrize("times", [1, 2])
def test_process_starting(queue, times, caplog):
    """Read twice, or told twice: one thread, and one line that tells of it."""
    caplog.set_level("INFO")
    lifetime = pytest.importorskip("zope.processlifetime")
    for _ in range(times):
        read(STARTING, queue=queue)
    for _ in range(times):
        notify(lifetime.ProcessStarting())
    alive = [t for t in threading.enumerate() if isinstance(t, QueueProcessorThread)]
    assert alive == [getUtility(IQueueProcessor, "Mail")]
    (outbox,) = (outbox for _, outbox in getUtilitiesFor(IOutbox))
    assert caplog.messages.count(f"delivering {outbox.location} in this process") == 1
    assert alive[0].stop(timeout=30)


def test_by_hand_is_not_started_by_the_event(queue):
    lifetime = pytest.importorskip("zope.processlifetime")
    read(PROCESSOR, queue=queue)
    notify(lifetime.ProcessStarting())
    assert getUtility(IQueueProcessor, "Mail").ident is None


def test_without_processlifetime(queue, monkeypatch):
    monkeypatch.setitem(sys.modules, "zope.processlifetime", None)
    with pytest.raises(ConfigurationError, match=r"zope\.processlifetime"):
        read(STARTING, queue=queue)
    read(PROCESSOR, queue=queue)  # needs none


# Together


def test_beside_the_directives_of_zope_sendmail(queue, tmp_path):
    read(
        DELIVERY + ACCOUNT + '<mail:smtpMailer name="smtp" hostname="localhost" port="25" />'
        '<mail:queuedDelivery name="Theirs" queuePath="{queue}-theirs" mailer="smtp"'
        ' processorThread="no" permission="zope.Public" />',
        queue=queue,
    )
    assert getUtility(IMailDelivery, "Theirs").__class__ is QueuedMailDelivery
    with transaction.manager:
        getUtility(IMailDelivery, "Mail").send(ALICE, [BOB], MESSAGE)
        getUtility(IMailDelivery, "Theirs").send(ALICE, [BOB], MESSAGE)
    assert len(mails_on_disk(outbox_for(queue))) == 1
    assert len(list(Path(f"{queue}-theirs/new").iterdir())) == 1


def test_reading_twice(queue):
    for _ in range(2):
        read(DELIVERY + ACCOUNT + PROCESSOR, queue=queue)
    assert len(list(getUtilitiesFor(IOutbox))) == 1
    with transaction.manager:
        getUtility(IMailDelivery, "Mail").send(ALICE, [BOB], MESSAGE)
    assert len(mails_on_disk(outbox_for(queue))) == 1


def test_the_package_alone_registers_nothing(queue):
    read("")
    assert list(getUtilitiesFor(IMailDelivery)) == []
    assert list(getUtilitiesFor(IOutbox)) == []
    assert getGlobalSiteManager().queryUtility(IPermission, zcml.SEND_MAIL) is None
