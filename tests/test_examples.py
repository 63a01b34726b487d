"""The units and the composition in examples/ start what there is."""

from __future__ import annotations

import base64
import configparser
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
import transaction
import yaml

from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.cli import cli
from cpsmailaccess_delivery.cli.app import EX_CONFIG, EX_NOPERM, EX_USAGE, App
from cpsmailaccess_delivery.key import CREDENTIAL
from cpsmailaccess_delivery.settings import load_settings
from cpsmailaccess_delivery.supervisor import _GRACE
from cpsmailaccess_delivery.testing import SMTPServer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
ETC = EXAMPLES / "compose" / "etc"
DOCS = (ROOT / "docs" / "running.rst").read_text(encoding="utf-8")
DOCKERFILE = (EXAMPLES / "compose" / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}


def parsed(command: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options before the subcommand of `cpsmail`, and those of the last one.

    As click reads them, which refuses what there is not.
    """
    program, *rest = command
    assert Path(program).name == "cpsmail"
    current: click.Command = cli
    context: click.Context | None = None
    options = {}
    while isinstance(current, click.Group):
        context = click.Context(current, parent=context, obj=App())
        rest = click.Command.parse_args(current, context, rest)  # of the group itself
        options |= context.params
        name, found, rest = current.resolve_command(context, rest)
        assert name is not None
        assert found is not None
        current = found
    return options, current.make_context(name, rest, parent=context).params


class _Twice(dict):  # type: ignore[type-arg]
    """systemd adds up what is named twice."""

    def __setitem__(self, key, value):  # type: ignore[no-untyped-def]
        if isinstance(value, list) and isinstance(self.get(key), list):
            value = self[key] + value
        super().__setitem__(key, value)


def unit(name: str) -> dict[str, list[str]]:
    """Return [Service] of a unit."""
    parser = configparser.RawConfigParser(dict_type=_Twice, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((EXAMPLES / "systemd" / name).read_text(encoding="utf-8"))
    return {name: value.split("\n") for name, value in parser["Service"].items()}


@pytest.mark.parametrize("name", ["cpsmail.service", "cpsmail-postgres.service"])
def test_a_unit_starts_what_there_is(name: str) -> None:
    service = unit(name)
    options, run = parsed(shlex.split(service["ExecStart"][0]))
    assert options["config"] == "/etc/cpsmail/cpsmail.toml"
    assert (run["workers"], run["metrics_port"]) == (2, 9125)
    assert float(service["TimeoutStopSec"][0]) > run["stop_timeout"] + _GRACE
    assert service["RestartPreventExitStatus"] == [f"{EX_USAGE} {EX_NOPERM} {EX_CONFIG}"]
    assert CREDENTIAL in [line.partition(":")[0] for line in service["LoadCredential"]]
    assert name in DOCS


def test_the_units_differ_where_the_outbox_does_only() -> None:
    """What protects one protects the other."""
    one, other = unit("cpsmail.service"), unit("cpsmail-postgres.service")
    differ = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert differ == {"User", "ExecStart", "LoadCredential", "Environment", "ReadWritePaths"}
    assert ("ReadWritePaths" in one, "ReadWritePaths" in other) == (True, False)
    credentials = [line.partition(":")[0] for line in one["LoadCredential"]]
    text = (EXAMPLES / "systemd" / "cpsmail.service").read_text(encoding="utf-8")
    assert f"file:/run/credentials/cpsmail.service/{credentials[1]}" in text


def test_the_composition_has_what_it_needs() -> None:
    assert SERVICES["zope"]["deploy"]["replicas"] == 2
    assert SERVICES["worker"]["deploy"]["replicas"] == 3
    for service in SERVICES.values():
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        named = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert named <= set(COMPOSE["volumes"])
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
    assert set(OURS["worker"]["secrets"]) == {CREDENTIAL}
    assert OURS["worker"]["environment"]["CREDENTIALS_DIRECTORY"] == "/run/secrets"


def test_the_commands_of_the_composition_are_commands() -> None:
    _, run = parsed(SERVICES["worker"]["command"])
    patience = float(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    assert patience > run["stop_timeout"] + _GRACE
    assert run["metrics_address"] == "0.0.0.0"
    parsed(SERVICES["schema"]["command"])
    for name in ("zeo", "zope"):
        assert (Path(sys.executable).parent / SERVICES[name]["command"][0]).exists(), name


def test_the_settings_of_the_composition_are_settings() -> None:
    for service in OURS.values():
        settings = load_settings(
            None, environ={k: v for k, v in service["environment"].items() if "CPSMAIL" in k}
        )
        user, _, host = settings.outbox.removeprefix("postgresql://").partition("@")
        assert user == SERVICES["database"]["environment"]["POSTGRES_USER"]
        server, _, database = host.partition("/")
        assert SERVICES[server]["environment"]["POSTGRES_DB"] == database


def test_the_image_is_made_of_what_is_there() -> None:
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY"):
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name
    for service in OURS.values():
        assert (ROOT / service["build"]["dockerfile"]).is_file()


#: What a request does, in a Zope that is set up as those of the composition are.
ZOPE = """\
import sys, transaction, Zope2
from paste.deploy import loadapp
from zope.component import getUtility
from zope.sendmail.interfaces import IMailDelivery

loadapp("config:" + sys.argv[1])
getUtility(IMailDelivery, "Mail").send("a@example.org", ["b@example.net"], "Subject: hello\\n\\n")
transaction.commit()
Zope2.DB.close()
"""


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / command[0]), *command[1:]], **options
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def test_zope_sends_and_a_worker_delivers(tmp_path: Path, database: str) -> None:
    """The files and commands of the composition, on other ports and in another directory."""
    pytest.importorskip("ZEO", reason="ZEO is in the extra [test]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        zeo = f"127.0.0.1:{probe.getsockname()[1]}"
    site = tmp_path / "site"
    shutil.copytree(ETC, site / "etc")
    (site / "var").mkdir()
    conf = site / "etc" / "zope.conf"
    conf.write_text(conf.read_text().replace("/site", str(site)).replace("zeo:8100", zeo))
    key = os.urandom(32)
    (tmp_path / CREDENTIAL).write_bytes(base64.b64encode(key))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CPSMAIL")},
        "CPSMAIL_OUTBOX": database,
        "CREDENTIALS_DIRECTORY": str(tmp_path),
    }
    with SMTPServer() as relay:
        with Outbox(database, key=key) as outbox, transaction.manager:
            outbox.accounts.put(
                Account(mailbox="*", host="127.0.0.1", port=relay.port, security="plain")
            )
        command = [
            part.replace("0.0.0.0:8100", zeo).replace("/site", str(site))
            for part in SERVICES["zeo"]["command"]
        ]
        with started(command, cwd=site):
            subprocess.run(
                [sys.executable, "-c", ZOPE, site / SERVICES["zope"]["command"][1]],
                env=environment,
                cwd=site,
                check=True,
                timeout=120,
            )
        command = [part for part in SERVICES["worker"]["command"] if "metrics" not in part]
        with started(command, env=environment, cwd=tmp_path):
            (mail,) = relay.wait_for(1, timeout=60)
        assert mail.recipients == ("b@example.net",)
