"""``cpsmail accounts``: list, set, check and remove the accounts of mailboxes.

A password is never an option: command lines are seen by every user and kept by shells.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click
import transaction

from ..account import Account, Secret, normalise_mailbox
from ..envelope import Route, lane_key
from ..errors import InvalidAccount, NoSuchAccount
from ..wording import counted
from .app import EX_NO, App, confirmed, json_option, pass_app, yes_option
from .output import complain, emit, say, table

if TYPE_CHECKING:
    from ..outbox import Outbox

_COLUMNS = ("MAILBOX", "RELAY", "SECURITY", "USERNAME", "PASSWORD", "VERIFY", "LIMITS", "OWNER")


@click.group()
def accounts() -> None:
    """The SMTP accounts of mailboxes.

    A mailbox is an address, @domain, or * for the default account.
    """


@accounts.command("list")
@json_option
@pass_app
def list_(app: App, as_json: bool) -> None:
    """List the accounts; passwords are never shown."""
    with app.outbox() as outbox:
        found = outbox.accounts.list()
    if as_json:
        emit({"accounts": [account_json(account) for account in found]})
    elif found:
        table(_COLUMNS, (_row(account) for account in found))
    else:
        say("no accounts; `cpsmail accounts set MAILBOX --host ...` adds one")


def _number_or_none(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    if value is None or value == "none":
        return value
    if not (value.isascii() and value.isdecimal()):
        raise click.BadParameter(f"{value!r} is neither a number nor none")
    return int(value)


@accounts.command("set")
@click.argument("mailbox")
@click.option("--host", help="Name or address of the relay.")
@click.option("--port", type=int, help="[default: by security: 465, 587, 25]")
@click.option(
    "--security", type=click.Choice(["tls", "starttls", "plain"]), help="[default: starttls]"
)
@click.option("--username", help="User name of the login.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@click.option("--password-prompt", is_flag=True, help="Ask for the password.")
@click.option("--password-from", metavar="env:NAME|file:PATH", help="Read it there, at each login.")
@click.option("--no-login", is_flag=True, help="Log in no more; forget user name and password.")
@click.option("--ca-file", metavar="FILE", help="Verify the certificate with this CA.")
@click.option(
    "--verify/--no-verify", default=None, help="Verify with the system's CAs; or not at all."
)
@click.option("--connect-timeout", type=float, metavar="SECONDS")
@click.option("--command-timeout", type=float, metavar="SECONDS")
@click.option("--data-timeout", type=float, metavar="SECONDS")
@click.option("--connections", type=int, metavar="N", help="At most, at a time.")
@click.option("--mails-per-session", type=int, metavar="N", help="At most.")
@click.option("--owner", help="Whose it is; '': the site's.")
@click.option("--mails-per-minute", callback=_number_or_none, metavar="N|none", help="At most.")
@json_option
@pass_app
def set_(
    app: App,
    /,
    mailbox: str,
    password_stdin: bool,
    password_prompt: bool,
    password_from: str | None,
    no_login: bool,
    ca_file: str | None,
    verify: bool | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Add an account, or change what is given of one; the rest stays, its password too."""
    if sum((password_stdin, password_prompt, password_from is not None, no_login)) > 1:
        raise click.UsageError(
            "--password-stdin, --password-prompt, --password-from, --no-login: give one of them"
        )
    if ca_file is not None and verify is not None:
        raise click.UsageError("--ca-file and --verify/--no-verify: give one of them")
    changes = {field: value for field, value in given.items() if value is not None}
    if changes.get("mails_per_minute") == "none":
        changes["mails_per_minute"] = None
    if ca_file is not None or verify is not None:
        changes["verify"] = ca_file or verify
    if no_login:
        changes.update(username=None, password=None, password_from=None)
    if password_from is not None:
        changes.update(password=None, password_from=password_from)
    if password_stdin or password_prompt:
        changes.update(password=_read_password(password_prompt, mailbox), password_from=None)
    with app.outbox(make=True) as outbox, transaction.manager:
        existing = _existing(outbox, mailbox)
        if changes.get("username") and not _has_password(existing, changes):
            changes["password"] = _missing_password(mailbox)
        account = _changed(existing, mailbox, changes)
        outbox.accounts.put(account)
    if as_json:
        emit({"account": account_json(account), "added": existing is None})
    else:
        done = "added" if existing is None else "changed"
        say(f"{done} {account.mailbox}; `cpsmail accounts check '{account.mailbox}'` tries it")


