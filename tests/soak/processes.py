"""The processes that are killed.  Each is forked from a clean server that has imported all."""

from __future__ import annotations

import logging
import random
import threading
import time
from pathlib import Path
from typing import Any

import transaction

from cpsmailaccess_delivery import Outbox, Schedule, scheduler
from cpsmailaccess_delivery.errors import EntryBusy, KeyTaken, NoSuchEntry, OutboxError

from .truth import Appender, Participant, TruthWitness

KEY = bytes(range(32))
MAILBOXES = [f"m{n}@soak.test" for n in range(8)]
#: Tried again soon, and for ever: nothing is given up while we look.
SCHEDULE = Schedule(first=0.2, factor=1.5, longest=1.0, give_up=86_400.0, delay_notice=0.0)

_UNDO = 0.4  # seconds in which a mail may be taken back

#: On PostgreSQL nobody knows who is dead: seconds until what was left behind is in doubt, and
#: between two looks for it.
_DOUBT_AFTER = 3.0
_SWEEP_EVERY = 1.0


def outbox_of(root: Path, location: str, name: str = "", *, witness: bool = True) -> Outbox:
    """`root`: where the soak keeps what it knows itself."""
    return Outbox(
        location,
        key=KEY,
        schedule=SCHEDULE,
        helo_name=f"{name}.soak.test" if name else None,
        witness=TruthWitness(root / "truth") if witness else None,
    )


def is_database(location: str) -> bool:
    return location.startswith("postgresql:")


def process(root: Path, location: str, name: str) -> None:
    """Deliver until killed."""
    logging.disable(logging.CRITICAL)
    if is_database(location):
        from cpsmailaccess_delivery.pg import staging

        staging.DOUBT_AFTER = _DOUBT_AFTER
        scheduler._SWEEP_EVERY = _SWEEP_EVERY
    outbox_of(root, location, name).processor().start()
    threading.Event().wait()


def commit(root: Path, location: str, name: str, seed: int, witness: bool) -> None:
    """Begin and end transactions of every kind until killed."""
    logging.disable(logging.CRITICAL)
    outbox = outbox_of(root, location, witness=witness)
    # A database that is away fails a commit; a directory never does.
    bad = OutboxError if is_database(location) else (KeyTaken, EntryBusy, NoSuchEntry)
    Committer(root, name, random.Random(seed), outbox, bad).run()


class Committer:
    """`bad`: errors that a transaction may end with."""

    def __init__(
        self, root: Path, name: str, chance: random.Random, outbox: Outbox, bad: Any
    ) -> None:
        self.outbox = outbox
        self.bad = bad
        self.witness = self.outbox.witness or TruthWitness(root / "truth")
        self.truth = Appender(root / "truth" / name)
        self.plans = Appender(root / "plans" / name)
        self.name, self.chance = name, chance
        self.count = 0
        self.undoable: list[str] = []

    def run(self) -> None:
        while True:
            txn = transaction.begin()
            line = Participant(txn, self.witness, self.truth)
            self.count += 1
            mails = [f"{self.name}.{self.count}.{n}@soak.test" for n in range(4)]
            self.plans.write({"mails": mails})
            try:
                work = self.chance.choice((self.plain, self.rolled_back, self.keyed, self.cancel))
                work(line, mails)
                if self.chance.random() < 0.2:
                    transaction.abort()
                else:
                    transaction.commit()
            except self.bad:
                transaction.abort()
            time.sleep(self.chance.random() * 0.04)  # so that the queue does not only grow

    def send(self, line: Participant, mail: str, **options: Any) -> str:
        message = f"Message-Id: <{mail}>\nDate: today\nSubject: soak\n\n{'text ' * 50}\n"
        mailbox = self.chance.choice(MAILBOXES)
        sent = self.outbox.delivery.send(mailbox, ["rcpt@example.net"], message, **options)
        if sent == mail:
            line.line["sent"].append(mail)
        return sent

    def plain(self, line: Participant, mails: list[str]) -> None:
        for mail in mails[: self.chance.randint(1, 4)]:
            self.send(line, mail)

    def rolled_back(self, line: Participant, mails: list[str]) -> None:
        self.send(line, mails[0])
        point = transaction.savepoint()
        self.send(line, mails[1])
        point.rollback()
        self.send(line, mails[2])

    def keyed(self, line: Participant, mails: list[str]) -> None:
        """Two processes that do this at the same time want one mail."""
        key = f"key {int(time.time() * 4)}"
        if self.send(line, mails[0], idempotency_key=key) == mails[0]:
            line.line["key"] = key
        self.send(line, mails[1])

    def cancel(self, line: Participant, mails: list[str]) -> None:
        if self.undoable:
            mail = self.undoable.pop()
            self.outbox.delivery.cancel(mail)
            line.line["cancelled"].append(mail)
        self.send(line, mails[0], undo=_UNDO)
        self.undoable = [mails[0]]
