"""``cpsmail send``: a mail on standard input, in the manner of sendmail; for cron and scripts."""

from __future__ import annotations

import getpass
import re
import socket
import sys
from datetime import datetime
from typing import Any

import click
import transaction

from ..address import ascii_host
from ..errors import InvalidAddress
from .app import App, json_option, pass_app
from .mail_input import Mail, qualified, read_mail, split_addresses
from .output import emit, say

_NULL = ("", "<>")
_DIGITS = tuple("0123456789")

# sendmail's, and of no use here: how errors are reported, aliases, names, body types, envelope ids.
_IGNORED_FLAGS = ("-n", "-m", "-U", "-G")
_IGNORED_VALUES = ("-e", "-h", "-B", "-V", "-L", "-A", "-O", "-X")


def _time(value: str) -> float:
    """Read ISO 8601 (of this machine's zone, when it names none) or seconds since the epoch."""
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(value).timestamp()
    except (ValueError, OverflowError):
        raise click.BadParameter(f"{value!r} is no time such as 2030-12-31T08:00") from None


def _ignored(function: Any) -> Any:
    for name in _IGNORED_FLAGS:
        function = click.option(name, f"ignored_{name[1:]}", is_flag=True, hidden=True)(function)
    for name in _IGNORED_VALUES:
        function = click.option(name, f"ignored_{name[1:]}", multiple=True, hidden=True)(function)
    return function


@click.command(context_settings={"help_option_names": ["--help"]})
@click.argument("recipients", metavar="[RECIPIENT]...", nargs=-1)
@click.option("-t", "--from-header", is_flag=True, help="Also send to To, Cc and Bcc.")
@click.option("-f", "-r", "--sender", help="Sender; <> for none.  [default: From, else this user]")
@click.option("-i", "--ignore-dots", is_flag=True, help="A line with a dot is no end.  Also -oi.")
@click.option("-F", "--name", default="", help="Name in a From field that is missing.")
@click.option("--mailbox", help="Send through the account of this mailbox.")
@click.option("--not-before", type=_time, metavar="TIME", help="Do not send earlier.")
@click.option("--undo", type=float, metavar="SECONDS", help="Hold back so long; see cancel.")
@click.option("--priority", metavar="WORD|0-9", help="low, normal, high, or 0 to 9.")
@click.option("-N", "--notify", metavar="EVENTS", help="never, or of success,failure,delay.")
@click.option("-R", "--ret", metavar="WHAT", help="Of a mail that failed: full or headers.")
@click.option("-v", "--verbose", is_flag=True, help="Print the Message-Id.")
@click.option("-o", "settings", multiple=True, metavar="X", help="sendmail's; -oi is -i.")
@click.option("-b", "modes", multiple=True, metavar="m", help="sendmail's mode; -bm only.")
@_ignored
@json_option
@pass_app
def send(
    app: App,
    /,
    recipients: tuple[str, ...],
    from_header: bool,
    sender: str | None,
    ignore_dots: bool,
    name: str,
    mailbox: str | None,
    not_before: float | None,
    undo: float | None,
    priority: str | None,
    notify: str | None,
    ret: str | None,
    verbose: bool,
    settings: tuple[str, ...],
    modes: tuple[str, ...],
    as_json: bool,
    **ignored: Any,
) -> None:
    """Queue the mail that comes on standard input.

    Without -i, a line with a single dot ends it.  What is queued is durable; `cpsmail run`
    delivers it.  Other options of sendmail that do no harm are taken and ignored.
    """
    if any(mode != "m" for mode in modes):
        raise click.UsageError("-b: of sendmail's modes there is -bm only, to send a mail")
    if not recipients and not from_header:
        raise click.UsageError("name a recipient, or say -t to take them from To, Cc and Bcc")
    if re.search(r"[\x00-\x1f\x7f]", name):
        raise click.UsageError("-F: a name has no control characters")
    plain_dots = ignore_dots or any(setting in ("i", "i=true") for setting in settings)
    with app.outbox() as outbox:
        size_limit = outbox.delivery.size_limit
        data = read_mail(sys.stdin.buffer, dot_ends=not plain_dots, size_limit=size_limit)
        mail = Mail.parse(data)
        host = _host_name(app.settings().helo_name)
        user = f"{_user()}@{host}"
        if sender is None:
            sender = mail.author(host) or user
        elif sender in _NULL:
            sender = ""
        else:
            sender = qualified(sender, host)
        addresses = [address for text in recipients for address in split_addresses(text, host)]
        if from_header:
            addresses += mail.recipients(host)
        mail.add_author(sender or user, name)
        if not sender and mailbox is None:
            mailbox = user  # RFC 5321 section 4.5.5: nobody to route by
        with transaction.manager:
            message_id = outbox.delivery.send(
                sender,
                addresses,
                mail.data,
                mailbox=mailbox,
                not_before=not_before,
                undo=undo,
                priority=int(priority) if priority in _DIGITS else priority,
                notify=notify,
                ret="headers" if ret and ret.lower() == "hdrs" else ret,  # sendmail's word
            )
    if as_json:
        emit({"message_id": message_id, "sender": sender, "recipients": addresses})
    elif verbose or app.verbose:
        say(message_id)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no entry in the password file
        return "nobody"


def _host_name(helo_name: str | None) -> str:
    for name in (helo_name, socket.getfqdn(), socket.gethostname()):
        try:
            if name and not name.startswith("[") and not name.startswith("localhost"):
                return ascii_host(name)
        except InvalidAddress:
            continue
    return "localhost"
