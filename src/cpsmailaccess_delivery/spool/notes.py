"""Why lanes wait, kept beside the mails: one small file for each lane in trouble.

For people, and so that a restart does not begin with a volley of logins.  A note that is lost
costs one early probe; so nothing is synced.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
from dataclasses import asdict
from pathlib import Path

from ..errors import SpoolError
from ..files import make_private, open_inside, refuse_link, write_new
from ..interfaces import LaneNote

log = logging.getLogger(__name__)

_MAX_SIZE = 64 * 1024  # bytes
_KEY = re.compile(r"[0-9a-f]{16}\Z")

#: What `_load` raises on garbage.
_UNREADABLE = (ValueError, TypeError, KeyError, OverflowError, RecursionError)


class LaneNotes:
    """A directory with one file for each lane in trouble, named by its key."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, key: str) -> LaneNote | None:
        """Return the note of a lane; None: there is none that can be read."""
        if not _KEY.match(key):
            return None
        path = self._directory / key
        try:
            return load_note(_read(path))
        except FileNotFoundError:
            return None
        except (OSError, *_UNREADABLE) as error:
            log.warning("ignoring the lane note %s: %s", path, error)
            return None

    def write(self, key: str, note: LaneNote | None) -> None:
        """Replace the note of a lane, or remove it.  Raises `SpoolError`."""
        path = self._directory / key
        try:
            if note is None:
                path.unlink(missing_ok=True)
                return
            refuse_link(str(self._directory))
            make_private(str(self._directory))
            temporary = str(path.with_name(f".{key}.{secrets.token_hex(4)}"))
            write_new(temporary, json.dumps(asdict(note)).encode())
            os.rename(temporary, path)
        except OSError as error:
            raise SpoolError(f"cannot write {path}: {error.strerror}") from error

    def all(self) -> dict[str, LaneNote]:
        """Return the notes by lane key."""
        try:
            names = [name for name in os.listdir(self._directory) if _KEY.match(name)]
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise SpoolError(f"cannot read {self._directory}: {error.strerror}") from error
        return {name: note for name in names if (note := self.read(name)) is not None}


def _read(path: Path) -> bytes:
    with open(open_inside(str(path.parent), path.name), "rb") as stream:
        return stream.read(_MAX_SIZE)


def load_note(data: bytes) -> LaneNote:
    """Return what a note says.  Raises ValueError, TypeError, KeyError, RecursionError."""
    fields = json.loads(data)
    note = LaneNote(
        route=str(fields["route"]),
        trouble=str(fields["trouble"]),
        reason=str(fields["reason"]),
        since=float(fields["since"]),
        until=float(fields["until"]),
        failures=int(fields["failures"]),
        version=str(fields["version"]),
        told=fields.get("told") is True,
        paused=fields.get("paused") is True,
    )
    if not (math.isfinite(note.since) and math.isfinite(note.until) and note.failures > 0):
        raise ValueError("has numbers that are none")
    return note
