"""What the doctor looks at when the outbox is on a server: see `checks`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from ..wording import counted
from .findings import Level

if TYPE_CHECKING:
    from ..outbox import Outbox

#: What to do when it cannot be reached.
_REACH: Final = (
    "is it up? host, port, database and user are those of the URL; the password comes from"
    " ~/.pgpass or PGPASSFILE, which nobody else may read (chmod 600)"
)

#: Seconds between our clock and the server's that are worth a word.  It does no harm: see `Parts`.
_DRIFT: Final = 5.0


def advice_on(error: Exception) -> str:
    """Return what to do about an error of `check_server`, where its text does not say that."""
    import psycopg

    return _REACH if isinstance(error.__cause__, psycopg.OperationalError) else ""


def check_server(outbox: Outbox) -> Iterator[tuple[Level, str, str]]:
    """Look at the server, its schema, its clock, and who works on it."""
    from ..pg.schema import VERSION, found

    begun = time.monotonic()
    with outbox.spool.connections.use("ask for the version") as connection:
        version, _ = found(connection)
        (server,) = connection.execute("SHOW server_version").fetchone()
        (durable,) = connection.execute("SHOW synchronous_commit").fetchone()
        (fsync,) = connection.execute("SHOW fsync").fetchone()
    milliseconds = (time.monotonic() - begun) * 1000
    yield Level.OK, f"PostgreSQL {server} answers ({milliseconds:.1f} ms)", ""
    if version < VERSION:
        text = f"schema {version}, this release makes {VERSION}"
        yield Level.WARN, text, "cpsmail schema upgrade"
    elif version > VERSION:
        yield Level.OK, f"schema {version}, of a newer release; this one makes {VERSION}", ""
    else:
        yield Level.OK, f"schema {version}", ""
    if fsync == "off" or durable == "off":
        text = f"fsync = {fsync}, synchronous_commit = {durable}: a crash loses committed mails"
        yield Level.FAIL, text, "set both to on for this database"
    drift = outbox.spool.connections.now() - time.time()
    if abs(drift) > _DRIFT:
        yield Level.WARN, f"the server's clock is {drift:+.0f} s from ours", "synchronise the hosts"
    if workers := len(outbox.presence.deliverers()):
        yield Level.OK, counted(workers, "worker delivers", "workers deliver"), ""
    else:
        yield Level.WARN, "no worker delivers", "start `cpsmail run` on one host at least"
    if number := len(outbox.spool.left_overs()):
        text = counted(number, "mail is in doubt", "mails are in doubt")
        yield Level.WARN, text, "`cpsmail run` and `drain` hold what is in doubt"
