"""``python -m demo [DIR]``: send mails through three mailboxes, and check what arrived.

Exit status: 0, all is as it must be; 1, something is not, and it was said what; 2, there
is nothing to send, and it was said why.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .journey import Journey
from .mails import make_large_mail, read_mails
from .relays import three_relays

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "mails"


def main(arguments: list[str]) -> int:
    """Run the demo; return the exit status."""
    console = Console(highlight=False)
    directory = Path(arguments[0]) if arguments else EXAMPLES
    try:
        mails, unusable = read_mails(directory)
    except FileNotFoundError:
        return _cannot_read(console, directory, "no such directory")
    except NotADirectoryError:
        return _cannot_read(console, directory, "is a file: name the directory that it is in")
    except OSError as error:
        return _cannot_read(console, directory, str(error.strerror))
    if directory == EXAMPLES:
        mails.append(make_large_mail())
    troubles = [f"{name}: {why}" for name, why in unusable.items()]
    if mails:
        senders = list(dict.fromkeys(mail.sender for mail in mails))
        with (
            tempfile.TemporaryDirectory(prefix="cpsmail-demo-") as place,
            three_relays(Path(place), senders) as relays,
        ):
            journey = Journey(console, Path(place) / "outbox", relays)
            troubles += journey.run(ROOT / "configure.zcml", mails)
    for trouble in troubles:
        console.print(f"[red]WRONG[/]  {escape(trouble)}")
    if not mails:
        return _cannot_read(console, directory, "has no .eml file that can be sent")
    if troubles:
        return 1
    console.print("[green]All is as it must be.[/]")
    return 0


def _cannot_read(console: Console, directory: Path, why: str) -> int:
    console.print(f"[red]WRONG[/]  {escape(str(directory))}: {escape(why)}")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
