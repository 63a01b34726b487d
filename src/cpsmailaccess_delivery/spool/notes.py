"""Why lanes wait, kept beside the mails: one small file for each lane in trouble.

For people, and so that a restart does not begin with a volley of logins.  A note that is lost
costs one early probe; so nothing is synced.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
from dataclasses import asdict
from pathlib import Path

from ..errors import SpoolError
from ..interfaces import LaneNote

log = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{16}\Z")


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
            return LaneNote(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            log.warning("ignoring the lane note %s: %s", path, error)
            return None

    def write(self, key: str, note: LaneNote | None) -> None:
        """Replace the note of a lane, or remove it.  Raises `SpoolError`."""
        path = self._directory / key
        try:
            if note is None:
                path.unlink(missing_ok=True)
                return
            self._directory.mkdir(mode=0o700, exist_ok=True)
            temporary = path.with_name(f".{key}.{secrets.token_hex(4)}")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(temporary, flags, 0o600), "w", encoding="utf-8") as stream:
                json.dump(asdict(note), stream)
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
