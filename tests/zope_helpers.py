"""A Zope in this process: its real start, its real WSGI stack, browsers in front of it.

`ZopeInProcess` is started once in a process of tests and has one root; `Zmi` is what a test
sees of it, with an outbox of its own.  The fixtures `zope_in_process`, `zmi` and `chromium` are
in conftest.py.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transaction
import Zope2
import Zope2.App.zcml
import Zope2.utilities
from AccessControl.SecurityManagement import noSecurityManager
from Acquisition import aq_base
from paste.deploy import loadapp
from waitress.server import create_server
from zope.component import getGlobalSiteManager, getUtilitiesFor
from zope.testbrowser.wsgi import Browser

from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.interfaces import Entry, IMailboxDelivery, IMailDelivery, IOutbox
from cpsmailaccess_delivery.testing import SMTPServer
from cpsmailaccess_delivery.zope import claims, my_outbox, trial
from cpsmailaccess_delivery.zope.mail_accounts import MailAccounts
from cpsmailaccess_delivery.zope.policy import Policy
from cpsmailaccess_delivery.zope.throttle import Throttle

SLUG = """\
<configure xmlns="http://namespaces.zope.org/zope">
  <include package="cpsmailaccess_delivery.zope" />
</configure>
"""

ZOPE_CONF = """\
%define INSTANCE {place}
instancehome $INSTANCE
pid-filename $INSTANCE/Z4.pid
<zodb_db main>
  <filestorage>
    path $INSTANCE/var/Data.fs
  </filestorage>
  mount-point /
</zodb_db>
"""

ZOPE_INI = """\
[app:zope]
use = egg:Zope#main
zope_conf = %(here)s/zope.conf

[pipeline:main]
pipeline = egg:Zope#httpexceptions zope
"""

DELIVERY = """\
<configure xmlns:mail="http://namespaces.zope.org/mail">
  <mail:mailboxDelivery name="{name}" queuePath="{path}" />
</configure>
"""

PROCESSOR = """\
<configure xmlns:mail="http://namespaces.zope.org/mail">
  <mail:queueProcessor queuePath="{path}" name="Mail" unclear="hold" />
</configure>
"""

ALICE, BOB = "alice@example.org", "bob@example.net"
MESSAGE = b"From: alice@example.org\r\nSubject: secret plan\r\n\r\nThe body.\r\n"

ADMIN = ("admin", "the administrator's password")


def password_of(user: str) -> str:
    """Return the password: the administrator has one, others have their name."""
    return ADMIN[1] if user == ADMIN[0] else user


class ZopeInProcess:
    """See the module."""

    def __init__(self, place: Path) -> None:
        self.place = place
        skeleton = Path(Zope2.utilities.__file__).parent / "skel"
        shutil.copytree(skeleton / "etc", place / "etc")
        (place / "var").mkdir()
        (place / "etc" / "zope.conf").write_text(ZOPE_CONF.format(place=place))
        (place / "etc" / "zope.ini").write_text(ZOPE_INI)
        slug = place / "etc" / "package-includes" / "cpsmailaccess_delivery-configure.zcml"
        slug.parent.mkdir()
        slug.write_text(SLUG)
        self._registry = {}
        with self.registry():
            self.wsgi = loadapp(f"config:{place}/etc/zope.ini")
        with self.app() as app:
            app.acl_users._doAddUser(*ADMIN, ["Manager"], [])

    @contextmanager
    def registry(self) -> Iterator[None]:
        """Use Zope's component registry: other tests clear the one that is there."""
        base = getGlobalSiteManager()
        others = dict(base.__dict__)
        if self._registry:
            base.__dict__.clear()
            base.__dict__.update(self._registry)
        else:  # the first time: everything is registered anew
            base.__init__(base.__name__)
        try:
            yield
        finally:
            self._registry = dict(base.__dict__)
            base.__dict__.clear()
            base.__dict__.update(others)

    @contextmanager
    def app(self) -> Iterator[Any]:
        """Change the root in a transaction of its own."""
        app = Zope2.app()
        try:
            yield app
            transaction.commit()
        finally:
            transaction.abort()
            app._p_jar.close()

    def stop(self) -> None:
        Zope2.DB.close()


