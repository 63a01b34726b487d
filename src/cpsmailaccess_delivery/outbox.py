"""`Outbox`: plain settings in, working parts out."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import transaction
from zope.interface import implementer

from .accounts import Accounts
from .announcer import Announcer
from .delivery import MailboxDelivery
from .errors import InvalidSettings, NoSuchEntry, OutboxClosed
from .interfaces import IOutbox, Record
from .journal import MAX_LAG
from .message import DEFAULT_SIZE_LIMIT, LARGEST
from .notice_queue import NoticeWriter
from .notices import Notices
from .parts import open_parts
from .processor import MAX_SESSIONS, QueueProcessorThread, own_host_name
from .queue import Queue
from .relays import CONNECTIONS_PER_RELAY
from .retry import Schedule
from .share import ALONE, Share
from .status import Status, status_of


@implementer(IOutbox)
class Outbox:
    """An outbox: its spool, its accounts, the utility that sends, and the processor.

    `path`: directory of the spool, made when it is missing; or ``postgresql://...``, a database
    that `cpsmail schema upgrade` has made ready, and that several hosts may share.
    `transaction_manager`: whose transactions changes follow; the thread's by default.
    `size_limit`: bytes of the largest message that `send` takes.
    `key`: 32 bytes that seal the secrets; by default from ``CPSMAIL_KEY``, the systemd
    credential ``cpsmail.key``, or, of a directory, the file ``PATH.key`` (made on first use).
    `schedule`, `helo_name`, `max_sessions`, `connections_per_relay`: see `processor`.
    `unclear`: ``retry`` or ``hold``, see `retry.Schedule`; None: what the schedule says.
    `witness`: an `ITransactionWitness`, of `witness.zodb` or `witness.sql`; without one, mails
    that a crash leaves in doubt are held.

    Raises `InvalidSettings`, `SpoolError`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        transaction_manager: Any = None,
        size_limit: int = DEFAULT_SIZE_LIMIT,
        key: bytes | None = None,
        schedule: Schedule | None = None,
        helo_name: str | None = None,
        max_sessions: int = MAX_SESSIONS,
        connections_per_relay: int = CONNECTIONS_PER_RELAY,
        unclear: str | None = None,
        witness: Any = None,
    ) -> None:
        if not 0 < size_limit <= LARGEST:
            raise InvalidSettings(f"size_limit={size_limit!r}: is from 1 to {LARGEST} bytes")
        self._schedule = _with_policy(schedule or Schedule(), unclear)
        self._helo_name = helo_name
        self._max_sessions = max_sessions
        self._connections_per_relay = connections_per_relay
        self._processors: list[QueueProcessorThread] = []
        self._closed = False
        parts = open_parts(path, key)
        self.presence = parts.presence
        self.spool = parts.spool
        self.keys = parts.keys
        self.vault = parts.vault
        self.journal = parts.journal
        self.clock = parts.clock
        self._feed = parts.feed
        self._announcer = Announcer()
        manager = transaction.manager if transaction_manager is None else transaction_manager
        self.witness = witness
        self.accounts = Accounts(self.vault, manager, witness)
        self.delivery = MailboxDelivery(
            self.spool,
            self.accounts,
            manager,
            journal=self.journal,
            announcer=self._announcer,
            size_limit=size_limit,
            witness=witness,
            clock=self.clock,
        )
        self.queue = Queue(
            self.spool,
            self.journal,
            self.clock,
            notices=self._notices,
            announcer=self._announcer,
        )

    def __repr__(self) -> str:
        return f"<Outbox {self.location}{' closed' if self._closed else ''}>"

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def location(self) -> str:
        """Where the spool is."""
        return str(self.spool.location)

    @property
    def processors(self) -> tuple[QueueProcessorThread, ...]:
        """Those that were made here, the oldest first; some may not run yet, or any more."""
        return tuple(self._processors)

    def processor(
        self, share: Share = ALONE, *, unclear: str | None = None
    ) -> QueueProcessorThread:
        """Return a processor of this outbox, not started yet.

        `share`: see there.  `unclear`: as for the outbox, for this processor.
        """
        if self._closed:
            raise OutboxClosed(f"outbox {self.location}: was closed; make a new Outbox")
        processor = QueueProcessorThread(
            self.spool,
            self.vault,
            self.journal,
            schedule=_with_policy(self._schedule, unclear),
            helo_name=self._helo_name,
            max_sessions=self._max_sessions,
            connections_per_relay=self._connections_per_relay,
            share=share,
            clock=self.clock,
            announcer=self._announcer,
            witness=self.witness,
            feed=self._feed,
            presence=self.presence,
        )
        self._processors.append(processor)
        return processor

    def within(self, connection: Any) -> MailboxDelivery:
        """Return a delivery whose mails are part of a transaction of the application's database.

        For an outbox in that database: the mail is inserted on `connection`, of psycopg 3 or a
        session of SQLAlchemy, and commits with it or not at all; nothing can be in doubt.
        Savepoints are the database's.  Raises `InvalidSettings`.
        """
        return self.delivery.within(connection)

    def status(self, message_id: str) -> Status:
        """Return what became of the mail with this Message-Id.

        Raises `NoSuchEntry` when neither spool nor journal knows it: never committed, or
        delivered longer ago than the journal goes back.
        """
        message_id = message_id.strip().removeprefix("<").removesuffix(">")
        records = self.spool.find(message_id)
        status = self._status(message_id, records)
        if status is None:
            # Another process has settled it, and its journal is a moment behind its spool;
            # what the spool has lost by then, it does not get back.
            time.sleep(MAX_LAG)
            status = self._status(message_id, records)
        if status is None:
            raise NoSuchEntry(
                f"Message-Id {message_id!r}: not in the spool {self.location} nor in its journal:"
                " the transaction has not committed, or it was delivered too long ago"
            )
        return status

    @property
    def helo_name(self) -> str:
        """How we introduce ourselves to relays (RFC 5321 section 4.1.1.1)."""
        return self._helo_name or own_host_name()

    def resume(self, lane: str) -> None:
        """Let a lane that waits (see `ISpool.lane_notes`) be tried now.

        Raises `SpoolError`.  A processor of another process notices within half a minute.
        """
        self.spool.note_lane(lane, None)
        self.look()

    def look(self) -> None:
        """Let the processors of this process look now at what a person has decided on lanes."""
        for processor in self.processors:
            processor.look()

    def close(self) -> None:
        """Stop the processors of this outbox and give back what it holds.  Twice is fine."""
        self._closed = True
        for processor in self._processors:
            processor.stop()
        self._processors.clear()
        self._announcer.close()
        self.journal.close()
        self.spool.close()
        self.presence.close()

    def _notices(self) -> Notices:
        return Notices(
            NoticeWriter(self.spool, self.vault, self.journal),
            schedule=self._schedule,
            reporting_mta=self.helo_name,
            clock=self.clock,
        )

    def _status(self, message_id: str, records: list[Record]) -> Status | None:
        outcomes = self.journal.last_outcomes(message_id)
        notes = {
            record.entry.lane: note
            for record in records
            if (note := self.spool.lane_note(record.entry.lane)) is not None
        }
        tried = max((e.attempt for e in self.journal.events(message_id=message_id)), default=0)
        return status_of(message_id, records, notes, outcomes, tried)


def _with_policy(schedule: Schedule, unclear: str | None) -> Schedule:
    return schedule if unclear is None else replace(schedule, unclear=unclear)
