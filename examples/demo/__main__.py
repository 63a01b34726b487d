"""``python -m demo [DIR]``: send mails through three mailboxes, and check what arrived.

Exit status: 0, all is as it must be; 1, something is not, and it was said what; 2, there
is nothing to send, and it was said why.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from zope.component import getUtility
from zope.configuration import xmlconfig

from cpsmailaccess_delivery.interfaces import IOutbox

from .journey import Journey
from .mails import Mail, make_large_mail, read_mails
from .relays import three_relays

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "mails"


def main(arguments: list[str]) -> int:
    """Run the demo; return the exit status."""
    console = Console(highlight=False)
    directory = Path(arguments[0]) if arguments else EXAMPLES
    try:
        mails, troubles = mails_of(directory)
    except OSError as error:
        return _cannot_read(console, directory, why_not(error))
    if mails:
        senders = list(dict.fromkeys(mail.sender for mail in mails))
        with (
            tempfile.TemporaryDirectory(prefix="cpsmail-demo-") as place,
            three_relays(Path(place), senders) as relays,
        ):
            spool = Path(place) / "outbox"
            os.environ["CPSMAIL_OUTBOX"] = str(spool)
            xmlconfig.file(str(ROOT / "configure.zcml"))
            try:
                troubles += Journey(console, spool, relays).run(mails)
            finally:
                getUtility(IOutbox, os.path.realpath(spool)).close()
    for trouble in troubles:
        console.print(f"[red]WRONG[/]  {escape(trouble)}")
    if not mails:
        return _cannot_read(console, directory, "has no .eml file that can be sent")
    if troubles:
        return 1
    console.print("[green]All is as it must be.[/]")
    return 0


def mails_of(directory: Path) -> tuple[list[Mail], list[str]]:
    """Return what is to be sent, and what is wrong with the rest.  Raises OSError."""
    mails, unusable = read_mails(directory)
    if directory == EXAMPLES:
        mails.append(make_large_mail())
    return mails, [f"{name}: {why}" for name, why in unusable.items()]


def why_not(error: OSError) -> str:
    """Return why a directory could not be read."""
    if isinstance(error, FileNotFoundError):
        return "no such directory"
    if isinstance(error, NotADirectoryError):
        return "is a file: name the directory that it is in"
    return str(error.strerror)


def _cannot_read(console: Console, directory: Path, why: str) -> int:
    console.print(f"[red]WRONG[/]  {escape(str(directory))}: {escape(why)}")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
