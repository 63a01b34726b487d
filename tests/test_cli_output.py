"""Errors, exit codes, harmless text, and what is imported when."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from cli_helpers import DEADLINE, Site
from cpsmailaccess_delivery import errors, wording
from cpsmailaccess_delivery.cli import app, cli, output
from cpsmailaccess_delivery.cli.queue import queue


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain äöü 日本", "plain äöü 日本"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\r\nb\tc", "a\\x0d\\x0ab\\x09c"),
        ("\x9b31m \x7f\x00", "\\x9b31m \\x7f\\x00"),
        (
            "\u202egpj.exe \u2066x\u2069 \u200b\ufeff",
            "\\u202egpj.exe \\u2066x\\u2069 \\u200b\\ufeff",
        ),
        ("\udcff\u2028", "\\udcff\\u2028"),
        ("[bold]x[/bold] :smile:", "[bold]x[/bold] :smile:"),
    ],
)
def test_clean(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert wording.clean(text) == shown
    output.say(text)
    output.table(("COLUMN",), [(text,)])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        shown,
        "COLUMN",
        shown,
    ]


def test_clean_lines() -> None:
    assert wording.clean_lines("a\r\n\tb\x1b\rc\u202e") == "a\n\tb\\x1b\\x0dc\\u202e"


def test_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    output.log_to_stderr(logging.INFO, with_time=False)
    try:
        raise ValueError("bad \x1b[2J")
    except ValueError:
        logging.getLogger("x").exception("relay said %s", "\x1b[31m\nforged line")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "cpsmail: relay said \\x1b[31m\\x0aforged line"
    assert lines[-1] == "ValueError: bad \\x1b[2J"


def test_ages() -> None:
    assert [wording.age(s) for s in (-1, 0, 59, 60, 3600, 86400 * 5)] == [
        *("0s", "0s", "59s", "1m", "1h", "5d"),
    ]


@pytest.mark.parametrize(
    "kind",
    [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.OutboxError)
    ],
)
def test_every_error_has_a_code(kind: type[Exception]) -> None:
    assert app.exit_code(kind("x")) in range(65, 79)


def test_unexpected_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise ZeroDivisionError("of \x1b[31m")

    site.account()
    monkeypatch.setattr(queue, "callback", broken)
    result = site.run("queue", code=70)
    assert result.stderr == (
        "cpsmail: a fault in cpsmail: ZeroDivisionError: of \\x1b[31m;"
        " `cpsmail -v ...` shows the traceback\n"
    )
    from click.testing import CliRunner

    verbose = CliRunner().invoke(cli, ["-v", "queue"], env=site.environ)
    assert verbose.exit_code == 70
    assert "Traceback" in verbose.stderr
    assert "\x1b" not in verbose.stderr


def test_system_errors(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, code in ((PermissionError(13, "denied"), 77), (OSError(5, "input/output"), 74)):

        def broken(*args: object, error: OSError = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(queue, "callback", broken)
        assert site.run("queue", code=code).stderr.startswith("cpsmail: ")


def test_usage(site: Site) -> None:
    assert "deliver" in site.run(code=64).output.lower()  # the help
    for args in (("nonsense",), ("queue", "extra"), ("--set", "x", "queue"), ("show",)):
        assert "cpsmail: " in site.run(*args, code=64).stderr
    assert "no such setting" in site.run("--set", "color=red", "queue", code=78).stderr
    assert "cannot be read" in site.run("--config", "/nonexistent", "queue", code=78).stderr
    assert "\x1b" not in site.run("\x1b[31m", code=64).output


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("queue", "--outbox", "x"), "`cpsmail --outbox ... queue`"),
        (("accounts", "list", "--set=a=b"), "`cpsmail --set ... accounts list`"),
        (("queue", "-v"), "`cpsmail -v queue`"),
        (("queue", "--outbax", "x"), "No such option"),
        (("show",), "Missing argument"),
        (("queue", "--state", "x"), "`cpsmail queue --help`"),
    ],
)
def test_usage_is_one_line(site: Site, args: tuple[str, ...], hint: str) -> None:
    stderr = site.run(*args, code=64).stderr
    assert stderr.startswith("cpsmail: ")
    assert stderr.count("\n") == 1
    assert hint in stderr


def test_outbox_option(site: Site, tmp_path: Path) -> None:
    site.account()
    elsewhere = Site(tmp_path / "elsewhere")
    assert elsewhere.json("--outbox", str(site.path), "queue")["outbox"] == str(site.path)


def test_reader_that_has_seen_enough(site: Site) -> None:
    site.account()
    for _ in range(3):
        site.send()
    process = site.process("queue", "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(DEADLINE) == 1
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.stdin is not None
    process.stdin.close()


def test_ascii_terminal(site: Site) -> None:
    site.account()
    site.send("müller@bücher.example")
    site.environ |= {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    out, err = site.process("queue").communicate(timeout=DEADLINE)
    assert b"m\\xfcller@b\\xfccher.example" in out
    assert err == b""


def test_the_package_does_not_import_the_cli() -> None:
    code = "import sys, cpsmailaccess_delivery; print({'click', 'rich'} & set(sys.modules))"
    assert python(code) == "set()\n"


def test_help_does_not_import_rich() -> None:
    code = (
        "import sys\n"
        "from cpsmailaccess_delivery.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: print(e.code, 'rich' in sys.modules)\n"
    )
    assert python(code).splitlines()[-1] == "0 False"


def test_version(site: Site) -> None:
    assert site.run("--version").output.startswith("cpsmail, version ")
