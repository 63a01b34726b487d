"""What every command needs: the settings, the outbox, and what exit codes mean."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from .. import errors
from ..outbox import Outbox
from ..settings import Settings, load_settings
from .output import log_to_stderr

#: The answer is no: mails are left, a check failed, nothing was changed.
EX_NO: Final = 1
# As in sysexits.h.
EX_USAGE: Final = 64
EX_DATAERR: Final = 65
EX_NOINPUT: Final = 66
EX_NOUSER: Final = 67
EX_SOFTWARE: Final = 70
EX_IOERR: Final = 74
EX_TEMPFAIL: Final = 75
EX_NOPERM: Final = 77
EX_CONFIG: Final = 78
#: As shells say it.
EX_INTERRUPTED: Final = 130

_Function = TypeVar("_Function", bound=Callable[..., Any])

# The first that fits.
_CODES: Final[tuple[tuple[type[BaseException], int], ...]] = (
    (errors.UnknownMailbox, EX_NOUSER),
    (errors.NotQueued, EX_TEMPFAIL),  # the mail is right: whoever pipes it here keeps it
    (errors.SendError, EX_DATAERR),
    (errors.InvalidAccount, EX_DATAERR),
    (errors.InvalidEnvelope, EX_DATAERR),
    (errors.NoSuchEntry, EX_NOINPUT),
    (errors.NotUnclear, EX_DATAERR),
    (errors.NotHeld, EX_DATAERR),
    (errors.NoSuchAccount, EX_NOINPUT),
    (errors.InvalidSettings, EX_CONFIG),
    (errors.WrongKey, EX_CONFIG),
    (errors.BrokenSeal, EX_CONFIG),
    (errors.SecretUnavailable, EX_CONFIG),
    (errors.OutboxError, EX_TEMPFAIL),
    (PermissionError, EX_NOPERM),
    (OSError, EX_IOERR),
)


def exit_code(error: BaseException) -> int:
    """Return the exit code that stands for an exception."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), EX_SOFTWARE)


@dataclass
class App:
    """The options in front of the command, and what follows from them."""

    config: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    verbose: bool = False

    def settings(self) -> Settings:
        """Raises `InvalidSettings`."""
        return load_settings(self.config, options=self.options)

    @contextmanager
    def outbox(self, *, make: bool = False) -> Iterator[Outbox]:
        """Open the outbox.  Unless `make`, one that is not there is a mistyped path."""
        settings = self.settings()
        if not make and isinstance(settings.outbox, Path) and not settings.outbox.is_dir():
            raise errors.InvalidSettings(
                f"outbox {settings.location}: there is none; the first `cpsmail accounts set` or"
                " `run` makes it"
            )
        with settings.open() as outbox:
            yield outbox

    def log(self, *, service: bool = False) -> None:
        """Set up the log: of a service with times; of a command, what it does not say itself."""
        level = logging.INFO if service else logging.ERROR
        log_to_stderr(logging.DEBUG if self.verbose else level, with_time=service)


pass_app = click.make_pass_decorator(App, ensure=True)


def json_option(function: _Function) -> _Function:
    """Give a command ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(
        function
    )


def yes_option(function: _Function) -> _Function:
    """Give a command ``--yes``."""
    return click.option("--yes", is_flag=True, help="Do not ask for confirmation.")(function)


def confirmed(question: str) -> bool:
    """Ask a person; where nobody answers, the answer is no."""
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)
        return False