@accounts.command()
@click.argument("mailbox")
@json_option
@pass_app
def check(app: App, mailbox: str, as_json: bool) -> int:
    """Connect, verify TLS and log in, as a delivery would; send nothing.

    MAILBOX may also be a sender whom another account serves (@domain, *).
    Exit code 0: works, and mails that wait for this account are tried again; 1: does not.
    """
    from ..password import resolve_secret
    from ..processor import own_host_name
    from ..smtp.check import check as try_account

    with app.outbox() as outbox:
        served_by = _existing(outbox, mailbox) or outbox.accounts.find(mailbox)
        account = outbox.vault.get(served_by.mailbox)
        secret = resolve_secret(account)
        helo_name = app.settings().helo_name or own_host_name()
        report = try_account(account, secret, helo_name=helo_name)
        if report.ok:  # what waits for this account need not wait any longer
            outbox.spool.note_lane(lane_key(Route(account.mailbox)), None)
    if as_json:
        failure = report.failure
        emit(
            {
                "mailbox": account.mailbox,
                "relay": account.relay,
                "ok": report.ok,
                "steps": list(report.steps),
                "tls": report.tls,
                "problem": report.problem,
                "phase": str(failure.phase) if failure else None,
                "code": failure.reply.code if failure and failure.reply else None,
            }
        )
    else:
        for step in report.steps:
            say(f"  {step}")
        works = f"{account.mailbox} at {account.relay} works"
        say(works if report.ok else f"{account.mailbox} does not work: {report.problem}")
    return 0 if report.ok else EX_NO


@accounts.command()
@click.argument("mailbox")
@yes_option
@json_option
@pass_app
def remove(app: App, mailbox: str, yes: bool, as_json: bool) -> int:
    """Remove an account.  Mails that wait for it keep waiting until it is set again."""
    with app.outbox() as outbox:
        account = outbox.accounts.get(mailbox)
        lane = lane_key(Route(account.mailbox))
        waiting = sum(entry.lane == lane for entry in outbox.queue.entries())
        if waiting:
            routed = counted(waiting, "mail in the queue is", "mails in the queue are")
            complain(f"warning: {routed} routed as {account.mailbox}")
        if not yes and not confirmed(f"Remove the account {account.mailbox}?"):
            complain("nothing was changed")
            return EX_NO
        with transaction.manager:
            outbox.accounts.delete(account.mailbox)
    if as_json:
        emit({"removed": account.mailbox, "mails_waiting": waiting})
    else:
        say(f"removed {account.mailbox}")
    return 0


@accounts.command("rekey")
@json_option
@pass_app
def rekey_(app: App, as_json: bool) -> int:
    """Seal all accounts with a new key, while everything runs.

    Cut short, it goes on when it is said again.  Exit code 1: a transaction that began with
    the former key is still under way, so that key is kept; say it again later.
    """
    from ..rekey import rekey

    with app.outbox() as outbox:
        done = rekey(outbox.vault, outbox.keys)
    former = done.former.id if done.former is not None else None
    if as_json:
        emit({"key": done.key.id, "former": former, "resealed": done.resealed, "left": done.needed})
    else:
        accounts = counted(done.resealed, "account is", "accounts are")
        say(f"{accounts} sealed anew, with the key {done.key.id}")
        if done.needed:
            changes = counted(done.needed, "change under way needs", "changes under way need")
            say(f"{changes} the former key {former}: say this again")
        elif done.former is not None:
            say(f"the former key {former} from {done.former.origin} is needed no more")
    return EX_NO if done.needed else 0


def account_json(account: Account) -> dict[str, Any]:
    """Return an account as JSON: `Account.public`, and whether a password is stored."""
    return {**account.public(), "password_stored": account.password is not None}


def _existing(outbox: Outbox, mailbox: str) -> Account | None:
    try:
        return outbox.accounts.get(mailbox)
    except NoSuchAccount:
        return None


def _changed(existing: Account | None, mailbox: str, changes: dict[str, Any]) -> Account:
    if existing is None:
        if "host" not in changes:
            raise InvalidAccount(f"account {normalise_mailbox(mailbox)}: is new: --host is needed")
        return Account(mailbox=mailbox, **changes)
    security = changes.get("security", existing.security)
    if security != existing.security and "port" not in changes:
        changes["port"] = 0  # the one that belongs to it
    return existing.replace(**changes)


def _has_password(existing: Account | None, changes: dict[str, Any]) -> bool:
    if changes.get("password") is not None or changes.get("password_from") is not None:
        return True
    return existing is not None and not (
        existing.password is None and existing.password_from is None
    )


def _missing_password(mailbox: str) -> Secret:
    if sys.stdin.isatty():
        return _read_password(True, mailbox)
    raise InvalidAccount(
        f"account {mailbox}: --username needs a password: say --password-prompt,"
        " --password-stdin or --password-from"
    )


def _read_password(prompt: bool, mailbox: str) -> Secret:
    if prompt:
        text = click.prompt(f"Password of {mailbox}", hide_input=True, err=True)
    else:
        text = sys.stdin.read()
        text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise click.UsageError("the password is empty")
    return Secret(text)


def _row(account: Account) -> tuple[object, ...]:
    connections = counted(account.connections, "connection", "connections")
    limits = f"{connections}, {counted(account.mails_per_session, 'mail', 'mails')} each"
    if account.mails_per_minute is not None:
        limits += f", {account.mails_per_minute} a minute"
    return (
        account.mailbox,
        account.relay,
        account.security,
        account.username or "",
        account.password_from or ("stored" if account.password is not None else "none"),
        account.verify if isinstance(account.verify, str) else ("yes" if account.verify else "NO"),
        limits,
        account.owner,
    )
