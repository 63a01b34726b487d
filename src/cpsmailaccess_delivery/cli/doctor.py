"""``cpsmail doctor``: what is wrong with an outbox, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..errors import OutboxError
from ..wording import clean
from .app import EX_NO, App, json_option, pass_app
from .checks import examine
from .findings import Finding, Level
from .output import emit

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@json_option
@pass_app
def doctor(app: App, as_json: bool) -> int:
    """Examine the outbox: access, key, disk, clock, queue, lanes, processors.

    Run it as the user who delivers.  Exit code 0: nothing fails; 1: something does.
    """
    settings = app.settings()
    source = f"settings from {settings.source}" if settings.source else "no settings file"
    findings = [Finding("settings", Level.OK, f"{source}; outbox {settings.location}")]
    if not as_json:
        _print(findings[0])
    try:
        with app.outbox() as outbox:
            for finding in examine(outbox):
                findings.append(finding)
                if not as_json:
                    _print(finding)
    except (OutboxError, OSError) as error:
        findings.append(Finding("outbox", Level.FAIL, str(error)))
        if not as_json:
            _print(findings[-1])
    failed = any(finding.level is Level.FAIL for finding in findings)
    if as_json:
        emit({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    return EX_NO if failed else 0


def _print(finding: Finding) -> None:
    level = click.style(f"{finding.level:<5}", fg=_COLOURS[finding.level])
    click.echo(f"{level} {finding.check:<10} {clean(finding.text)}")
    if finding.advice:
        click.echo(f"{'':<16} -> {clean(finding.advice)}")
