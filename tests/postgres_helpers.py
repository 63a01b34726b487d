"""A real PostgreSQL server for tests: one for each test process, a database for each test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from postgres_server import DEADLINE, Server, why_none


def start_server() -> Server:
    """Start one, or skip: in CI that is a failure."""
    if reason := why_none():
        pytest.skip(reason)
    return Server()


def wait_for(condition: Callable[[], object], seconds: float = DEADLINE) -> object:
    """Return what a condition gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)
    return result


def databases(server: Server, *, empty: bool = False) -> Iterator[str]:
    """Give a database for one test."""
    url = server.new_database(empty=empty)
    yield url
    if empty:
        server.drop_database(url)
    else:
        server.clean(url)
