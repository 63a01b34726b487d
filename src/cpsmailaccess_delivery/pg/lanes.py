"""Why lanes wait, for all workers to know."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict

from ..interfaces import LaneNote
from ..spool.notes import load_note
from .connections import Connections
from .engine import SCHEMA

log = logging.getLogger(__name__)

LANES = f"{SCHEMA}.lanes"

_KEY = re.compile(r"[0-9a-f]{16}\Z")


class LaneNotes:
    """The notes of lanes in trouble; the same row says whose the lane is, see `lane_sharing`."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def read(self, key: str) -> LaneNote | None:
        """Return the note of a lane; None: there is none that can be read."""
        if not _KEY.match(key):
            return None
        with self._connections.use("read a lane's note") as connection:
            row = connection.execute(f"SELECT note FROM {LANES} WHERE lane = %s", [key]).fetchone()  # noqa: S608
        return _note(key, row[0]) if row else None

    def write(self, key: str, note: LaneNote | None) -> None:
        """Replace the note of a lane, or remove it.  Raises `SpoolError`."""
        with self._connections.use("keep a lane's note") as connection:
            if note is None:
                connection.execute(
                    f"UPDATE {LANES} SET note = NULL WHERE lane = %s AND note IS NOT NULL",  # noqa: S608
                    [key],
                )
            else:
                connection.execute(
                    f"INSERT INTO {LANES} (lane, note) VALUES (%s, %s)"  # noqa: S608
                    " ON CONFLICT (lane) DO UPDATE SET note = excluded.note",
                    [key, json.dumps(asdict(note))],
                )

    def all(self) -> dict[str, LaneNote]:
        """Return the notes by lane key."""
        query = f"SELECT lane, note FROM {LANES} WHERE note IS NOT NULL"  # noqa: S608
        with self._connections.use("read the lanes' notes") as connection:
            rows = connection.execute(query).fetchall()
        return {key: note for key, text in rows if (note := _note(key, text)) is not None}


def _note(key: str, text: str | None) -> LaneNote | None:
    if text is None:
        return None
    try:
        return load_note(text.encode())
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        log.warning("ignoring the note of the lane %s: %s", key, error)
        return None
