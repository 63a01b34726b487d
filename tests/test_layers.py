"""Dependencies point one way: every file belongs to a row, and imports from its row or above."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import cpsmailaccess_delivery

PACKAGE = "cpsmailaccess_delivery"
ROOT = Path(cpsmailaccess_delivery.__file__).parent

#: Row by row, see docs/architecture.rst; the first pattern that fits counts.
ROWS: dict[int, tuple[str, ...]] = {
    0: (
        "interfaces.py",
        "errors.py",
        "address.py",
        "envelope.py",
        "account.py",
        "networks.py",
        "message.py",
        "options.py",
        "dsn.py",
        "events.py",
    ),
    1: (
        "outcome.py",
        "retry.py",
        "limits.py",
        "share.py",
        "bounce.py",
        "report.py",
        "smtp/__init__.py",
        "smtp/auth.py",
        "smtp/events.py",
        "smtp/explain.py",
        "smtp/hello.py",
        "smtp/machine.py",
        "smtp/mails.py",
        "smtp/opening.py",
        "smtp/prepare.py",
        "smtp/reply.py",
        "smtp/sevenbit.py",
        "smtp/wire.py",
    ),
    5: (
        "spool/postgres.py",
        "pg/*",
        "zcml.py",
        "__main__.py",
        "cli.py",
        "cli/*",
        "zope/*",
        "plone/*",
        "witness/*",
    ),
    2: (
        "spool/*",
        "vault.py",
        "vault_files.py",
        "watch.py",
        "files.py",
        "seal.py",
        "sealed.py",
        "register.py",
        "key.py",
        "rekey.py",
        "password.py",
        "journal.py",
        "journal_file.py",
        "journal_tail.py",
        "announcer.py",
        "gatherer.py",
        "smtp/session.py",
        "smtp/tls.py",
        "smtp/check.py",
        "smtp/direct.py",
    ),
    3: (
        "accounts.py",
        "datamanager.py",
        "delivery.py",
        "agenda.py",
        "aging.py",
        "arrivals.py",
        "attempt.py",
        "circuit.py",
        "claims.py",
        "connections.py",
        "lanes.py",
        "moving.py",
        "ready.py",
        "outgoing.py",
        "notices.py",
        "notice_queue.py",
        "recorder.py",
        "relays.py",
        "results.py",
        "room.py",
        "scheduler.py",
        "sessions.py",
        "shared.py",
        "summary.py",
        "terms.py",
        "processor.py",
        "settling.py",
        "telling.py",
        "status.py",
        "upkeep.py",
        "verdicts.py",
        "queue.py",
        "search.py",
        "selection.py",
        "shape.py",
        "steering.py",
        "wording.py",
    ),
    4: ("outbox.py", "parts.py", "settings.py", "supervisor.py", "metrics.py", "__init__.py"),
    6: ("testing/*", "testing.py", "demo.py", "demo/*"),  # aside: nobody imports it
}

#: Rows 0 and 1 decide in plain code: no I/O, no threads, no clock to wait for.
IMPURE = {
    "_socket",
    "asyncio",
    "concurrent",
    "fcntl",
    "inotify_simple",
    "io",
    "multiprocessing",
    "os",
    "pathlib",
    "select",
    "selectors",
    "signal",
    "socket",
    "socketserver",
    "sqlite3",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "time",
}

#: Why a file may: it needs the classes of exceptions, and nothing else.
PARDONED = {
    ("outcome.py", "socket"),
    ("outcome.py", "ssl"),
    ("smtp/explain.py", "socket"),
    ("smtp/explain.py", "ssl"),
}

#: Never in rows 0 to 4: an application server, a framework, a database driver.
FOREIGN = {
    "AccessControl",
    "Acquisition",
    "App",
    "BTrees",
    "OFS",
    "Persistence",
    "Products",
    "ZConfig",
    "ZEO",
    "ZODB",
    "ZPublisher",
    "Zope2",
    "click",
    "persistent",
    "paste",
    "playwright",
    "pgqueuer",
    "plone",
    "psycopg",
    "psycopg2",
    "relstorage",
    "pytest",
    "rich",
    "sqlalchemy",
    "trustme",
    "waitress",
    "zExceptions",
    "zope.processlifetime",
    "zope.sqlalchemy",
}


def row_of(name: str) -> int | None:
    for row, patterns in ROWS.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return row
    return None


def imports(name: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield line and absolute name of everything a file imports, wherever it does so.

    ``from a import b`` counts as ``a.b``, since b may be a module.
    """
    package = [PACKAGE, *Path(name).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.dump(node.func):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                yield node.lineno, argument.value


def file_of(module: str, names: set[str]) -> str | None:
    """Return the file of this package that an imported name stands for."""
    parts = module.split(".")[1:]
    for end in (len(parts), len(parts) - 1):
        path = "/".join(parts[: max(end, 0)])
        for candidate in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if candidate in names:
                return candidate
    return None


def is_in(module: str, family: set[str]) -> str | None:
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        if (start := ".".join(parts[:end])) in family:
            return start
    return None


def problems(sources: dict[str, str]) -> list[str]:
    found = []
    for name, source in sources.items():
        row = row_of(name)
        if row is None:
            found.append(f"{name}: belongs to no row: see docs/architecture.rst")
            continue
        for line, module in imports(name, source):
            where = f"{name}:{line}: imports {module}"
            if module.split(".")[0] == PACKAGE:
                target = file_of(module, set(sources))
                target_row = row_of(target) if target else None
                if target_row is None:
                    found.append(f"{where}: which is no file of a row")
                elif target_row > row:
                    found.append(f"{where}: row {row} from row {target_row}")
                continue
            if row <= 1 and (impure := is_in(module, IMPURE)) and (name, impure) not in PARDONED:
                found.append(f"{where}: row {row} does no I/O")
            if row <= 4 and is_in(module, FOREIGN):
                found.append(f"{where}: row {row} knows no framework")
    return found


def sources() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in ROOT.rglob("*.py")
    }


