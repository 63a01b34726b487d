"""docs/cli.rst names every command and option, and no others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cpsmailaccess_delivery.cli import app, cli
from cpsmailaccess_delivery.settings import _RULES

DOCS = (Path(__file__).parent.parent / "docs" / "cli.rst").read_text(encoding="utf-8")
STEERING = ("retry", "hold", "release", "cancel")


def sections() -> dict[str, str]:
    """Return the text below each title, whatever underlines it."""
    parts = re.split(r"(?m)^(.+)\n(?:={3,}|-{3,})\n", DOCS)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def options(command: click.Command) -> set[str]:
    return {
        option
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for option in parameter.opts + parameter.secondary_opts
    }


COMMANDS = dict(commands(cli))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    title = ", ".join(STEERING) if name in STEERING else name
    text = sections()[title]
    documented = set(re.findall(r"(?<![\w-])--?[A-Za-z][a-z-]*", text))
    assert options(COMMANDS[name]) <= documented


def test_global_options_are_documented() -> None:
    text = sections()["``cpsmail``"]
    assert not [option for option in options(cli) if f"``{option}" not in text]


def test_nothing_else_is_documented() -> None:
    known = {"--help", "--version"}.union(options(cli), *map(options, COMMANDS.values()))
    assert set(re.findall(r"(?<![\w=-])--[a-z][a-z-]+", DOCS)) <= known


def test_every_setting_is_documented() -> None:
    for key in _RULES:
        assert f"``{key}``" in DOCS
        assert f"``CPSMAIL_{key.replace('.', '_').upper()}``" in DOCS


def test_every_exit_code_is_documented() -> None:
    codes = {value for name, value in vars(app).items() if name.startswith("EX_")}
    table = sections()["Exit codes"]
    documented = {int(code) for code in re.findall(r"(?m)^(\d+)  ", table)}
    assert documented - {0, 137} == codes


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert command.get_short_help_str(limit=200)
