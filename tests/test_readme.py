"""README.rst and the pages in docs/ say what is true: snippets run, nothing is left out."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transaction
from zope.component import getUtilitiesFor, getUtility
from zope.configuration.config import ConfigurationConflictError
from zope.configuration.xmlconfig import XMLConfig
from zope.event import notify
from zope.schema import getFieldNamesInOrder, getFields
from zope.sendmail.interfaces import ISMTPMailer
from zope.sendmail.zcml import IQueuedDeliveryDirective, ISMTPMailerDirective

import cpsmailaccess_delivery
from conftest import clean_components
from cpsmailaccess_delivery import Account, Outbox, Schedule, SendError, State, errors, zcml
from cpsmailaccess_delivery.interfaces import IOutbox, IQueueProcessor
from cpsmailaccess_delivery.testing import Authority, SMTPServer

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "cpsmailaccess_delivery"
README = (ROOT / "README.rst").read_text(encoding="utf-8")
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.rst")}
DIRECTIVES = {
    "mailboxDelivery": zcml.IMailboxDeliveryDirective,
    "smtpAccount": zcml.ISMTPAccountDirective,
    "queueProcessor": zcml.IQueueProcessorDirective,
}


def snippets(text: str, language: str) -> list[str]:
    found = re.findall(rf"(?m)^\.\. code-block:: {language}\n\n((?:(?: +.*)?\n)+)", text)
    return [textwrap.dedent(each).strip() + "\n" for each in found]


def section(text: str, title: str) -> str:
    """Return what stands below a title, up to the next one of any level."""
    parts = re.split(r"(?m)^(.+)\n(?:={3,}|-{3,})\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def replaced(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


def default_in(table: str, name: str) -> str:
    """Return the second column of the row of a name."""
    return re.search(rf"(?m)^``{name}`` +(\S+)", table)[1]


@pytest.fixture
def relay(tmp_path, monkeypatch) -> Iterator[SMTPServer]:
    """What the snippets call smtp.example.org:587."""
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca_file))
    monkeypatch.setattr("cpsmailaccess_delivery.smtp.tls._contexts", {})
    with SMTPServer(
        security="starttls",
        context=authority.server_context(),
        users={"alice": "s3cret", "site": "s3cret of the site"},
    ) as server:
        yield server


# The snippets


def test_the_first_one_delivers_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(snippets(README, "python")[0], {})
    said = capsys.readouterr().out
    assert re.search(r"^\S+@\S+: accepted\n  bob@example.net: accepted: 250", said)
    assert "Subject: Hello" in said
    assert "Hello Bob." in said


def test_the_long_running_one(tmp_path, monkeypatch, relay, capsys):
    monkeypatch.chdir(tmp_path)
    _, running, ending, _ = snippets(README, "python")
    names: dict[str, Any] = {}
    running = replaced(running, ("smtp.example.org", "localhost"), ("587", str(relay.port)))
    exec(running, names)
    (mail,) = relay.wait_for(1)
    assert (mail.message_id, mail.username, mail.tls) == (names["message_id"], "alice", True)
    exec(ending, names)
    assert capsys.readouterr().out.startswith(names["message_id"])
    assert not names["processor"].is_alive()
    with Outbox("var/outbox") as outbox:
        assert outbox.status(names["message_id"]).state is State.ACCEPTED


@pytest.fixture
def load(tmp_path, monkeypatch) -> Iterator[Callable[[str, str], None]]:
    """Load a file at a path below a new directory."""
    monkeypatch.setenv("SITE_SMTP_PASSWORD", "s3cret of the site")
    (tmp_path / "password").write_text("s3cret of the site\n")
    (tmp_path / "password").chmod(0o640)
    clean_components()

    def load(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        XMLConfig(str(file))()

    yield load
    for _, outbox in list(getUtilitiesFor(IOutbox)):
        outbox.close()
    clean_components()


def send_by_look_up(relay: SMTPServer) -> None:
    lifetime = pytest.importorskip("zope.processlifetime")
    notify(lifetime.ProcessStarting())
    names = {
        "fromaddr": "alice@example.org",
        "toaddrs": ["bob@example.net"],
        "message": b"Subject: x\n\nHello\n",
    }
    with transaction.manager:
        exec(snippets(README, "python")[3], names)
    (mail,) = relay.wait_for(1)
    assert (mail.sender, mail.username, mail.tls) == ("alice@example.org", "site", True)
    assert getUtility(IQueueProcessor, "Mail").stop()


def test_zcml(tmp_path, load, relay):
    """Its path is relative to the file."""
    text = replaced(
        snippets(README, "xml")[0], ("smtp.example.org", "localhost"), ("587", str(relay.port))
    )
    load("site/etc/site.zcml", text)
    assert (tmp_path / "site" / "etc" / "var" / "outbox" / "new").is_dir()
    send_by_look_up(relay)


def test_the_file_for_zope(tmp_path, load, relay):
    text = replaced(
        snippets(README, "xml")[1],
        ("smtp.example.org", "localhost"),
        ("587", str(relay.port)),
        ("/srv/zope/etc/smtp-password", str(tmp_path / "password")),
        ("/srv/zope/var", str(tmp_path / "var")),
    )
    load("etc/package-includes/cpsmailaccess_delivery-configure.zcml", text)
    assert (tmp_path / "var" / "outbox" / "new").is_dir()
    send_by_look_up(relay)


def test_the_snippets_of_docs_zcml(tmp_path, load, monkeypatch, relay):
    monkeypatch.setenv("ALICE_PASSWORD", "s3cret")
    text = replaced(
        snippets(DOCS["zcml"], "xml")[0],
        ("smtp.example.org", "localhost"),
        ("/srv/app/var", str(tmp_path / "var")),
    )
    load("site.zcml", text)
    names: dict[str, Any] = {}
    exec(snippets(DOCS["zcml"], "python")[0], names)
    assert not names["processor"].is_alive()


def test_a_conflict_with_zope_sendmail_is_found(tmp_path, load):
    """As docs/zcml.rst says."""
    head = snippets(DOCS["zcml"], "xml")[0].partition("<mail:")[0]
    ours = '<mail:mailboxDelivery queuePath="a" />'
    theirs = '<mail:queuedDelivery queuePath="b" mailer="smtp" processorThread="no" />'
    (tmp_path / "ours.zcml").write_text(head + ours + "</configure>")
    (tmp_path / "theirs.zcml").write_text(head + theirs + "</configure>")
    both = '<include file="ours.zcml" /><include file="theirs.zcml" />'
    with pytest.raises(ConfigurationConflictError, match=r"ours\.zcml(.|\n)*theirs\.zcml"):
        load("site.zcml", head + both + "</configure>")


def test_the_view_that_is_explained_line_by_line():
    """Every line that is quoted is there, in this order."""
    source = (SOURCE / "zope" / "compose.py").read_text(encoding="utf-8")
    quoted = re.findall(
        r"(?m)^\.\. code:: python\n\n((?:(?: +.*)?\n)+)", section(README, "A view that sends")
    )
    assert len(quoted) > 6
    position = 0
    for part in quoted:
        for line in filter(None, textwrap.dedent(part).splitlines()):
            found = source.find(line.strip(), position)
            assert found >= 0, line
            position = found


# What is named


@pytest.mark.parametrize("name", DIRECTIVES)
def test_every_attribute_of_a_directive(name):
    text = section(DOCS["zcml"], f"mail:{name}")
    documented = re.findall(r"(?m)^``(\w+)``  ", text)
    assert sorted(documented) == sorted(getFieldNamesInOrder(DIRECTIVES[name]))
    for attribute, field in getFields(DIRECTIVES[name]).items():
        row = re.search(rf"(?m)^``{attribute}``  .*", text)[0]
        assert ("(needed)" in row) is field.required, attribute
        if isinstance(field.default, str):
            assert f'"{field.default}"' in row


def test_every_field_of_an_account():
    text = section(DOCS["api"], "Account")
    assert re.findall(r"(?m)^``(\w+)``  ", text) == [field.name for field in fields(Account)]
    example = Account(mailbox="*", host="x.org")
    for name in ("connect_timeout", "command_timeout", "data_timeout", "connections", "security"):
        assert default_in(text, name) == repr(getattr(example, name)).replace("'", '"')
    for name in ("mails_per_session", "mails_per_minute", "verify", "username", "password"):
        assert default_in(text, name) == repr(getattr(example, name))


def test_every_argument_of_an_outbox():
    text = section(DOCS["api"], "Outbox")
    arguments = inspect.signature(Outbox).parameters
    assert re.findall(r"(?m)^``(\w+)``  ", text) == list(arguments)
    for name in ("size_limit", "max_sessions", "connections_per_relay"):
        assert default_in(text, name) == repr(arguments[name].default)


def test_every_value_of_a_schedule():
    text = section(DOCS["api"], "Schedule")
    for field in fields(Schedule):
        assert default_in(text, field.name) == repr(field.default)


def test_every_state():
    text = section(DOCS["api"], "status")
    assert re.findall(r"(?m)^``(\w+)``  ", text) == [*map(str, State)]


def test_every_exception():
    text = DOCS["api"]
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.OutboxError):
            if name != "InvalidEnvelope":  # of a spool file: for those who write a spool
                assert f"``{name}``" in text
            if issubclass(value, SendError):
                assert getattr(cpsmailaccess_delivery, name) is value


def test_what_is_exported_is_there():
    for name in cpsmailaccess_delivery.__all__:
        assert hasattr(cpsmailaccess_delivery, name)
        assert f"``{name}" in DOCS["api"], name


@pytest.mark.parametrize("page", ["README", *DOCS])
def test_files_that_are_named_exist(page):
    text = README if page == "README" else DOCS[page]
    for name in re.findall(r"``((?:docs|tests|examples|benchmarks)/[\w./]+)``", text):
        assert (ROOT / name).exists(), name
    if page == "architecture":
        files = re.findall(r"``([\w/]+\.py)``", text)
        named = {name for name in files if not name.startswith("tests/")}
        assert len(named) > 30
        assert [name for name in sorted(named) if not (SOURCE / name).exists()] == []


def test_the_pages_are_linked():
    for page in ("api", "zcml", "zope", "cli", "architecture"):
        assert f"``docs/{page}.rst``" in section(README, "More")


def test_the_table_for_zope_sendmail_is_complete():
    text = section(README, "Coming from zope.sendmail")
    old = {*getFields(IQueuedDeliveryDirective), *getFields(ISMTPMailerDirective)}
    old |= set(getFields(ISMTPMailer))
    assert {name for name in old if f"``{name}" not in text} == set()
    new = set(re.findall(r"``(\w+(?:Timeout|From|File))", text))
    assert new <= {name for schema in DIRECTIVES.values() for name in getFields(schema)}


# make test

SKIPS = {
    "run": ("no database here", "import pytest\ndef test(): pytest.skip('no database here')\n"),
    "mark": (
        "no browser here",
        "import pytest\n@pytest.mark.skipif(True, reason='no browser here')\ndef test(): pass\n",
    ),
    "collection": ("nowhere", "import pytest\npytest.importorskip('nowhere')\n"),
}
FINE = """\
import pytest

