"""``python -m demo.site [DIR]``: a Zope with the ZMI, its mail leaving through three relays.

The instance and all its data are in ``var/zope`` (``CPSMAIL_SITE`` names another directory), the
ZMI on port 8080 (``PORT``), or a free one.  First it does what ``python -m demo`` does; then it
serves until Ctrl-C.  Exit status: 0; 1, something was not as it must be; 2, no mails.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import transaction
import Zope2
from paste.deploy import loadapp
from rich.console import Console
from rich.markup import escape
from waitress.server import create_server
from zope.component import getUtility
from Zope2.utilities import copyzopeskel, mkwsgiinstance

from cpsmailaccess_delivery.interfaces import IOutbox
from cpsmailaccess_delivery.networks import PUBLIC
from cpsmailaccess_delivery.zope.policy import Policy

from .__main__ import EXAMPLES, ROOT, mails_of, why_not
from .journey import Journey
from .relays import Relay, three_relays

_SLUG = """\
<configure xmlns="http://namespaces.zope.org/zope">
  <include package="cpsmailaccess_delivery.zope" />
  <include file="{site}" />
</configure>
"""

_ADMIN = "admin"

#: Who may try what is for users: two who do not trust each other.
_USERS = ("alice", "bob")
_DOMAIN = "site.example"


def main(arguments: list[str]) -> int:
    """Run the site; return the exit status."""
    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, _stop)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # warns of every second request
    directory = Path(arguments[0]) if arguments else EXAMPLES
    try:
        mails, troubles = mails_of(directory)
    except OSError as error:
        return _cannot(console, directory, why_not(error))
    if not mails:
        return _cannot(console, directory, "has no .eml file that can be sent")
    place = Path(os.environ.get("CPSMAIL_SITE") or ROOT / "var" / "zope").absolute()
    password = _make_instance(place)
    senders = list(dict.fromkeys(mail.sender for mail in mails))
    os.environ["CPSMAIL_OUTBOX"] = str(place / "outbox")
    listening = _listen(int(os.environ.get("PORT") or 8080))
    with (
        listening,
        tempfile.TemporaryDirectory(prefix="cpsmail-relays-") as certificates,
        three_relays(Path(certificates), senders) as relays,
    ):
        wsgi = loadapp(f"config:{place}/etc/zope.ini")  # starts the processor, too
        try:
            _add_objects()
            passwords = _add_users(place, relays[-1])
            troubles += Journey(console, place / "outbox", relays).run(mails)
            for trouble in troubles:
                console.print(f"[red]WRONG[/]  {escape(trouble)}")
            if password:
                passwords = {_ADMIN: password, **passwords}
            _say_where(console, listening.getsockname()[1], passwords)
            _serve(wsgi, listening)
        except KeyboardInterrupt:
            pass
        finally:
            getUtility(IOutbox, os.path.realpath(place / "outbox")).close()
            Zope2.DB.close()
    console.print("Stopped; `make run` goes on with the same data.")
    return 1 if troubles else 0


def _make_instance(place: Path) -> str:
    """Make a Zope instance where there is none; return the administrator's password, if new."""
    password = ""
    if not (place / "etc" / "zope.conf").exists():
        skeleton = Path(mkwsgiinstance.__file__).parent / "skel"
        home = {"INSTANCE_HOME": str(place)}
        copyzopeskel.copyskel(str(skeleton), str(place), None, None, **home)
        password = secrets.token_urlsafe(9)
        mkwsgiinstance.write_inituser(str(place / "inituser"), _ADMIN, password)
    place.chmod(0o700)
    slug = place / "etc" / "package-includes" / "cpsmailaccess_delivery-configure.zcml"
    slug.parent.mkdir(exist_ok=True)
    slug.write_text(_SLUG.format(site=ROOT / "configure.zcml"))
    return password


def _add_objects() -> None:
    """Add a folder with the objects of this package, unless it is there."""
    from cpsmailaccess_delivery.zope.mail_accounts import MailAccounts
    from cpsmailaccess_delivery.zope.mailhost import MailboxHost

    app = Zope2.app()
    try:
        with transaction.manager:
            if "demo" not in app.objectIds():
                app.manage_addFolder("demo", "Demo")
                app.demo._setObject("mail", MailAccounts("mail", "Mail accounts"))
                app.demo._setObject("MailHost", MailboxHost("MailHost", "Mailbox Host"))
    finally:
        app._p_jar.close()


def _add_users(place: Path, relay: Relay) -> dict[str, str]:
    """Add two users with a mailbox each, unless they are there; return the passwords of new ones.

    They may set up others in the same domain, at the relays of this site.
    """
    outbox = getUtility(IOutbox, os.path.realpath(place / "outbox"))
    app = Zope2.app()
    passwords = {}
    try:
        with transaction.manager:
            if "acl_users" not in app.demo.objectIds():
                app.demo.manage_addProduct["OFSP"].manage_addUserFolder()
                app.demo.mail._set_policy(
                    Policy(domains=(_DOMAIN,), networks=(PUBLIC, "127.0.0.0/8"))
                )
                passwords = {name: secrets.token_urlsafe(9) for name in _USERS}
                for name, password in passwords.items():
                    app.demo.acl_users._doAddUser(name, password, [], [])
            for name in _USERS:
                account = relay.account.replace(
                    mailbox=f"{name}@{_DOMAIN}", owner=f"/demo/acl_users:{name}"
                )
                outbox.accounts.put(account)
    finally:
        app._p_jar.close()
    return passwords


def _listen(port: int) -> socket.socket:
    """Return a socket on this machine alone, at the port or, where that is taken, a free one."""
    for each in (port, 0):
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", each))
            listening.listen()
        except OSError:
            listening.close()
        else:
            return listening
    raise OSError("no port of 127.0.0.1 is free")


def _say_where(console: Console, port: int, passwords: dict[str, str]) -> None:
    root = f"http://localhost:{port}"
    console.print(f"ZMI            {root}/manage")
    console.print(f"Mail accounts  {root}/demo/mail/manage_main")
    console.print(f"For users      {root}/demo/@@compose  @@my-outbox  @@my-mailboxes")
    for name, password in passwords.items():
        console.print(f"Log in as      {name}, password {password}")
    if passwords:
        console.print("               (said only now; `rm -r var/zope` begins anew)")
    console.print("Ctrl-C stops it.")


def _serve(wsgi: Any, listening: socket.socket) -> None:
    server = create_server(wsgi, sockets=[listening], threads=4)
    try:
        server.run()
    finally:
        server.task_dispatcher.shutdown()
        server.close()


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _cannot(console: Console, directory: Path, why: str) -> int:
    console.print(f"[red]WRONG[/]  {escape(str(directory))}: {escape(why)}")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
