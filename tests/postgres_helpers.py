"""A real PostgreSQL server for tests: one for each test process, a database for each test.

And what tests do with an outbox on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transaction

from conftest import KEY
from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.testing import SMTPServer
from postgres_server import DEADLINE, Server, why_none

ALICE, BOB, CAROL = "alice@example.org", "bob@example.net", "carol@example.org"
MESSAGE = b"From: alice@example.org\r\nSubject: hello\r\n\r\nhello\r\n"


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


def open_outbox(database: str, **settings: Any) -> Outbox:
    """Open an outbox that tries again soon."""
    schedule = Schedule(first=0.2, jitter=0.0)
    return Outbox(
        database, key=KEY, helo_name="client.example.org", **({"schedule": schedule} | settings)
    )


def put(outbox: Outbox, relay: SMTPServer, *mailboxes: str, **settings: Any) -> None:
    """Put accounts at a test server, in a transaction."""
    with transaction.manager:
        for mailbox in mailboxes:
            outbox.accounts.put(
                Account(
                    mailbox=mailbox,
                    host=relay.host,
                    port=relay.port,
                    security="plain",
                    **settings,
                )
            )


def send(outbox: Outbox, number: int = 1, sender: str = ALICE) -> list[str]:
    """Send mails to bob in one transaction; return their Message-Ids."""
    with transaction.manager:
        return [outbox.delivery.send(sender, [BOB], MESSAGE) for _ in range(number)]
