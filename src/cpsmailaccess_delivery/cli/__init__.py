"""``cpsmail``: the console script.  See docs/cli.rst.

Never a bare traceback: what we refuse is one line and an exit code, what we did not
expect is one line that says how to see more.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from ..errors import OutboxError
from ..wording import clean_lines
from .accounts import accounts
from .app import EX_INTERRUPTED, EX_NO, EX_SOFTWARE, EX_USAGE, App, exit_code
from .doctor import doctor
from .drain import drain
from .output import complain
from .queue import queue, show
from .run import run
from .schema import schema
from .send import send
from .stats import stats
from .steer import cancel, hold, release, retry, settle
from .trace import trace

# Of click 8.2; before, no arguments are simply a request for help.
_NO_ARGUMENTS = getattr(click.exceptions, "NoArgsIsHelpError", ())

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Root(click.Group):
    """Turns exceptions into messages and exit codes."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        app = extra.setdefault("obj", App())
        run_command: Any = super().main
        if not standalone_mode:
            return run_command(*args, standalone_mode=False, **extra)
        try:
            result = run_command(*args, standalone_mode=False, **extra)
            sys.stdout.flush()
            code = result if isinstance(result, int) else 0
        except click.UsageError as error:
            _show_usage(error)
            code = EX_USAGE
        except (click.Abort, KeyboardInterrupt):
            complain("interrupted")
            code = EX_INTERRUPTED
        except BrokenPipeError:  # the reader has seen enough: `cpsmail queue | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = EX_NO
        except (OutboxError, OSError) as error:
            _report(error, app.verbose)
            complain(error)
            code = exit_code(error)
        except Exception as error:
            _report(error, app.verbose)
            more = "" if app.verbose else "; `cpsmail -v ...` shows the traceback"
            complain(f"a fault in cpsmail: {type(error).__name__}: {error}{more}")
            code = EX_SOFTWARE
        sys.exit(code)


def _show_usage(error: click.UsageError) -> None:
    if isinstance(error, _NO_ARGUMENTS):
        error.show()  # is the help
        return
    message = error.format_message().rstrip(".")
    context = error.ctx
    if context is None:
        complain(message)
        return
    command = context.command_path.partition(" ")[2]
    if isinstance(error, click.NoSuchOption) and context.parent is not None:
        option = next((o for o in cli.params if error.option_name in o.opts), None)
        if isinstance(option, click.Option):
            before = error.option_name + ("" if option.is_flag else " ...")
            usage = f"cpsmail {before} {command}"
            message = f"{error.option_name} stands before the command: `{usage}`"
    complain(f"{message}; see `{f'cpsmail {command}'.strip()} --help`")


def _report(error: BaseException, verbose: bool) -> None:
    if verbose:
        click.echo(clean_lines("".join(traceback.format_exception(error))), err=True, nl=False)


@click.group(cls=_Root, context_settings=_CONTEXT)
@click.option("--config", metavar="FILE", help="Settings file (TOML).")
@click.option("--outbox", metavar="DIR|URL", help="The outbox: a directory, or postgresql://...")
@click.option(
    "--set",
    "assignments",
    metavar="KEY=VALUE",
    multiple=True,
    help="A setting, as in the file: --set retry.first=30.  Repeatable.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log more; show tracebacks.")
@click.version_option(package_name="cpsmailaccess_delivery", prog_name="cpsmail")
@click.pass_obj
def cli(
    app: App,
    config: str | None,
    outbox: str | None,
    assignments: Sequence[str],
    verbose: bool,
) -> None:
    """An outbox for mail that leaves through many SMTP accounts.

    Settings come from a TOML file (--config, $CPSMAIL_CONFIG, ./cpsmail.toml or
    /etc/cpsmail/cpsmail.toml), then from the environment (CPSMAIL_OUTBOX, ...), then
    from options.
    """
    app.config = config
    app.verbose = verbose
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise click.UsageError(f"--set {assignment!r}: is KEY=VALUE")
        app.options[key.strip()] = value.strip()
    if outbox is not None:
        app.options["outbox"] = outbox
    app.log()


for _command in (
    run, drain, queue, show, trace, stats, retry, hold, release, cancel, settle, send, accounts,
    doctor, schema,
):  # fmt: skip
    cli.add_command(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    cli.main(args, prog_name="cpsmail")
