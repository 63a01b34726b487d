"""``python -m demo [DIR]``: send mails through three mailboxes, and check what arrived.

Exit status: 0, all is as it must be; 1, something is not, and it was said what; 2, there
is nothing to send.
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
    mails, unusable = read_mails(directory)
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
        console.print(f"{escape(str(directory))} has no .eml file that can be sent.")
        return 2
    if troubles:
        return 1
    console.print("[green]All is as it must be.[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
