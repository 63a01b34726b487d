"""How others learn what has changed: LISTEN, in a thread with a connection of its own.

Who was not connected for a while does not know what he has missed: he looks again.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import Final

import psycopg
from zope.interface import implementer

from ..errors import SpoolError
from ..interfaces import Entry, IWatch
from ..spool import forks
from ..watch import Told
from .connections import Connection, Connections, Outage, notes_of, wait_for_any

log = logging.getLogger(__name__)

#: Seconds until a connection that was lost is tried again.
_RETRY: Final = 1.0


@implementer(IWatch)
class Listener:
    """See `IWatch`.  A thread with a connection of its own, which `_run` gets.

    Raises `SpoolError` when the server cannot be reached now, RuntimeError when there is no room
    for a thread; nothing is left open then.
    """

    def __init__(self, connections: Connections, channel: str, name: str) -> None:
        self._connections = connections
        self._channel = channel
        self._closed = False
        connection = self._listen()
        self._told = Told()
        self._ended, self._end = os.pipe()
        self._generation = forks.generation()
        self._thread = threading.Thread(target=self._run, args=[connection], name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            connection.close()
            self._close_files()
            raise

    def fileno(self) -> int:
        """See `IWatch`."""
        return self._told.fileno()

    def read(self) -> Iterable[Entry] | None:
        """See `IWatch`."""
        return self._told.read()

    def close(self) -> None:
        """See `IWatch`."""
        if self._closed:
            return
        self._closed = True
        if self._generation == forks.generation():  # else it is the thread of our parent
            os.write(self._end, b"!")
            self._thread.join()
        self._close_files()

    def _close_files(self) -> None:
        self._told.close()
        os.close(self._ended)
        os.close(self._end)

    def _listen(self) -> Connection:
        connection = self._connections.connect()
        try:
            connection.execute(f'LISTEN "{self._channel}"')
        except psycopg.Error as error:
            connection.close()
            raise self._connections.error("listen", error) from error
        return connection

    def _run(self, connection: Connection | None) -> None:
        """Work until `_closed`; `_ended` can be read then.  Closes the connection."""
        raise NotImplementedError


class Watch(Listener):
    """Tells what has changed.

    `tell_of`: called in the thread with a connection and the payloads of the notifications;
    returns the entries that are told, None: who reads is to look again.
    """

    def __init__(
        self,
        connections: Connections,
        channel: str,
        tell_of: Callable[[Connection, list[str]], list[Entry] | None],
        on_close: Callable[[Watch], None] = lambda watch: None,
    ) -> None:
        self._tell_of = tell_of
        self._on_close = on_close
        super().__init__(connections, channel, "cpsmail-listen")

    def close(self) -> None:
        """See `IWatch`."""
        if not self._closed:
            self._on_close(self)
        super().close()

    def _run(self, connection: Connection | None) -> None:
        outage = Outage(log, "not told of changes")
        try:
            while not self._closed:
                try:
                    if connection is None:
                        connection = self._listen()
                        outage.end()
                        self._told.lose_count()
                    self._wait(connection)
                except (SpoolError, psycopg.Error) as error:
                    outage.begin(error)
                    if connection is not None:
                        connection.close()
                        connection = None
                    wait_for_any(self._ended, seconds=_RETRY)
        finally:
            if connection is not None:
                connection.close()

    def _wait(self, connection: Connection) -> None:
        told = notes_of(connection, self._ended)
        if not told or self._closed:
            return
        entries = self._tell_of(connection, told)
        if entries is None:
            self._told.lose_count()
        elif entries:
            self._told.tell(entries)
