"""``cpsmail move``: from a directory to PostgreSQL, or back."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import InvalidSettings
from ..moving import Mover
from ..settings import Settings
from ..wording import counted
from .app import EX_NO, App, json_option, pass_app
from .output import emit, say


@click.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="For mails that are being delivered in FROM.",
)
@json_option
@pass_app
def move(app: App, source: str, target: str, wait: float, as_json: bool) -> int:
    """Move all mails from one outbox to another: directories, or postgresql://...

    Applications may send, and processors deliver, on both sides meanwhile.  Whatever ends it, say
    it again, and it goes on: no mail is lost, and none is sent twice.  Accounts and idempotency
    keys are copied; an account that TO has already stays as it is there.  Exit code 1: some mails
    are left, for the reasons that are printed.
    """
    there, here = _settings(app, source), _settings(app, target)
    if there.outbox == here.outbox:
        raise InvalidSettings(f"outbox {there.location}: is both FROM and TO")
    if isinstance(there.outbox, Path) and not there.outbox.is_dir():
        raise InvalidSettings(f"outbox {there.location}: there is none")
    with there.open() as from_, here.open() as to:
        moved = Mover(from_, to, patience=wait).move()
    if as_json:
        emit(
            {
                "moved": moved.mails,
                "accounts": moved.accounts,
                "keys": moved.keys,
                "left": [{"id": each, "reason": why} for each, why in moved.left.items()],
            }
        )
    else:
        mails = counted(moved.mails, "mail", "mails")
        accounts = counted(moved.accounts, "account", "accounts")
        keys = counted(moved.keys, "idempotency key", "idempotency keys")
        say(f"{mails} moved; {accounts} and {keys} copied")
        for each, why in moved.left.items():
            say(f"{each} is left: {why}")
    return EX_NO if moved.left else 0


def _settings(app: App, location: str) -> Settings:
    return App(app.config, {**app.options, "outbox": location}).settings()