def test_layers():
    assert problems(sources()) == []


@pytest.mark.parametrize("name", ["account_form", "chart", "header", "paging", "policy"])
def test_the_plain_parts_of_the_rim(name):
    """They decide without Zope, and without I/O."""
    source = sources()[f"zope/{name}.py"]
    modules = [module for _, module in imports(f"zope/{name}.py", source)]
    assert [module for module in modules if is_in(module, FOREIGN | IMPURE)] == []


def test_every_part_is_seen():
    """The test looks at the files that there are."""
    assert {"interfaces.py", "outbox.py", "smtp/machine.py", "spool/maildir.py"} <= set(sources())


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("envelope.py", "from .outbox import Outbox", "row 0 from row 4"),
        ("envelope.py", "from . import outbox", "row 0 from row 4"),
        ("envelope.py", "from . import Outbox", "row 0 from row 4"),
        ("envelope.py", f"import {PACKAGE}.vault", "row 0 from row 2"),
        ("envelope.py", f"from {PACKAGE} import vault", "row 0 from row 2"),
        ("envelope.py", "if TYPE_CHECKING:\n    from .vault import Vault", "row 0 from row 2"),
        ("envelope.py", "def f():\n    from .vault import Vault", "row 0 from row 2"),
        ("smtp/machine.py", "from .session import Session", "row 1 from row 2"),
        ("smtp/machine.py", "from ..vault import Vault", "row 1 from row 2"),
        ("smtp/machine.py", "from .. import vault", "row 1 from row 2"),
        ("spool/maildir.py", "from ..delivery import x", "row 2 from row 3"),
        ("vault.py", "from .testing import x", "row 2 from row 6"),
        ("cli/run.py", "from ..testing import x", "row 5 from row 6"),
        ("envelope.py", "import asyncio", "does no I/O"),
        ("retry.py", "from time import time", "does no I/O"),
        ("smtp/machine.py", "import os.path", "does no I/O"),
        ("smtp/machine.py", "import socket", "does no I/O"),
        ("outcome.py", "import threading", "does no I/O"),
        ("delivery.py", "import Zope2", "no framework"),
        ("delivery.py", "from Products.MailHost import x", "no framework"),
        ("delivery.py", "from zope import processlifetime", "no framework"),
        ("spool/maildir.py", "import psycopg.rows", "no framework"),
        ("outbox.py", "import click", "no framework"),
        ("outbox.py", "importlib.import_module('plone.api')", "no framework"),
        ("envelope.py", "from .nowhere import x", "no file of a row"),
    ],
)
def test_a_wrong_import_is_found(name, line, words):
    wrong = sources()
    wrong[name] += f"\n{line}\n"
    (problem,) = set(problems(wrong)) - set(problems(sources()))
    assert problem.startswith(f"{name}:")
    assert words in problem


@pytest.mark.parametrize("name", ["helpers.py", "smtp/new.py", "extras/x.py"])
def test_a_file_without_row_is_found(name):
    assert any("belongs to no row" in problem for problem in problems({name: ""}))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("zcml.py", "importlib.import_module('zope.processlifetime')"),
        ("vault.py", "import sqlite3, os, threading"),
        ("outcome.py", "import socket"),
        ("zope/mailhost.py", "from Products.MailHost import MailHost"),
        ("testing/server.py", "import trustme"),
    ],
)
def test_what_is_allowed(name, line):
    assert problems({name: line}) == []


ALONE = f"""
import sys, time

class Absent:
    names = {{"trustme", "Zope2", "OFS", "App", "AccessControl", "Products", "plone", "psycopg",
             "pgqueuer", "sqlalchemy", "click", "rich", "hypothesis", "pytest", "ZODB",
             "prometheus_client"}}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names or name == "zope.processlifetime":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
start = time.perf_counter()
import {PACKAGE}
print(f"import takes {{time.perf_counter() - start:.3f}} s")
import {PACKAGE}.zcml
assert not set(sys.modules) & {{"asyncio.test_utils", *Absent.names}}
assert "{PACKAGE}.zope" not in sys.modules
"""


def test_imports_without_what_is_optional():
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)  # for the reader of -rP


def test_import_starts_no_thread_and_makes_no_file(tmp_path):
    code = f"import threading, {PACKAGE}, {PACKAGE}.zcml; print(threading.active_count())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout == "1\n"
    assert list(tmp_path.iterdir()) == []
