"""What `Outbox("postgresql://...")` is made of.  Nothing is asked of the server yet."""

from __future__ import annotations

from ..errors import InvalidSettings
from ..journal import Journal
from ..key import KeySource
from ..parts import Parts
from ..spool.postgres import LEASE, PostgresSpool
from . import schema
from .connections import Connections
from .feed import Feed
from .journal import EventTable
from .vault import PostgresVault


def open_parts(url: str, key: bytes | None) -> Parts:
    """See `parts.Opener`.  Raises `InvalidSettings`.

    `url`: as libpq takes it; and ``?lease=SECONDS``, see `spool.postgres.LEASE`.
    """
    url, lease = _without_lease(url)
    connections = Connections(url, check=schema.check)
    spool = PostgresSpool(connections, lease=lease)
    keys = KeySource(key)
    vault = PostgresVault(connections, keys)
    return Parts(
        spool=spool,
        keys=keys,
        vault=vault,
        journal=Journal(
            connections.location, clock=connections.now, store=lambda: EventTable(connections)
        ),
        presence=spool.workers,
        clock=connections.now,
        feed=lambda: Feed(spool, vault.read_ahead),
    )


def _without_lease(url: str) -> tuple[str, float]:
    start, mark, query = url.partition("?")  # else as it is: libpq's URLs are not everybody's
    pairs = query.split("&")
    lease = LEASE
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name == "lease":
            try:
                lease = float(value)
            except ValueError:
                lease = 0.0
            if not 1.0 <= lease <= 3600.0:
                raise InvalidSettings(f"outbox: lease={value}: is from 1 to 3600 seconds")
    rest = "&".join(pair for pair in pairs if not pair.startswith("lease="))
    return start + (mark + rest if rest else ""), lease
