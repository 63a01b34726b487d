"""Connections to the server: kept between uses, left alone by a forked child; and its clock.

A connection that the server or the network has ended is noticed before it is used again, so a
restart of the server costs the calls that were under way, and no later one.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg import conninfo, errors

from ..errors import InvalidSettings, SpoolError

Connection = psycopg.Connection[Any]

#: What runs statements; a cursor: of a connection that is the application's, set as it likes.
Executor = psycopg.Connection[Any] | psycopg.Cursor[Any]

#: What we ask of libpq where the URL says nothing: a server that has vanished is noticed.
_DEFAULTS: Final = {
    "application_name": "cpsmail",
    "connect_timeout": "10",  # seconds
    "keepalives_idle": "10",  # seconds
    "keepalives_interval": "5",  # seconds
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",  # milliseconds
}

#: Whatever the database or the user is set to: no function of others, who may make some in
#: `public`, is taken for one of the system; times are as the driver reads them; and nobody's lock
#: is waited for without end, in the loop of a processor least of all.
_SESSION: Final = """
SET search_path = pg_catalog;
SELECT set_config('DateStyle', 'ISO', false), set_config('lock_timeout',
    CASE current_setting('lock_timeout') WHEN '0' THEN '10s'
    ELSE current_setting('lock_timeout') END, false)"""

#: For the transaction: it waits for its turn, however long that is.
PATIENT: Final = "SELECT set_config('lock_timeout', '0', true)"

#: Seconds after a connect that took long to fail in which none is tried: who asks is told at once.
_PAUSE: Final = 1.0
_LONG: Final = 0.5

#: Idle connections that are kept, and seconds for which the offset of the clock is believed.
_KEPT: Final = 8
_CLOCK_KEPT: Final = 60.0

_all: weakref.WeakSet[Connections] = weakref.WeakSet()
_abandoned: list[Connection] = []  # of the parent: to close one here would end it there


class Connections:
    """The connections of one outbox to its server.  Thread-safe.

    `url`: as libpq takes it (``postgresql://user@host/dbname``).  A password in it is in no text
    of ours: see ``location``.  `check`: called with the first connection and the location;
    raises `SpoolError` and what the database does.  Raises `InvalidSettings`.
    """

    def __init__(
        self, url: str, check: Callable[[Connection, str], None] = lambda connection, where: None
    ) -> None:
        try:
            given = conninfo.conninfo_to_dict(url)
        except psycopg.ProgrammingError:  # its text may have the password
            unknown = _unknown_parameters(url)
            why = f" has no parameter {', '.join(unknown)}:" if unknown else ""
            raise InvalidSettings(
                f"outbox postgresql://...: is no URL that libpq understands:{why}"
                " postgresql://USER@HOST:PORT/DATABASE"
            ) from None
        self.location = _without_secret(given)
        settings: dict[str, Any] = {**_DEFAULTS, **given}
        self._conninfo = conninfo.make_conninfo(**settings)
        self._closed = False
        self._check = check
        self._is_checked = False
        self._begin()
        _all.add(self)

    def __repr__(self) -> str:
        return f"<Connections {self.location}>"

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._failed_at = -_PAUSE
        self._failure = ""
        self._clock = (0.0, 0.0)  # by the monotonic clock: good until, offset
        self._has_clock = False

    @contextmanager
    def use(self, action: str) -> Iterator[Connection]:
        """Lend a connection in autocommit mode.

        `action`: for the text of the `SpoolError` that every error of the database becomes.
        """
        connection = self._take()
        try:
            yield connection
        except psycopg.Error as error:
            raise self.error(action, error) from error
        finally:
            self._give_back(connection)

    def connect(self) -> Connection:
        """Return a connection of the caller's own, who closes it.  Raises `SpoolError`."""
        if time.monotonic() - self._failed_at < _PAUSE:
            raise SpoolError(self._failure)
        begun = time.monotonic()
        try:
            connection = psycopg.connect(self._conninfo, autocommit=True)
            try:
                connection.execute(_SESSION)
            except psycopg.Error:
                connection.close()
                raise
        except psycopg.Error as error:
            self._failure = str(self.error("connect", error))
            if time.monotonic() - begun > _LONG:
                self._failed_at = time.monotonic()
            raise SpoolError(self._failure) from error
        try:
            if not self._is_checked:
                self._check(connection, self.location)
                self._is_checked = True
        except psycopg.Error as error:
            connection.close()
            raise self.error("work", error) from error
        except BaseException:  # an interrupt, too, must not keep it open
            connection.close()
            raise
        return connection

    def now(self) -> float:
        """Return the server's time in seconds since the epoch: the one that all hosts share.

        While the server cannot be asked, our own clock goes on from its last answer.
        """
        until, offset = self._clock
        mark = time.monotonic()
        if mark < until:
            return mark + offset
        try:
            with self.use("ask for the time") as connection:
                begun = time.monotonic()
                query = "SELECT extract(epoch FROM clock_timestamp())::float8"
                (there,) = connection.execute(query).fetchone() or (0.0,)
                mark = time.monotonic()
            self._clock = (mark + _CLOCK_KEPT, there - (begun + mark) / 2)
            self._has_clock = True
        except SpoolError:
            if not self._has_clock:
                return time.time()
        return mark + self._clock[1]

    def close(self) -> None:
        """Close what is idle, and what is given back later.  Twice is fine."""
        self._closed = True
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def error(self, action: str, error: psycopg.Error) -> SpoolError:
        """Return our error for one of the database, which says what to do."""
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, errors.UndefinedTable | errors.InvalidSchemaName):
            said = "its schema is missing: run `cpsmail schema upgrade`"
        elif isinstance(error, errors.UndefinedColumn | errors.UndefinedFunction):
            said = f"{said}: its schema is older than this release: run `cpsmail schema upgrade`"
        elif isinstance(error, errors.DiskFull):
            said = f"{said}: make room on the server"
        return SpoolError(f"{self.location}: cannot {action}: {said}")

    def _take(self) -> Connection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                return self.connect()
            if _is_usable(connection):
                return connection
            connection.close()

    def _give_back(self, connection: Connection) -> None:
        idle = psycopg.pq.TransactionStatus.IDLE
        if not connection.closed and connection.info.transaction_status == idle:
            with self._lock:
                if not self._closed and len(self._idle) < _KEPT:
                    self._idle.append(connection)
                    return
        connection.close()

    def _after_fork(self) -> None:
        _abandoned.extend(self._idle)
        self._begin()


