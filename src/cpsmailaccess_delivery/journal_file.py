"""The file of the journal: SQLite, made when it is missing, set aside when it is damaged.

A new file is made under another name and renamed, so that nobody opens half a schema.
To make one and to set one aside takes the lock file; to write and to read does not.
Nothing is synced but what SQLite does itself: a journal may lose its end in a power loss.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import quote

log = logging.getLogger(__name__)

VERSION: Final = 1

_SCHEMA: Final = f"""
PRAGMA journal_mode = WAL;
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    at REAL, kind TEXT, entry TEXT, message_id TEXT, mailbox TEXT,
    sender TEXT COLLATE NOCASE, recipient TEXT COLLATE NOCASE,
    attempt INTEGER, reply TEXT, relay TEXT
);
CREATE INDEX events_at ON events (at);
CREATE INDEX events_message_id ON events (message_id);
CREATE INDEX events_sender ON events (sender, at);
CREATE INDEX events_recipient ON events (recipient, at);
PRAGMA user_version = {VERSION};
"""

_COLUMNS: Final = "at, kind, entry, message_id, mailbox, sender, recipient, attempt, reply, relay"
_ROW: Final = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_ADD: Final = f"""
INSERT INTO events ({_COLUMNS})
SELECT :{_COLUMNS.replace(", ", ", :")} WHERE NOT EXISTS (
    SELECT 1 FROM events
    WHERE at = :at AND kind = :kind AND entry = :entry AND recipient = :recipient
)"""  # noqa: S608
_NEWEST: Final = "ORDER BY at DESC, id DESC LIMIT :limit"
_BY_MESSAGE_ID: Final = f"SELECT {_COLUMNS} FROM events WHERE message_id = :key {_NEWEST}"  # noqa: S608
_BY_ADDRESS: Final = f"""
SELECT {_COLUMNS} FROM (
    SELECT * FROM (SELECT * FROM events WHERE sender = :key {_NEWEST})
    UNION SELECT * FROM (SELECT * FROM events WHERE recipient = :key {_NEWEST})
) {_NEWEST}"""  # noqa: S608
_TOTALS: Final = {
    column: f"SELECT {column}, kind, count(*) FROM events WHERE at >= :since GROUP BY 1, 2"  # noqa: S608
    for column in ("mailbox", "relay")
}
_PRUNE: Final = "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE at < ? LIMIT ?)"

#: Rows in one statement: the interpreter's lock is free while SQLite works on them.
_CHUNK: Final = 50
_BUSY: Final = 2.0  # seconds to wait for another process that writes

# SQLITE_ERROR (here: no such table or column), SQLITE_CORRUPT, SQLITE_NOTADB
_DAMAGED: Final = (1, 11, 26)

# SQLITE_READONLY, SQLITE_CANTOPEN
_READ_ONLY: Final = (8, 14)

#: A value that SQLite does not take: a lone surrogate, a huge number, another type.
_UNBINDABLE: Final = (UnicodeError, OverflowError, sqlite3.ProgrammingError, sqlite3.InterfaceError)


class Event(NamedTuple):
    """One thing that happened to a mail; one event per recipient that it concerns.

    ``at``: seconds since the epoch.  ``kind``: a `State`, or a word of its own
    (``paused``, ``resumed``).  ``entry``: id in the spool.  ``mailbox``: its route as text.
    ``attempt``: which attempt, from 1; 0: none.  ``reply``: the relay's words, or ours;
    hostile text.  ``relay``: host and port.  A tuple, because thousands are made a second.
    """

    at: float
    kind: str
    entry: str = ""
    message_id: str = ""
    mailbox: str = ""
    sender: str = ""
    recipient: str = ""
    attempt: int = 0
    reply: str = ""
    relay: str = ""


class _UnusableFile(sqlite3.DatabaseError):
    """What stands at our path is no journal of this version."""


class JournalFile:
    """See `journal.EventStore`.  Raises `sqlite3.Error` and OSError."""

    errors: Final = (sqlite3.Error, OSError)

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._inode = 0

    def write(self, events: Sequence[Event]) -> None:
        """Write all events, or none."""
        try:
            self._write(events)
        except _UNBINDABLE:
            self._write([clean for event in events if (clean := _clean(event))])

    def add(self, events: Sequence[Event]) -> int:
        """Write those that are missing; return how many."""
        rows = [clean._asdict() for event in events if (clean := _clean(event))]
        connection = self._connected()
        with _transaction(connection):
            return connection.executemany(_ADD, rows).rowcount

    def prune(self, before: float, most: int) -> int:
        """Remove at most so many of the events before a time; return how many."""
        return self._connected().execute(_PRUNE, (before, most)).rowcount

    def close(self) -> None:
        """Close the file.  Twice is fine."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def find(self, *, message_id: str | None, address: str | None, limit: int) -> list[Event]:
        """Return the newest events of a Message-Id or of an address, the oldest first."""
        query, key = (_BY_ADDRESS, address) if message_id is None else (_BY_MESSAGE_ID, message_id)
        if key is not None:
            key = key.encode("utf-8", "backslashreplace").decode()  # as `_clean` writes it
        rows = _query(self._path, query, {"key": key, "limit": limit})
        return [Event(*row) for row in reversed(rows)]

    def count(self, since: float) -> dict[str, int]:
        """Return how many events of each kind there were since a time."""
        query = "SELECT kind, count(*) FROM events WHERE at >= :since GROUP BY kind"
        return dict(_query(self._path, query, {"since": since}))

    def totals(self, since: float, *, by: str) -> list[tuple[str, str, int]]:
        """Return (name, kind, number of events) since a time; see `_TOTALS` for `by`."""
        rows = _query(self._path, _TOTALS[by], {"since": since})
        return [(name, kind, number) for name, kind, number in rows]

    def series(self, since: float, step: float) -> list[tuple[int, str, int]]:
        """Return (number of the step, kind, number of events) since a time, step by step."""
        query = (
            "SELECT CAST((at - :since) / :step AS INTEGER), kind, count(*) FROM events"
            " WHERE at >= :since GROUP BY 1, 2 ORDER BY 1"
        )
        rows = _query(self._path, query, {"since": since, "step": step})
        return [(index, kind, number) for index, kind, number in rows]

    def _write(self, events: Sequence[Event]) -> None:
        try:
            self._insert(self._connected(), events)
        except sqlite3.DatabaseError as error:
            if not _is_damaged(error):
                raise
            self._set_aside(error)
            self._insert(self._connected(), events)

    def _insert(self, connection: sqlite3.Connection, events: Sequence[Event]) -> None:
        with _transaction(connection):
            for start in range(0, len(events), _CHUNK):
                part = events[start : start + _CHUNK]
                connection.execute(_insertion(len(part)), tuple(itertools.chain(*part)))

    def _connected(self) -> sqlite3.Connection:
        """Return a connection to the file that stands at our path now."""
        try:
            status = os.lstat(self._path)
        except FileNotFoundError:
            self._make()
            status = os.lstat(self._path)
        if self._connection is not None and status.st_ino == self._inode:
            return self._connection
        self.close()  # deleted or set aside meanwhile; SQLite sees that, and removes nothing
        self._inode = status.st_ino
        if not stat.S_ISREG(status.st_mode):
            raise _UnusableFile("is no regular file")
        self._connection = _connect(self._path)
        # Pages of the indexes are hit at random: fewer of them are read and written twice.
        self._connection.execute("PRAGMA cache_size = -16000")
        self._connection.execute("PRAGMA wal_autocheckpoint = 4000")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        return self._connection

    def _make(self) -> None:
        with self._locked():
            if os.path.lexists(self._path):
                return
            handle, name = tempfile.mkstemp(
                prefix=".journal.", suffix=".new", dir=os.path.dirname(self._path)
            )
            os.close(handle)
            try:
                with closing(sqlite3.connect(name, isolation_level=None)) as connection:
                    connection.executescript(_SCHEMA)
                self._remove_companions()
                os.rename(name, self._path)
            except BaseException:
                os.unlink(name)
                raise

    def _set_aside(self, error: sqlite3.DatabaseError) -> None:
        self.close()
        with self._locked():
            if os.lstat(self._path).st_ino != self._inode:
                return  # another process did
            os.replace(self._path, self._path + ".damaged")
            self._remove_companions()
        log.error(
            "the journal %s cannot be used (%s): set aside as %s.damaged, a new one is begun;"
            " no mail is affected",
            self._path,
            error,
            self._path,
        )

    def _remove_companions(self) -> None:
        for suffix in ("-wal", "-shm"):  # of a journal that is gone: they would corrupt ours
            try:
                os.unlink(self._path + suffix)
            except FileNotFoundError:
                pass

    @contextmanager
    def _locked(self) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(self._path + ".lock", flags, 0o600)
        try:
            _lock(handle)
            yield
        finally:
            os.close(handle)


