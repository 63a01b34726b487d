"""A process that commits with a database, and dies at a step of its choice.

It is forked, so that hundreds die in a minute.  At its last step it kills itself as kill -9 does:
nothing is flushed, no handler runs.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transaction
import ZEO
import ZODB
from relstorage.adapters.sqlite.adapter import Sqlite3Adapter
from relstorage.options import Options
from relstorage.storage import RelStorage
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker
from ZODB.FileStorage import FileStorage
from zope.sqlalchemy import mark_changed, register
from zope.sqlalchemy.datamanager import SessionDataManager

from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.spool import durable
from cpsmailaccess_delivery.spool.lease import Lease
from cpsmailaccess_delivery.spool.staging import Staging
from cpsmailaccess_delivery.vault import Vault
from cpsmailaccess_delivery.witness.sql import SQLWitness
from cpsmailaccess_delivery.witness.zodb import ZODBWitness

KEY = bytes(range(32))
ALICE = "alice@example.org"
NEW = "new@example.org"
MAILS = 3
EARLIER = "earlier"  # a mail that was committed before, and its key


class Steps:
    """Counts the calls of wrapped functions, and dies before or after one of them."""

    def __init__(self, last: int, told: int) -> None:
        self.last = last
        self.told = told  # file descriptor that hears of each step
        self.count = 0
        self.on = False
        self._lock = threading.Lock()  # databases have threads of their own

    def step(self, name: str) -> None:
        if not self.on:
            return
        with self._lock:
            os.write(self.told, f"{self.count} {name}\n".encode())
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1

    def wrap(self, owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*args: Any, **kw: Any) -> Any:
            self.step(f"before {name}")
            try:
                return function(*args, **kw)
            finally:
                self.step(f"after {name}")

        setattr(owner, name, wrapped)


def watch_the_outbox(steps: Steps) -> None:
    """Die around every call that the transaction makes to spool and vault, and inside of them."""
    for name in ("stage", "prepare", "publish"):
        steps.wrap(Staging, name)
        steps.wrap(Vault, name)
    steps.wrap(Lease, "set_aside")
    steps.wrap(Lease, "settle")
    for name in ("rename", "replace", "fchmod", "fsync", "unlink"):
        steps.wrap(os, name)
    durable._quiet = lambda: False  # the same steps each time, whatever else writes here


def send_all(outbox: Outbox, name: str) -> None:
    for number in range(MAILS):
        outbox.delivery.send(
            ALICE,
            ["bob@example.net"],
            f"Message-Id: <{name}.{number}@x>\nSubject: x\n\nbody\n",
            idempotency_key=f"{name}.{number}",
        )
    account = Account(mailbox=NEW, host="new.example.org", username="n", password="secret-of-new")
    outbox.accounts.put(account)


def send_earlier(outbox: Outbox) -> None:
    with transaction.manager:
        message = f"Message-Id: <{EARLIER}@x>\n\nbody\n"
        outbox.delivery.send(ALICE, ["bob@example.net"], message, idempotency_key=EARLIER)


def open_zodb(where: str) -> Any:
    return ZODB.DB(FileStorage(where + "/Data.fs"))


def open_zeo(where: str) -> Any:
    return ZEO.DB(_address(where), wait_timeout=30)


def open_relstorage(where: str, keep_history: bool = True) -> Any:
    options = Options(keep_history=keep_history, shared_blob_dir=False)
    adapter = Sqlite3Adapter(where + "/rel", pragmas={}, options=options)
    return ZODB.DB(RelStorage(adapter, options=options))


def _address(where: str) -> tuple[str, int]:
    host, port = Path(where, "address").read_text().split()
    return host, int(port)


def commit_with_zodb(
    database: str, place: str, name: str, steps: Steps, opened: Callable[[str], Any]
) -> None:
    db = opened(database)
    outbox = Outbox(place, key=KEY, witness=ZODBWitness(db))
    for step in ("tpc_begin", "store", "tpc_vote", "tpc_finish"):
        if hasattr(type(db.storage), step):
            steps.wrap(type(db.storage), step)
    watch_the_outbox(steps)
    connection = db.open()
    steps.on = True
    with transaction.manager:
        send_all(outbox, name)
        outbox.delivery.cancel(f"{EARLIER}@x")
        connection.root()[name] = True
    steps.step("the end")


def commit_with_sql(database: str, place: str, name: str, steps: Steps) -> None:
    engine = create_engine(f"sqlite:///{database}/app.db")
    witness = SQLWitness(engine.raw_connection)
    outbox = Outbox(place, key=KEY, witness=witness)
    session = sessionmaker(bind=engine)()
    register(session)
    watch_the_outbox(steps)
    steps.wrap(SQLWitness, "_write")
    for step in ("tpc_begin", "commit", "tpc_vote", "tpc_finish"):
        steps.wrap(SessionDataManager, step)
    steps.on = True
    with transaction.manager as txn:
        witness.follow_session(txn, session)
        send_all(outbox, name)
        outbox.delivery.cancel(f"{EARLIER}@x")
        session.execute(text("INSERT INTO things (name) VALUES (:name)"), {"name": name})
        mark_changed(session)
    steps.step("the end")


def in_child(function: Callable[[Steps], object], last: int) -> tuple[int, list[str]]:
    """Call it in a forked child that dies at a step; return how it ended and the steps it made."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reader)
            function(Steps(last, writer))
            status = 0  # what is staged stays as it is, now too
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, encoding="ascii") as stream:
        steps = stream.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), steps