class Zmi:
    """What a test sees: ``zmi.outbox``, browsers, and the root to put objects into.

    ``mail``: a *Mail accounts* object that is there already, ``/mail``.  `path`: of the outbox, or
    its URL.
    """

    def __init__(self, zope: ZopeInProcess, path: str) -> None:
        self._zope = zope
        self.wsgi = zope.wsgi
        Zope2.App.zcml.load_string(DELIVERY.format(name="Mail", path=path))
        ((_, outbox),) = getUtilitiesFor(IOutbox)
        self.outbox: Outbox = outbox
        self.url = "http://localhost"
        with self.app() as app:
            self._before = set(app.objectIds()), set(app.acl_users.getUserNames())
            self._kept_before = set(app._p_jar.root())
        self.add_mail_accounts("mail")
        # Two each, however slow the machine is: time does not go on.
        trial._checks = Throttle(12, clock=lambda: 0.0)
        my_outbox._retries = Throttle(12, clock=lambda: 0.0)

    def app(self) -> Any:
        """Change the root: ``with zmi.app() as app: ...`` commits."""
        return self._zope.app()

    def add_mail_accounts(self, id: str) -> None:
        with self.app() as app:
            app._setObject(id, MailAccounts(id))

    def add_user(self, name: str, *roles: str) -> None:
        """Add a user whose password is his name."""
        with self.app() as app:
            app.acl_users._doAddUser(name, name, list(roles), [])

    def browser(self, user: str = ADMIN[0]) -> Browser:
        """Return a browser; ``user=""``: anonymous."""
        browser = Browser(wsgi_app=self.wsgi)
        if user:
            login = base64.b64encode(f"{user}:{password_of(user)}".encode()).decode()
            browser.addHeader("Authorization", f"Basic {login}")
        return browser

    def database(self) -> bytes:
        """Return what the ZODB has on disk, its history included."""
        return (self._zope.place / "var" / "Data.fs").read_bytes()

    @contextmanager
    def served(self) -> Iterator[str]:
        """Serve on a free port; yield the URL of the root."""
        server = create_server(self.wsgi, host="127.0.0.1", port=0, threads=4)
        thread = threading.Thread(target=server.run, name="waitress", daemon=True)
        thread.start()
        try:
            yield f"http://localhost:{server.effective_port}"
        finally:
            server.close()
            server.task_dispatcher.shutdown()
            thread.join(10)

    def close(self) -> None:
        noSecurityManager()  # that of a request which an error has left
        with self.app() as app:
            ids, users = self._before
            app.manage_delObjects([each for each in app.objectIds() if each not in ids])
            strange = [each for each in app.acl_users.getUserNames() if each not in users]
            app.acl_users.userFolderDelUsers(strange)
            vars(aq_base(app)).pop(claims._PLACE, None)
            app._p_changed = True
            root = app._p_jar.root()
            for name in set(root) - self._kept_before:
                del root[name]
        manager = getGlobalSiteManager()
        for provided in (IMailDelivery, IMailboxDelivery):
            for name, _ in list(getUtilitiesFor(provided)):
                manager.unregisterUtility(provided=provided, name=name)
        for name, outbox in list(getUtilitiesFor(IOutbox)):
            outbox.close()
            manager.unregisterUtility(provided=IOutbox, name=name)


def put(zmi: Zmi, *accounts: Account) -> None:
    """Keep accounts, in a transaction."""
    with transaction.manager:
        for account in accounts:
            zmi.outbox.accounts.put(account)


def alert(browser: Browser) -> str:
    """Return what a page says in its alert, without markup."""
    found = re.search(
        r'<div class="alert[^>]*>\s*(.*?)\s*(?:\([\d: -]+\)\s*)?</div>', browser.contents, re.S
    )
    return " ".join(re.sub(r"<[^>]+>", "", found[1]).split()) if found else ""


@contextmanager
def errors_seen(browser: Browser) -> Iterator[None]:
    """Do not raise for an error's status, which is then asserted on."""
    browser.raiseHttpErrors = False
    yield
    browser.raiseHttpErrors = True


def words(browser: Browser) -> str:
    """Return what a page says, without markup."""
    return " ".join(re.sub(r"<[^>]+>", " ", browser.contents).split())


def fill(browser: Browser, **texts: str) -> None:
    """Type into fields of a form."""
    for name, value in texts.items():
        browser.getControl(name=name).value = value


def token_of(browser: Browser, url: str) -> str:
    """Return the token of the forms of a page."""
    browser.open(url)
    return re.search(
        r'name="form_token" value="(\w+)"|value="(\w+)" name="form_token"', browser.contents
    )[1]


def queue_tab(zmi: Zmi, query: str = "") -> Browser:
    """Return a browser with the tab *Queue*."""
    browser = zmi.browser()
    browser.open(f"{zmi.url}/mail/manage_queue{query}")
    return browser


def choose(browser: Browser, *entries: Entry) -> None:
    """Tick mails in the tab *Queue*."""
    browser.getControl(name="ids:list").value = [entry.id for entry in entries]


def run_by_zcml(zmi: Zmi) -> None:
    """Configure a processor, not started yet."""
    Zope2.App.zcml.load_string(PROCESSOR.format(path=zmi.outbox.location))


def send(
    zmi: Zmi, *recipients: str, sender: str = ALICE, message: bytes = MESSAGE, **options: Any
) -> str:
    """Send in a transaction, to bob unless somebody is named; return the Message-Id."""
    with transaction.manager:
        return zmi.outbox.delivery.send(sender, recipients or [BOB], message, **options)


def states(zmi: Zmi) -> list[str]:
    """Return the states of the mails in the queue, the oldest first."""
    return [str(entry.state) for entry in zmi.outbox.queue.entries()]


def relay_account(server: SMTPServer, **changes: Any) -> Account:
    """Return the account of alice at a test server."""
    settings = {"mailbox": ALICE, "host": "127.0.0.1", "port": server.port, "security": "plain"}
    return Account(**{**settings, **changes})


def own_account(zmi: Zmi, mailbox: str, user: str, server: SMTPServer | None = None) -> Account:
    """Keep the account of a user of the root; its relay is a test server, or nowhere."""
    account = Account(
        mailbox=mailbox,
        host="127.0.0.1",
        port=server.port if server else 1,
        security="plain",
        owner=f"/acl_users:{user}",
    )
    put(zmi, account)
    return account


def allow(zmi: Zmi, **decisions: Any) -> None:
    """Decide what users may set up, as on the tab Defaults."""
    with zmi.app() as app:
        app.mail._set_policy(Policy(**decisions))


def picture(page: Any, name: str) -> None:
    """Keep what a page of Chromium shows as docs/images/NAME.png, when PICTURES=1."""
    if os.environ.get("PICTURES"):
        place = Path(__file__).parents[1] / "docs" / "images"
        place.mkdir(exist_ok=True)
        page.screenshot(path=place / f"{name}.png", full_page=True)