def _lock(handle: int) -> None:
    """Take a lock that others hold for milliseconds, waiting as SQLite itself does."""
    deadline = time.monotonic() + _BUSY
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.002)


def _query(path: str, query: str, parameters: dict[str, Any]) -> list[Any]:
    if not os.path.lexists(path):
        return []
    try:
        with closing(_connect(path)) as connection:
            return connection.execute(query, parameters).fetchall()
    except sqlite3.OperationalError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _READ_ONLY:
            raise
    # Even to read takes a file beside it.  Without: what was there at the last checkpoint.
    with closing(_connect(path, "mode=ro&immutable=1")) as connection:
        return connection.execute(query, parameters).fetchall()


def _connect(path: str, mode: str = "mode=rw") -> sqlite3.Connection:
    """Open a file that is there: one that is not is never made."""
    uri = f"file:{quote(path)}?{mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY, isolation_level=None)
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != VERSION:
            raise _UnusableFile(f"has version {version}, this release has {VERSION}")
        connection.execute("PRAGMA trusted_schema = OFF")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _insertion(rows: int) -> str:
    return f"INSERT INTO events ({_COLUMNS}) VALUES {', '.join([_ROW] * rows)}"  # noqa: S608


def _is_damaged(error: sqlite3.DatabaseError) -> bool:
    if isinstance(error, _UnusableFile):
        return True
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def _clean(event: Event) -> Event | None:
    """Return the event with values that SQLite takes, or None."""
    try:
        at, attempt = float(event.at), min(int(event.attempt), 2**31)
    except (TypeError, ValueError, OverflowError):
        return None
    texts = {
        name: str(value).encode("utf-8", "backslashreplace").decode()
        for name, value in event._asdict().items()
        if name not in ("at", "attempt")
    }
    return Event(at=at, attempt=attempt, **texts)
