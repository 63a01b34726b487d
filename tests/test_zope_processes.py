"""Two Zope processes, one ZEO server, one spool: every mail once, from either."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from email import message_from_bytes
from pathlib import Path

import pytest
import transaction

from conftest import mails_on_disk
from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.testing import SMTPServer

pytest.importorskip("Zope2", reason="Zope is in the extra [test]")
pytest.importorskip("ZEO", reason="ZEO is in the extra [test]")

import Zope2.utilities

ALICE, BOB = "alice@example.org", "bob@example.net"

#: Mails that each of the two sends, one a transaction.
MAILS = 40

#: ``server-sync``: a transaction sees what others had committed before it began.
ZOPE_CONF = """\
%import ZEO
instancehome {place}
<zodb_db main>
  <clientstorage>
    server {address}
    server-sync true
  </clientstorage>
  mount-point /
</zodb_db>
"""

ZOPE_INI = """\
[app:main]
use = egg:Zope#main
zope_conf = %(here)s/zope.conf
"""

SLUG = """\
<configure xmlns="http://namespaces.zope.org/zope"
           xmlns:mail="http://namespaces.zope.org/mail">
  <include package="cpsmailaccess_delivery.zope" />
  <mail:mailboxDelivery name="Mail" queuePath="{outbox}" />
  <mail:queueProcessor queuePath="{outbox}" start="IProcessStarting" />
</configure>
"""

#: A Zope as runwsgi starts it; each line that it reads is a mail that it sends, with its retries
#: when the other process was faster.
ZOPE = """\
import sys, transaction, Zope2
from paste.deploy import loadapp
from ZODB.POSException import ConflictError

loadapp("config:" + sys.argv[1] + "/etc/zope.ini")
print("started", flush=True)
for line in sys.stdin:
    while True:
        app = Zope2.app()
        transaction.begin()  # asks the server; to open a connection does not
        try:
            app.sent = getattr(app, "sent", 0) + 1
            app.MailHost.send("x", "bob@example.net", "alice@example.org", line.strip())
            transaction.commit()
        except ConflictError:
            transaction.abort()
            continue
        finally:
            app._p_jar.close()
        break
    print("sent", flush=True)
from zope.component import getUtilitiesFor
from cpsmailaccess_delivery.interfaces import IOutbox
for _, outbox in getUtilitiesFor(IOutbox):
    outbox.close()
Zope2.DB.close()
"""

ZEO_SERVER = """\
import sys, ZEO
address, stop = ZEO.server(sys.argv[1])
print(*address, sep=":", flush=True)
sys.stdin.read()
stop()
"""


@contextmanager
def python(code: str, *arguments: object):
    """Run a program that ends when its standard input does."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
        process.stdin.close()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def make_instance(place: Path, *, address: str, outbox: Path) -> None:
    skeleton = Path(Zope2.utilities.__file__).parent / "skel"
    shutil.copytree(skeleton / "etc", place / "etc")
    (place / "var").mkdir()
    (place / "etc" / "zope.conf").write_text(ZOPE_CONF.format(place=place, address=address))
    (place / "etc" / "zope.ini").write_text(ZOPE_INI)
    slug = place / "etc" / "package-includes" / "cpsmailaccess_delivery-configure.zcml"
    slug.parent.mkdir()
    slug.write_text(SLUG.format(outbox=outbox))


def add_mailhost(address: str) -> None:
    """Put a MailboxHost into the root that Zope has made."""
    import ZEO

    from cpsmailaccess_delivery.zope.mailhost import MailboxHost

    host, port = address.split(":")
    database = ZEO.DB((host, int(port)))
    connection = database.open()
    connection.root()["Application"]._setObject("MailHost", MailboxHost("MailHost"))
    transaction.commit()
    connection.close()
    database.close()


def test_two_processes_send_each_mail_once(tmp_path):
    with SMTPServer() as relay, python(ZEO_SERVER, tmp_path / "Data.fs") as zeo:
        address = zeo.stdout.readline().strip()
        with Outbox(tmp_path / "outbox") as outbox, transaction.manager:
            outbox.accounts.put(
                Account(mailbox="*", host="127.0.0.1", port=relay.port, security="plain")
            )
        for name in "ab":
            make_instance(tmp_path / name, address=address, outbox=tmp_path / "outbox")
        with python(ZOPE, tmp_path / "a") as first:
            assert first.stdout.readline() == "started\n"
            with python(ZOPE, tmp_path / "b") as second:
                assert second.stdout.readline() == "started\n"
                add_mailhost(address)
                for name, process in (("a", first), ("b", second)):
                    process.stdin.write("".join(f"{name}{n}\n" for n in range(MAILS)))
                    process.stdin.flush()
                for process in (first, second):
                    assert [process.stdout.readline() for _ in range(MAILS)] == ["sent\n"] * MAILS
                relay.wait_for(2 * MAILS, timeout=60)
        # both have ended, and left nothing that would be sent again
        arrived = Counter(message_from_bytes(mail.data)["Subject"] for mail in relay.mails)
        assert arrived == Counter(f"{name}{n}" for name in "ab" for n in range(MAILS))
        with Outbox(tmp_path / "outbox") as outbox:
            assert mails_on_disk(outbox) == []
            outbox.processor().run(forever=False)
        assert len(relay.mails) == 2 * MAILS
