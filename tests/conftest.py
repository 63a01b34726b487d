"""What several test modules need."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import transaction
from hypothesis import settings

from cpsmailaccess_delivery import Account, Outbox

# Elsewhere hypothesis looks for new examples in every run; a landing must not hang on luck.
settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
if os.environ.get("CI") == "true":
    settings.load_profile("ci")

KEY = bytes(range(32))

#: In every test: no secret may turn up on disk or in a text.
PASSWORD = "hunter2-is-the-password"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """A module that is skipped: see `_fail_in_ci`."""
    return _fail_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """A test that is skipped: see `_fail_in_ci`."""
    return _fail_in_ci((yield))


def _fail_in_ci(report: Any) -> Any:
    """Make a skip a failure when CI=true: what is missing there would go unnoticed."""
    skipped = report.outcome == "skipped" and not hasattr(report, "wasxfail")
    if skipped and os.environ.get("CI") == "true":
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"CI=true: nothing may be skipped: {why}"
    return report


@pytest.fixture(autouse=True)
def _clean_transaction() -> Iterator[None]:
    """No test sees the transaction of another one."""
    transaction.manager.explicit = False
    transaction.abort()
    yield
    transaction.manager.explicit = False
    transaction.abort()


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """The level that a command sets, in this process, is no other test's."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(autouse=True)
def _no_key_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPSMAIL_KEY", raising=False)
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    """An outbox of the thread's transaction manager, without accounts."""
    with Outbox(tmp_path / "outbox", key=KEY) as made:
        yield made


@pytest.fixture
def account() -> Account:
    return Account(
        mailbox="alice@example.org",
        host="smtp.example.org",
        username="alice",
        password=PASSWORD,
    )


@pytest.fixture
def stocked(outbox: Outbox, account: Account) -> Outbox:
    """An outbox with accounts for alice, for @example.com, and no default."""
    with transaction.manager:
        outbox.accounts.put(account)
        outbox.accounts.put(account.replace(mailbox="@example.com", host="smtp.example.com"))
    return outbox


@pytest.fixture(scope="session")
def zope_in_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Zope that is started once: see `zope_helpers`."""
    pytest.importorskip("Zope2", reason="Zope is in the extra [test]")
    from zope_helpers import ZopeInProcess

    zope = ZopeInProcess(tmp_path_factory.mktemp("zope"))
    yield zope
    zope.stop()


@pytest.fixture
def charsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python has them: Products.MailHost, once imported, makes UTF-8 quoted-printable."""
    from email import charset

    utf8 = (charset.SHORTEST, charset.BASE64, "utf-8")
    monkeypatch.setitem(charset.CHARSETS, "utf-8", utf8)


@pytest.fixture
def outbox_path(tmp_path: Path) -> str:
    """Where the outbox of `zmi` is."""
    return str(tmp_path / "outbox")


@pytest.fixture
def zmi(zope_in_process: Any, outbox_path: str) -> Iterator[Any]:
    """What a test sees of it, with an outbox of its own: see `zope_helpers.Zmi`."""
    from zope_helpers import Zmi

    with zope_in_process.registry():
        made = Zmi(zope_in_process, outbox_path)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def _chromium() -> Iterator[Any]:
    """Debian's Chromium.

    Not for the session: as long as it runs, Playwright's event loop runs in this thread, where
    other tests have theirs.  For the same reason a test with a browser delivers by a processor
    that was started, not by ``run``.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is in [test]")
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def chromium(_chromium: Any) -> Iterator[Callable[..., Any]]:
    """Return a page of a new browser session: ``chromium(origin, user="admin", ...)``.

    `origin`: where the login is sent.  Others are arguments of Playwright's ``new_context``.
    """
    sessions = []

    def page(origin: str, user: str = "admin", **settings: Any) -> Any:
        from zope_helpers import password_of

        login = {"username": user, "password": password_of(user), "origin": origin}
        session = _chromium.new_context(http_credentials=login, **settings)
        session.set_default_timeout(30_000)
        sessions.append(session)
        return session.new_page()

    yield page
    for session in sessions:
        session.close()


def clean_components() -> None:
    """Begin with no components, as `zope.testing.cleanup.cleanUp` does.

    That also takes its products away from a Zope that other tests have started in this process.
    """
    from zope.component.globalregistry import base
    from zope.configuration import xmlconfig
    from zope.security import checker

    base.__init__(base.__name__)
    xmlconfig._clearContext()
    checker._clear()


def open_files() -> set[tuple[str, str]]:
    """Return what this process has open: to be compared as sets.

    Their number tells nothing: what an earlier test left may be closed at any moment.
    """
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
        except FileNotFoundError:
            continue  # that of the listing itself
    return found


def mails_on_disk(outbox: Outbox) -> list[Path]:
    """Return every file of the spool that is, or may become, a mail."""
    root = Path(outbox.location)
    found = []
    for name in ("tmp", "new", "cur"):
        found += [path for path in (root / name).rglob("*") if path.is_file()]
    return found


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL server of this test process."""
    pytest.importorskip("psycopg", reason="needs the extra [postgres]")
    from postgres_helpers import start_server

    server = start_server()
    yield server
    server.remove()


@pytest.fixture
def database(postgres: Any) -> Iterator[str]:
    """The URL of a database of this test, with the schema."""
    from postgres_helpers import databases

    yield from databases(postgres)
