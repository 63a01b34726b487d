"""The unit in docs/running.rst starts what there is, and names the metrics that there are."""

from __future__ import annotations

import configparser
import re
import shlex
import textwrap
from pathlib import Path

from cpsmailaccess_delivery import metrics
from cpsmailaccess_delivery.cli import cli
from cpsmailaccess_delivery.cli.app import EX_CONFIG, EX_NOPERM, EX_USAGE, App
from cpsmailaccess_delivery.key import CREDENTIAL
from cpsmailaccess_delivery.supervisor import _GRACE

DOCS = (Path(__file__).parent.parent / "docs" / "running.rst").read_text(encoding="utf-8")


class _Twice(dict):  # type: ignore[type-arg]
    """systemd adds up what is named twice."""

    def __setitem__(self, key, value):  # type: ignore[no-untyped-def]
        if isinstance(value, list) and isinstance(self.get(key), list):
            value = self[key] + value
        super().__setitem__(key, value)


def unit() -> dict[str, list[str]]:
    """Return [Service] of the unit."""
    text = textwrap.dedent(DOCS[DOCS.index("    [Unit]") : DOCS.index("Make the key")])
    parser = configparser.RawConfigParser(dict_type=_Twice, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return {name: value.split("\n") for name, value in parser["Service"].items()}


def test_the_command_is_one() -> None:
    program, *arguments = shlex.split(unit()["ExecStart"][0])
    assert Path(program).name == "cpsmail"
    context = cli.make_context("cpsmail", arguments.copy(), obj=App())
    assert context.params["config"] == "/etc/cpsmail/cpsmail.toml"
    name, *rest = arguments[2:]
    run = cli.commands[name].make_context(name, rest, parent=context)
    assert run.params["workers"] == 2
    assert run.params["metrics_port"] == 9125
    patience = float(unit()["TimeoutStopSec"][0])
    assert patience > run.params["stop_timeout"] + _GRACE


def test_credentials_and_exit_codes() -> None:
    credentials = [line.partition(":")[0] for line in unit()["LoadCredential"]]
    assert credentials == [CREDENTIAL, "relay-password"]
    assert "file:/run/credentials/cpsmail.service/relay-password" in DOCS
    assert unit()["RestartPreventExitStatus"] == [f"{EX_USAGE} {EX_NOPERM} {EX_CONFIG}"]


def test_metrics_are_those_that_there_are() -> None:
    code = Path(metrics.__file__).read_text(encoding="utf-8")
    made = set(re.findall(r'"(cpsmail_[a-z_]+)"', code))
    documented = set(re.findall(r"cpsmail_[a-z_]+", DOCS))
    assert {name.removesuffix("_total") for name in documented} == made
