"""The workers that live, on all hosts: a row each, signed again and again."""

from __future__ import annotations

import os
import socket
import uuid
from typing import Final

from zope.interface import implementer

from ..interfaces import IPresence
from ..spool.presence import Deliverer
from .connections import Connection, Connections
from .engine import SCHEMA

WORKERS: Final = f"{SCHEMA}.workers"

_SIGN: Final = f"""
INSERT INTO {WORKERS} (id, host, pid, until)
VALUES (%s, %s, %s, clock_timestamp() + make_interval(secs => %s))
ON CONFLICT (id) DO UPDATE SET until = excluded.until"""  # noqa: S608

_FORGOTTEN: Final = "interval '1 hour'"


@implementer(IPresence)
class Workers:
    """See `IPresence`.  Whose feed has signed delivers; who drains once is nobody's rival."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def delivers(self) -> None:
        """See `IPresence`: the feed signs."""

    def rests(self) -> None:
        """See `IPresence`: the feed leaves."""

    def deliverers(self) -> list[Deliverer]:
        """See `IPresence`."""
        query = (
            f"SELECT host, pid, extract(epoch FROM since)::float8 FROM {WORKERS}"  # noqa: S608
            " WHERE until > clock_timestamp() ORDER BY since"
        )
        here = socket.gethostname(), os.getpid()
        with self._connections.use("look who delivers") as connection:
            rows = connection.execute(query).fetchall()
        return [Deliverer(pid, since, (host, pid) == here, host) for host, pid, since in rows]

    def close(self) -> None:
        """See `IPresence`: each feed leaves when it ends."""

    # For a feed, with its connection

    def sign(self, connection: Connection, worker: uuid.UUID, seconds: float) -> None:
        """Say that a worker of this process lives for so long."""
        connection.execute(_SIGN, [worker, socket.gethostname(), os.getpid(), seconds])
        connection.execute(f"DELETE FROM {WORKERS} WHERE until < clock_timestamp() - {_FORGOTTEN}")  # noqa: S608

    def count(self, connection: Connection) -> int:
        """Return how many workers live."""
        query = f"SELECT count(*) FROM {WORKERS} WHERE until > clock_timestamp()"  # noqa: S608
        (count,) = connection.execute(query).fetchone() or (1,)
        return int(count)

    def leave(self, connection: Connection, worker: uuid.UUID) -> None:
        """Say that a worker has ended."""
        connection.execute(f"DELETE FROM {WORKERS} WHERE id = %s", [worker])  # noqa: S608