def test(): pass
@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""


def make_test(directory: Path, *, ci: str, workers: str) -> tuple[int, str]:
    """Run tests there as `make test` does; return the exit code and what was said."""
    (directory / "test_fine.py").write_text(FINE)
    (directory / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "-n", workers, "."],
        cwd=directory,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("when", SKIPS)
def test_what_is_skipped_fails_in_ci(tmp_path, when, workers):
    why, source = SKIPS[when]
    (tmp_path / "test_skipped.py").write_text(source)
    code, said = make_test(tmp_path, ci="true", workers=workers)
    assert code
    assert re.search(rf"CI=true: nothing may be skipped: .*{why}", said)
    assert not re.search(r"\d skipped", said)


def test_what_is_skipped_elsewhere_is_said(tmp_path):
    for when, (_, source) in SKIPS.items():
        (tmp_path / f"test_{when}.py").write_text(source)
    code, said = make_test(tmp_path, ci="", workers="0")
    assert not code, said
    for why, _ in SKIPS.values():
        assert re.search(rf"(?m)^SKIPPED .*{why}", said)
    assert "1 passed, 3 skipped, 1 xfailed" in said


def test_ci_with_nothing_skipped(tmp_path):
    code, said = make_test(tmp_path, ci="true", workers="0")
    assert not code, said
    assert "1 passed, 1 xfailed" in said
