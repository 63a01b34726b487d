"""What this package is made with: pinned, and without vulnerabilities that are known."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Of the virtual environment itself.
TOOLS = {"pip", "setuptools", "wheel", "cpsmailaccess-delivery"}


def normal(name: str) -> str:
    """See the packaging user guide, "Name normalization"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in pairs}


def needed(names: set[str]) -> set[str]:
    """Return what some distributions need that is installed, and what that needs."""
    found, todo = set(), set(names)
    while todo:
        name = todo.pop()
        for text in distribution(name).requires or []:
            other = normal(re.match(r"[A-Za-z0-9._-]+", text)[0])
            if other in INSTALLED and other not in found:
                found.add(other)
                todo.add(other)
    return found


INSTALLED = {normal(each.metadata["Name"]): each.version for each in distributions()}


def test_everything_that_is_installed_is_pinned() -> None:
    """A pin that nobody asked for is found by whoever freezes the next environment."""
    ours = needed({"cpsmailaccess-delivery"}) - TOOLS
    assert len(ours) > 20
    assert {name: pins().get(name) for name in ours} == {name: INSTALLED[name] for name in ours}


def test_no_rule_of_bandit_is_switched_off() -> None:
    """Ruff's S rules hold in src/, but where one line says why not."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in settings["select"]
    assert not [rule for rule in settings["ignore"] if rule.startswith("S1")]
    for pattern, rules in settings["per-file-ignores"].items():
        if pattern.startswith("src"):
            assert "/testing/" in pattern, pattern
            assert set(rules) <= {"S101", "S104"}
    for path in (ROOT / "src").rglob("*.py"):
        assert not re.search(r"#\s*(?:ruff|flake8): noqa", path.read_text()), path
        for line in path.read_text().splitlines():
            assert not re.search(r"# noqa(?!: )", line), (path, line)


def test_no_known_vulnerability() -> None:
    """With pip-audit, where it and its index are there: no test may hang on a network.

    Elsewhere an expected failure, not a skip: a skip is an error in CI, and this is none.
    """
    try:
        distribution("pip-audit")
    except PackageNotFoundError:
        pytest.xfail("pip-audit is not installed: pip install pip-audit, and run this again")
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format=json"]
    command += ["-r", str(ROOT / "constraints.txt"), "--timeout", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "ConnectionError" in done.stderr or "Max retries" in done.stderr:
        pytest.xfail("the vulnerability database cannot be reached")
    found = json.loads(done.stdout)["dependencies"]
    vulnerable = {each["name"]: each["vulns"] for each in found if each.get("vulns")}
    assert vulnerable == {}
    unknown = [each["name"] for each in found if "skip_reason" in each]
    if len(unknown) == len(found):  # a mirror: it has the packages, and no word about them
        pytest.xfail("the index knows nothing of vulnerabilities")
    assert unknown == []
