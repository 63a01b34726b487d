"""``cpsmail retry``, ``hold``, ``release``, ``cancel``, ``settle``: decide on mails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from ..interfaces import Entry, Record, State
from ..queue import Queue
from ..steering import release as release_one
from ..steering import steer
from ..wording import counted
from .app import EX_NO, App, confirmed, exit_code, json_option, pass_app, yes_option
from .mails import mail_json
from .output import complain, emit, say
from .queue import select, selection

_Act = Callable[[Queue, str | Entry], list[Record]]


def _steering(function: Any) -> Any:
    """Give a command what all four have: names, or ``--all`` with a selection."""
    function = json_option(yes_option(selection(function)))
    function = click.option("--all", "every", is_flag=True, help="All mails that are selected.")(
        function
    )
    return click.argument("names", metavar="[ID|MESSAGE-ID]...", nargs=-1)(function)


@click.command()
@_steering
@pass_app
def retry(app: App, /, **choice: Any) -> int:
    """Make mails due now, whatever they waited for, a relay in trouble too.

    Of a mail that was refused, the recipients that were refused are tried again.
    --all without --state: those that are deferred.
    """
    return _steer(app, "retried", lambda queue, name: queue.retry(name), ("deferred",), **choice)


@click.command()
@click.option("--reason", default="held by hand", show_default=True, help="Why; for others.")
@_steering
@pass_app
def hold(app: App, /, reason: str, **choice: Any) -> int:
    """Set mails aside until they are released.

    --all without --state: those that are queued or deferred.
    """
    states = ("queued", "deferred")
    return _steer(app, "held", lambda queue, name: queue.hold(name, reason), states, **choice)


@click.command()
@_steering
@pass_app
def release(app: App, /, **choice: Any) -> int:
    """Let mails go that are held, unclear or refused: they are due now.

    Recipients that are unclear are sent the mail again: it may have arrived already, and
    then arrives twice.
    --all without --state: those that are held.
    """
    return _steer(app, "released", release_one, ("held",), **choice)


@click.command()
@_steering
@pass_app
def cancel(app: App, /, **choice: Any) -> int:
    """Remove mails that are not delivered yet, for good.

    --all without --state: whatever their state.
    """
    return _steer(app, "cancelled", lambda queue, name: queue.cancel(name), (), **choice)


@click.command()
@click.option("--accepted", "state", flag_value="accepted", help="The relay took the mail.")
@click.option("--refused", "state", flag_value="refused", help="It did not: tell the sender.")
@json_option
@click.argument("name", metavar="ID|MESSAGE-ID")
@click.argument("recipients", metavar="[RECIPIENT]...", nargs=-1)
@pass_app
def settle(
    app: App, name: str, recipients: tuple[str, ...], state: str | None, as_json: bool
) -> None:
    """Say what became of recipients that are unclear, when you have found out.

    Without RECIPIENT: of all that are.  Nothing is sent to them; see release.
    """
    if state is None:
        raise click.UsageError("say --accepted or --refused")
    with app.outbox() as outbox:
        records = outbox.queue.settle(name, State(state), recipients)
    if as_json:
        mails = [mail_json(record) for record in records]
        emit({"action": "settled", "as": state, "mails": mails, "failures": []})
        return
    for record in records:
        unclear = [r for r, o in record.outcomes.items() if o.state is State.UNCLEAR]
        settled = [r for r in unclear if not recipients or r in recipients]
        say(f"settled {record.entry.id} as {state} for {', '.join(settled)}")


def _steer(
    app: App,
    done: str,
    act: _Act,
    usual: tuple[str, ...],
    *,
    names: tuple[str, ...],
    every: bool,
    states: tuple[str, ...],
    mailbox: str | None,
    yes: bool,
    as_json: bool,
) -> int:
    if every == bool(names):
        raise click.UsageError("name mails by id or Message-Id, or say --all")
    if not every and (states or mailbox is not None):
        raise click.UsageError("--state and --mailbox belong to --all")
    with app.outbox() as outbox:
        wanted: Sequence[str | Entry] = names
        if every:
            wanted = select(outbox, states or usual, mailbox)
            question = f"{counted(len(wanted), 'mail', 'mails')} will be {done}; go on?"
            if wanted and not yes and not confirmed(question):
                complain("nothing was changed")
                return EX_NO
        steered = steer(wanted, lambda mail: act(outbox.queue, mail), gone_is_fine=every)
        records = steered.records
        failures: list[dict[str, Any]] = [
            {"name": name, "error": str(error), "code": exit_code(error)}
            for name, error in steered.failures
        ]
        if as_json:
            mails = [mail_json(record) for record in records]
            emit({"action": done, "mails": mails, "failures": failures})
        else:
            _say_done(records, done, every)
            for failure in failures:
                complain(failure["error"])
    return failures[-1]["code"] if failures else 0


def _say_done(records: list[Record], done: str, every: bool) -> None:
    if every:
        say(f"{counted(len(records), 'mail', 'mails')} {done}")
        return
    for record in records:
        say(f"{done} {record.entry.id} to {', '.join(record.envelope.recipients)}")
