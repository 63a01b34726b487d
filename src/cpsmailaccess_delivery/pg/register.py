"""The register of the accounts as rows: see `register`.

Accounts and register change in one transaction, so nothing is ever announced, and nothing is left
to settle.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final

from psycopg.pq import TransactionStatus

from ..key import Key
from ..register import Page, changed_page, check_generation, dump_page, load_page
from .connections import PATIENT, Connection
from .engine import SCHEMA

REGISTERS: Final = f"{SCHEMA}.registers"

#: Each session asks, and the register of many accounts is long: it is sent when it is another row,
#: written by another transaction, or in another place.
_READ: Final = f"""
SELECT stamp, CASE WHEN stamp <> %(known)s THEN data END
FROM (
    SELECT xmin::text || ' ' || ctid::text AS stamp, data FROM {REGISTERS} WHERE key = %(key)s
) row"""  # noqa: S608

_LOCK: Final = 0x63707372  # "cpsr": of two that change accounts at once, one waits


class RegisterTable:
    """The registers of one vault.  Thread-safe."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[str, Page]] = {}  # key id -> (stamp of the row, its content)
        self._seen: dict[str, int] = {}  # key id -> the highest generation that was committed
        self._lock = threading.Lock()  # what is read later was committed later

    def lock(self, connection: Connection) -> None:
        """Be the only one who changes accounts until the transaction ends."""
        connection.execute(PATIENT)
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])

    def page(self, connection: Connection, key: Key) -> Page | None:
        """Return what is listed for a key; None: nothing ever was.  Not to be changed.

        Raises `Unusable`, and what the database does.
        """
        with self._lock:
            known = self._read.get(key.id, ("", Page()))
            values = {"key": key.id, "known": known[0]}
            row = connection.execute(_READ, values, binary=True).fetchone()
            if row is None:
                return None
            stamp, data = row
            page = known[1] if data is None else load_page(data, key)
            check_generation(page, self._seen.get(key.id, 0))
            self._read[key.id] = stamp, page
            if connection.info.transaction_status == TransactionStatus.IDLE:
                self._seen[key.id] = page.generation  # else it may be rolled back
            return page

    def write(self, connection: Connection, key: Key, changed: Mapping[str, list[str]]) -> None:
        """List these versions for these accounts ([]: none any more).  Under the lock."""
        new = changed_page(self.page(connection, key) or Page(), changed, self._seen.get(key.id, 0))
        if new is not None:
            connection.execute(
                f"INSERT INTO {REGISTERS} (key, data) VALUES (%s, %b)"  # noqa: S608
                " ON CONFLICT (key) DO UPDATE SET data = excluded.data",
                [key.id, dump_page(new, key)],
            )

    def forget(self, connection: Connection, key: Key) -> None:
        """Remove the register of a key that seals nothing any more."""
        self._seen.pop(key.id, None)
        connection.execute(f"DELETE FROM {REGISTERS} WHERE key = %s", [key.id])  # noqa: S608
