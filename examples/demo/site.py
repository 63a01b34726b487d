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

from .__main__ import EXAMPLES, ROOT, mails_of, why_not
from .journey import Journey
from .relays import three_relays

_SLUG = """\
<configure xmlns="http://namespaces.zope.org/zope">
  <include package="cpsmailaccess_delivery.zope" />
  <include file="{site}" />
</configure>
"""

_ADMIN = "admin"


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
            troubles += Journey(console, place / "outbox", relays).run(mails)
            for trouble in troubles:
                console.print(f"[red]WRONG[/]  {escape(trouble)}")
            _say_where(console, listening.getsockname()[1], password)
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


def _say_where(console: Console, port: int, password: str) -> None:
    root = f"http://localhost:{port}"
    console.print(f"ZMI            {root}/manage")
    console.print(f"Mail accounts  {root}/demo/mail/manage_main")
    if password:
        console.print(f"Log in as      {_ADMIN}, password {password}")
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
