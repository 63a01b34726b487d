"""The way of the mails: sent in transactions, delivered by the thread, looked at."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transaction
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from zope.component import getUtility

from cpsmailaccess_delivery import Outbox
from cpsmailaccess_delivery.errors import NoSuchEntry, OutboxError
from cpsmailaccess_delivery.interfaces import IMailDelivery, IOutbox, IQueueProcessor, State
from cpsmailaccess_delivery.testing import ReceivedMail

from .compare import difference
from .mails import Mail, make_mail
from .relays import Relay, relay_of

_PATIENCE = 60.0  # seconds without a mail arriving
_SETTLED = 10.0  # seconds until what has arrived is written down

_ABORTED = "Aborted with its transaction"
_ROLLED_BACK = "Rolled back to its savepoint"


@dataclass
class Sent:
    """A mail that was committed, and what became of it."""

    mail: Mail
    relay: Relay
    message_id: str
    committed: float  # when commit was called, seconds since the epoch
    received: ReceivedMail | None = None
    outcome: str = ""
    troubles: list[str] = field(default_factory=list)


class Journey:
    """One run through a site: `run` returns what went wrong."""

    def __init__(self, console: Console, spool: Path, relays: list[Relay]) -> None:
        self.console, self.spool, self.relays = console, spool, relays
        self.troubles: list[str] = []

    def run(self, mails: list[Mail]) -> list[str]:
        """Do it all, in a site that is configured; its processor may run already."""
        delivery = getUtility(IMailDelivery, "Mail")
        outbox: Outbox = getUtility(IOutbox, os.path.realpath(self.spool))
        processor = getUtility(IQueueProcessor, "Mail")
        before = {record.envelope.message_id for record in outbox.queue.records()}
        runs = processor.is_alive()
        try:
            with transaction.manager:
                for relay in self.relays:
                    outbox.accounts.put(relay.account)
            for relay in self.relays:
                mailbox = escape(relay.account.mailbox)
                self.console.print(f"Mailbox [bold]{mailbox}[/] leaves through {relay}")
            if not runs:
                processor.start()
            sent = self._send(delivery, mails)
            self._await(outbox, sent)
            if runs:
                _await_settled(outbox, sent)
            elif not processor.stop(timeout=10):
                self.troubles.append("the processor has not stopped within 10 seconds")
            self._look(outbox, sent, before)
            ours = {one.message_id for one in sent}
            left = [r for r in outbox.queue.records() if r.envelope.message_id in ours]
        finally:
            transaction.abort()
        self.console.print(_table(sent))
        self._conclude(sent, len(left))
        return self.troubles

    def _send(self, delivery: Any, mails: list[Mail]) -> list[Sent]:
        """Send every mail in a transaction of its own, and two that must not leave."""
        sent = []
        for number, mail in enumerate(mails):
            transaction.begin()
            try:
                message_id = delivery.send(mail.sender, mail.recipients, mail.data)
                if not number:
                    savepoint = transaction.savepoint()
                    _send_made(delivery, mail.sender, _ROLLED_BACK)
                    savepoint.rollback()
                committed = time.time()
                transaction.commit()
            except OutboxError as error:
                transaction.abort()
                self.troubles.append(f"{mail.name}: could not be sent: {error}")
            else:
                relay = relay_of(self.relays, mail.sender)
                sent.append(Sent(mail, relay, message_id, committed))
        transaction.begin()
        _send_made(delivery, mails[0].sender, _ABORTED)
        transaction.abort()
        return sent

    def _await(self, outbox: Outbox, sent: list[Sent]) -> None:
        """Return when the relays have all mails, or no more are on their way."""
        with Progress(
            *(TextColumn("Delivering"), BarColumn(), MofNCompleteColumn()),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as progress:
            task = progress.add_task("", total=len(sent))
            deadline = time.monotonic() + _PATIENCE
            while True:
                counts = {relay.server: len(relay.server.mails) for relay in self.relays}
                got = {mail.message_id for server in counts for mail in server.mails}
                waiting = [one for one in sent if one.message_id not in got]
                progress.update(task, completed=len(sent) - len(waiting))
                if not waiting:
                    return
                server = waiting[0].relay.server
                try:
                    server.wait_for(counts[server] + 1, timeout=1.0)
                    deadline = time.monotonic() + _PATIENCE
                except TimeoutError:
                    moving = any(_state(outbox, one) == State.QUEUED for one in waiting)
                    if not moving or time.monotonic() > deadline:
                        return

    def _look(self, outbox: Outbox, sent: list[Sent], before: set[str]) -> None:
        """Find each mail where it arrived, and what the outbox says of it."""
        arrived = [(relay, mail) for relay in self.relays for mail in relay.server.mails]
        known = Counter(one.message_id for one in sent)
        for one in sent:
            one.outcome = _state(outbox, one)
            if one.outcome != State.ACCEPTED:
                one.troubles.append(str(_status(outbox, one)))
            mine = [pair for pair in arrived if pair[1].message_id == one.message_id]
            if len(mine) != known[one.message_id]:
                one.troubles.append(f"arrived {len(mine)} times")
            if not mine:
                continue
            relay, one.received = min(
                mine, key=lambda pair: bool(difference(one.mail.data, pair[1].data))
            )
            if relay is not one.relay:
                one.troubles.append(f"arrived at {relay}, not at {one.relay}")
            one.troubles += relay.troubles(one.received)
            envelope = one.received.sender, set(one.received.recipients)
            if envelope != (one.mail.sender, set(one.mail.recipients)):
                one.troubles.append(f"arrived with another envelope: {envelope}")
            if wrong := difference(one.mail.data, one.received.data):
                one.troubles.append(wrong)
        if strange := {mail.message_id for _, mail in arrived} - set(known) - before:
            self.troubles.append(f"arrived without being sent: {', '.join(sorted(strange))}")

    def _conclude(self, sent: list[Sent], left: int) -> None:
        """Say what holds, and collect what does not."""
        self.troubles += [f"{one.mail.name}: {why}" for one in sent for why in one.troubles]
        fine = sum(not one.troubles for one in sent)
        self.console.print(f"{fine} of {len(sent)} arrived once, at the relay of their mailbox,")
        self.console.print("  byte for byte (line ends aside; less Bcc, plus a missing id or date)")
        bodies = [mail.data for relay in self.relays for mail in relay.server.mails]
        for text in (_ABORTED, _ROLLED_BACK):
            needle = text.encode()
            if any(needle in body for body in bodies) or self._files_with(needle):
                self.troubles.append(f"{text!r} was kept or sent")
            else:
                self.console.print(f"{text}: nowhere, as it must be")
        passwords = [secret.reveal() for r in self.relays if (secret := r.account.secret)]
        shown = {path for word in passwords for path in self._files_with(word.encode())}
        if shown:
            self.troubles.append(f"a password can be read in {', '.join(sorted(shown))}")
        else:
            self.console.print("Passwords: in no file of the outbox")
        if left and fine == len(sent):
            self.troubles.append(f"{left} mails are left in the outbox")

    def _files_with(self, needle: bytes) -> list[str]:
        files = [path for path in self.spool.parent.rglob("*") if path.is_file()]
        return [path.name for path in files if needle in path.read_bytes()]


def _await_settled(outbox: Outbox, sent: list[Sent]) -> None:
    """A relay has a mail before the processor has written down that it has."""
    deadline = time.monotonic() + _SETTLED
    while time.monotonic() < deadline:
        if all(_state(outbox, one) != State.QUEUED for one in sent):
            return
        time.sleep(0.05)


def _send_made(delivery: Any, sender: str, subject: str) -> None:
    mail = make_mail(sender, subject)
    delivery.send(mail.sender, mail.recipients, mail.data)


def _status(outbox: Outbox, one: Sent) -> object:
    try:
        return outbox.status(one.message_id)
    except NoSuchEntry:
        return "lost: neither in the spool nor in the journal"


def _state(outbox: Outbox, one: Sent) -> str:
    return str(getattr(_status(outbox, one), "state", "lost"))


def _table(sent: list[Sent]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("mail", overflow="fold")
    table.add_column("mailbox", overflow="fold")
    table.add_column("relay", overflow="fold")
    table.add_column("outcome", no_wrap=True, min_width=8)
    table.add_column("ms", justify="right")
    for one in sent:
        taken = one.received
        table.add_row(
            escape(one.mail.name),
            escape(one.relay.account.mailbox),
            str(one.relay) if taken else "none",
            f"[{'red' if one.troubles else 'green'}]{one.outcome}[/]",
            f"{(taken.at - one.committed) * 1000:.1f}" if taken else "",
        )
    return table
