"""Processes that die at a bad moment, for `test_postgres_crashes`: started as scripts.

``commit URL MOMENT``: sends one mail and dies at that moment of its commit.
``cancel URL MESSAGE-ID MOMENT``: the same of a transaction that cancels one.
``commits URL``: commits for ever, and prints the Message-Id of each mail once it is committed.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import transaction

from conftest import KEY
from cpsmailaccess_delivery import Outbox
from cpsmailaccess_delivery.pg import functions, staging
from cpsmailaccess_delivery.pg.lease import Lease

ALICE, BOB = "alice@example.org", "bob@example.net"
MESSAGE = b"From: alice@example.org\r\nSubject: hello\r\n\r\nhello\r\n"


def die(*arguments: Any, **more: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def publish_and_die(connection, *values):
    connection.execute("BEGIN")
    assert functions.publish(connection, *values)
    die()


def commit(url: str, moment: str) -> None:
    outbox = Outbox(url, key=KEY)
    print(outbox.delivery.send(ALICE, [BOB], MESSAGE), flush=True)
    spool = outbox.spool.staging
    if moment == "before the vote":
        spool.prepare = die
    elif moment == "inside the vote":
        staging._insert = die  # its transaction with the database is open
    elif moment == "after the vote":
        spool.publish = die
    elif moment == "inside the finish":
        staging.publish = publish_and_die
    elif moment == "after the finish":
        transaction.get().addAfterCommitHook(die)
    transaction.commit()


def cancel(url: str, message_id: str, moment: str) -> None:
    outbox = Outbox(url, key=KEY)
    settle = Lease.settle
    outbox.delivery.cancel(message_id)
    if moment == "before it is set aside":
        Lease.set_aside = die
    elif moment == "after the vote":
        Lease.settle = die
    elif moment == "after the finish":
        Lease.settle = lambda lease, settlement: (settle(lease, settlement), die())
    print(message_id, flush=True)
    transaction.commit()


def commits(url: str) -> None:
    outbox = Outbox(url, key=KEY)
    while True:
        try:
            with transaction.manager:
                message_id = outbox.delivery.send(ALICE, [BOB], MESSAGE)
            print(message_id, flush=True)
        except Exception as error:
            print(f"refused: {type(error).__name__}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    {"cancel": cancel, "commit": commit, "commits": commits}[sys.argv[1]](*sys.argv[2:])
