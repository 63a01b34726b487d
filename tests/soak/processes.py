"""The processes that are killed.  Each is forked from a clean server that has imported all."""

from __future__ import annotations

import logging
import random
import threading
import time
from pathlib import Path
from typing import Any

import transaction

from cpsmailaccess_delivery import Outbox, Schedule
from cpsmailaccess_delivery.errors import EntryBusy, KeyTaken, NoSuchEntry

from .truth import Appender, Participant, TruthWitness

KEY = bytes(range(32))
MAILBOXES = [f"m{n}@soak.test" for n in range(8)]
#: Tried again soon, and for ever: nothing is given up while we look.
SCHEDULE = Schedule(first=0.2, factor=1.5, longest=1.0, give_up=86_400.0, delay_notice=0.0)

_UNDO = 0.4  # seconds in which a mail may be taken back


def outbox_of(root: Path, name: str = "", *, witness: bool = True) -> Outbox:
    return Outbox(
        root / "outbox",
        key=KEY,
        schedule=SCHEDULE,
        helo_name=f"{name}.soak.test" if name else None,
        witness=TruthWitness(root / "truth") if witness else None,
    )


def process(root: Path, name: str) -> None:
    """Deliver until killed."""
    logging.disable(logging.CRITICAL)
    outbox_of(root, name).processor().start()
    threading.Event().wait()


def commit(root: Path, name: str, seed: int, witness: bool) -> None:
    """Begin and end transactions of every kind until killed."""
    logging.disable(logging.CRITICAL)
    Committer(root, name, random.Random(seed), witness).run()


class Committer:
    """`witness`: whether its transactions can be asked about after its death."""

    def __init__(self, root: Path, name: str, chance: random.Random, witness: bool) -> None:
        self.outbox = outbox_of(root, witness=witness)
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
            except (KeyTaken, EntryBusy, NoSuchEntry):
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