def _is_usable(connection: Connection) -> bool:
    """Tell whether an idle connection lives.

    Nothing is to be read from one but its end, and that may come in two pieces.
    """
    if connection.closed:
        return False
    return not wait_for_any(connection, seconds=0.0)


def wait_for_any(*files: Any, seconds: float | None = None) -> list[int]:
    """Wait until one of some descriptors, or of things that have one, can be read; return which.

    None: for ever.  In a process that has more of them than `select` can count.
    """
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return [fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)]


def notes_of(connection: Connection, ended: int, *, seconds: float | None = None) -> list[str]:
    """Return the payloads of notifications; wait for one, or until `ended` can be read.

    Those that came with the answer to a query are not in the socket any more: first these.
    """
    notes = [note.payload for note in connection.notifies(timeout=0)]
    if not notes:
        wait_for_any(connection, ended, seconds=seconds)
        notes = [note.payload for note in connection.notifies(timeout=0)]
    return notes


class Outage:
    """Tells the log of what is tried again every second: once, what is wrong, and once, its end."""

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._said = ""

    def begin(self, error: Exception) -> None:
        """Say it, unless it was said."""
        said = " ".join(str(error).split())
        if said != self._said:
            self._log.warning("%s, until that works again: %s", self._what, said)
            self._said = said

    def end(self) -> None:
        """Say so, if it has begun."""
        if self._said:
            self._log.warning("%s: that works again", self._what)
            self._said = ""


def _unknown_parameters(url: str) -> list[str]:
    """Return names in the query of a URL that libpq does not know."""
    query = url.partition("?")[2]
    if "@" in query:  # of a password that was not quoted
        return []
    known = {each.keyword.decode() for each in psycopg.pq.Conninfo.get_defaults()}
    names = (pair.partition("=")[0] for pair in query.split("&") if pair)
    return [name for name in dict.fromkeys(names) if name not in known]


def _without_secret(given: dict[str, Any]) -> str:
    user = f"{given['user']}@" if given.get("user") else ""
    hosts, ports = given.get("host", "").split(","), given.get("port", "").split(",")
    if len(ports) == 1:  # that of all of them
        ports *= len(hosts)
    pairs = zip(hosts, ports, strict=False)
    servers = ",".join(f"{host}:{port}" if port else host for host, port in pairs)
    return f"postgresql://{user}{servers}/{given.get('dbname', '')}"


def _after_fork_in_child() -> None:
    for connections in list(_all):
        connections._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
