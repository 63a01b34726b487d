"""Settings: from a file, the environment and options; what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpsmailaccess_delivery.errors import InvalidSettings
from cpsmailaccess_delivery.message import DEFAULT_SIZE_LIMIT
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.settings import load_settings

FULL = """
outbox = "var/outbox"
size_limit = 1000
helo_name = "App.Example.org"
max_sessions = 7
connections_per_relay = 5
metrics_port = 9125
metrics_address = "::1"
[retry]
first = 5
factor = 1.5
longest = 60
jitter = 0
give_up = 3600.0
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults(tmp_path: Path) -> None:
    settings = load_settings(environ={}, options={"outbox": "here"})
    assert settings.outbox == Path("here")
    assert settings.size_limit == DEFAULT_SIZE_LIMIT
    assert settings.retry == Schedule()
    assert settings.helo_name is None
    assert settings.source is None


def test_every_setting_of_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "etc" / "site.toml", FULL)
    settings = load_settings(file, environ={})
    assert settings.outbox == tmp_path / "etc" / "var/outbox"  # relative to the file
    assert settings.size_limit == 1000
    assert settings.helo_name == "app.example.org"
    assert settings.max_sessions == 7
    assert settings.connections_per_relay == 5
    assert (settings.metrics_address, settings.metrics_port) == ("::1", 9125)
    assert settings.retry == Schedule(5.0, 1.5, 60.0, 0.0, 3600.0)
    assert settings.source == file


def test_priority(tmp_path: Path) -> None:
    file = write(tmp_path / "a.toml", FULL)
    environ = {"CPSMAIL_SIZE_LIMIT": "2000", "CPSMAIL_RETRY_FIRST": "6.5", "CPSMAIL_OUTBOX": "env"}
    settings = load_settings(file, environ=environ, options={"size_limit": "3000"})
    assert settings.size_limit == 3000
    assert settings.retry.first == 6.5
    assert settings.outbox == Path("env")  # relative to the working directory
    assert settings.max_sessions == 7


def test_which_file(tmp_path: Path) -> None:
    write(tmp_path / "cpsmail.toml", 'outbox = "local"')
    named = write(tmp_path / "named.toml", 'outbox = "named"')
    other = write(tmp_path / "other.toml", 'outbox = "other"')
    environ = {"CPSMAIL_CONFIG": str(named)}
    assert load_settings(environ={}).outbox == Path("local")
    assert load_settings(environ=environ).outbox == tmp_path / "named"
    assert load_settings(other, environ=environ).outbox == tmp_path / "other"


def test_other_variables_are_left_alone() -> None:
    environ = {"CPSMAIL_KEY": "x", "CPSMAIL_PASSWORD_OF_ALICE": "y", "CPSMAIL_OUTBOX": "o"}
    assert load_settings(environ=environ).outbox == Path("o")


@pytest.mark.parametrize(
    ("text", "key", "rule"),
    [
        ("outbox = 1", "outbox", "is the path of a directory"),
        ('outbox = ""', "outbox", "is the path of a directory"),
        ('size_limit = "1"', "size_limit", "is a whole number"),
        ("size_limit = 1.5", "size_limit", "is a whole number"),
        ("size_limit = 0", "size_limit", "at least 1"),
        ("metrics_port = 70000", "metrics_port", "is a port"),
        ("metrics_port = 0", "metrics_port", "is a port"),
        ('metrics_address = "localhost"', "metrics_address", "is an IP address"),
        ("max_sessions = true", "max_sessions", "is a whole number"),
        ('helo_name = "a b"', "helo_name", "is a host name"),
        ('helo_name = "192.0.2.1"', "helo_name", "in brackets"),
        ("[retry]\nfirst = 0", "retry.first", "over 0"),
        ("[retry]\nfirst = inf", "retry.first", "number of seconds"),
        ("[retry]\nlongest = nan", "retry.longest", "number of seconds"),
        ("[retry]\nfactor = 0.5", "retry.factor", "at least 1"),
        ("[retry]\njitter = 2", "retry.jitter", "from 0 to 1"),
        ("[retry]\ngive_up = -1", "retry.give_up", "over 0"),
        ("[retry]\nfrist = 1", "retry.frist", "no such setting"),
        ("sizelimit = 1", "sizelimit", "no such setting"),
        ("[outbox]\npath = 'x'", "outbox.path", "no such setting"),
        ("retry = 5", "retry", "no such setting"),
    ],
)
def test_what_is_wrong_names_file_key_and_rule(
    tmp_path: Path, text: str, key: str, rule: str
) -> None:
    file = write(tmp_path / "bad.toml", text)
    with pytest.raises(InvalidSettings) as caught:
        load_settings(file, environ={})
    assert str(file) in str(caught.value)
    assert f"{key}" in str(caught.value)
    assert rule in str(caught.value)


def test_wrong_variable_and_option_are_named() -> None:
    with pytest.raises(InvalidSettings, match="CPSMAIL_MAX_SESSIONS: max_sessions = 'many'"):
        load_settings(environ={"CPSMAIL_MAX_SESSIONS": "many", "CPSMAIL_OUTBOX": "o"})
    with pytest.raises(InvalidSettings, match=r"option retry\.first: retry\.first = 'x'"):
        load_settings(environ={}, options={"outbox": "o", "retry.first": "x"})
    with pytest.raises(InvalidSettings, match="option color: color: no such setting"):
        load_settings(environ={}, options={"outbox": "o", "color": "x"})


def test_address_literal_is_a_helo_name() -> None:
    options = {"outbox": "o", "helo_name": "[192.0.2.1]"}
    assert load_settings(environ={}, options=options).helo_name == "[192.0.2.1]"


def test_no_outbox() -> None:
    with pytest.raises(InvalidSettings, match="outbox: is not set"):
        load_settings(environ={})


def test_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="cannot be read"):
        load_settings(tmp_path / "missing.toml", environ={})
    (tmp_path / "latin.toml").write_bytes(b"outbox = '\xe4'")
    with pytest.raises(InvalidSettings, match=r"latin\.toml: is no TOML"):
        load_settings(tmp_path / "latin.toml", environ={})
    with pytest.raises(InvalidSettings, match="is no TOML"):
        load_settings(write(tmp_path / "x.toml", "outbox == 1"), environ={})


def test_open(tmp_path: Path) -> None:
    options = {"outbox": str(tmp_path / "spool"), "size_limit": "12", "max_sessions": "3"}
    with load_settings(environ={}, options=options).open() as outbox:
        assert outbox.location == str(tmp_path / "spool")
        assert outbox.delivery.size_limit == 12


def test_a_url_stays_a_url_and_shows_no_password(tmp_path: Path) -> None:
    url = "postgresql://u:geheim@db.example.org/mail?password=geheim&connect_timeout=3"
    settings = load_settings(write(tmp_path / "a.toml", f'outbox = "{url}"'), environ={})
    assert settings.outbox == url
    assert settings.location == "postgresql://u@db.example.org/mail?connect_timeout=3"
    assert load_settings(environ={"CPSMAIL_OUTBOX": url}).outbox == url
    with pytest.raises(InvalidSettings, match="pgpass") as caught:
        load_settings(environ={}, options={"outbox": url})
    assert "geheim" not in str(caught.value) + repr(settings)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:///mail?host=/var/run/postgresql",
        "postgresql://u@a:5432,b:5433/mail?target_session_attrs=read-write&lease=5",
        "postgresql://h/mail",
    ],
)
def test_a_url_without_password_is_taken_as_it_is(url: str) -> None:
    settings = load_settings(environ={}, options={"outbox": url})
    assert settings.outbox == settings.location == url
