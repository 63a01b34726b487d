"""Side files: what earlier attempts left of a mail, one JSON file per id.

Written before the mail is renamed, so it is never older than the mail's name; when it
counts more attempts than the name does, a crash came between, and the name follows.

Mode 0400: written with fsync, because it names recipients that must not get the mail
again; damaged, it stops the mail.  Mode 0600: nothing but replies of deferrals, not
synced; what a power loss tears is worth nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ..errors import SpoolError
from ..files import READ, read_all, write_new
from ..interfaces import Cancel, Entry, Outcome, State
from .durable import spool_error
from .layout import Layout

log = logging.getLogger("cpsmailaccess_delivery.spool")

_FINAL: Final = (State.ACCEPTED, State.REFUSED, State.UNCLEAR)
_STATES: Final = ("queued", "deferred", "held", "unclear", "refused")
SYNCED: Final = 0o400
_NOTE: Final = 0o600

#: What `_load` raises on garbage.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class Side:
    """What a side file says."""

    state: State = State.QUEUED
    due: float = 0.0
    attempts: int = 0
    reason: str = ""
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    cancel: Cancel | None = None  # of a mail that is held

    @property
    def binding(self) -> bool:
        """Whether some recipient must not be tried again blindly."""
        return any(o.state in _FINAL or o.doubts for o in self.outcomes.values())

    def restored(self) -> Side:
        """Return what was there before the transaction that cancels the mail."""
        if self.cancel is None:
            return self
        _, state, due, reason, earlier = self.cancel
        return replace(self, state=state, due=due, reason=reason, cancel=earlier)


NOTHING: Final = Side()


def side_aside(entry: Entry, side: Side, reason: str, token: str) -> Side:
    """Return the side of a mail that is set aside; see `ILease.set_aside`."""
    cancel = Cancel(token, entry.state, entry.due, side.reason, side.cancel) if token else None
    return Side(State.HELD, 0.0, entry.attempts, reason, side.outcomes, cancel)


class DamagedSide(SpoolError):
    """A side file that was binding and cannot be read."""


class SideFiles:
    """The directory outcomes/.  `scrap` gives a fresh name in tmp/ for an id."""

    def __init__(self, layout: Layout, *, scrap: Callable[[str], str]) -> None:
        self._layout = layout
        self._scrap = scrap

    def read(self, entry_id: str) -> Side | None:
        """Return the side of a mail, or None: it has none.

        Raises `DamagedSide` when it cannot be understood and was binding.
        """
        try:
            fd = os.open(entry_id, READ, dir_fd=self._layout["outcomes"])
            try:
                status = os.fstat(fd)
                data = read_all(fd, status.st_size)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise spool_error(f"read outcomes/{entry_id}", self._layout.path, error) from error
        try:
            return _load(data)
        except _UNREADABLE:
            if stat.S_IMODE(status.st_mode) == SYNCED:
                raise DamagedSide(
                    f"{self._layout.path}: outcomes/{entry_id} is damaged: who has the mail already"
                    " is unknown; remove the file to send it to all again, or cancel the mail"
                ) from None
            log.warning("outcomes/%s is torn: the last replies of this mail are lost", entry_id)
            return NOTHING

    def write(self, entry_id: str, side: Side, *, sync: bool = False) -> None:
        """Replace the side of a mail; durable when it is binding, or with `sync`."""
        sync = sync or side.binding
        name, mode = self._scrap(entry_id), SYNCED if sync else _NOTE
        try:
            write_new(name, dump_side(side), mode=mode, sync=sync, dir_fd=self._layout["tmp"])
            self._layout.move("tmp", name, "outcomes", entry_id)
            if sync:
                os.fsync(self._layout["outcomes"])
        except OSError as error:
            try:
                os.unlink(name, dir_fd=self._layout["tmp"])
            except OSError:
                pass  # never made, renamed, or left to `sweep`
            raise spool_error(f"write outcomes/{entry_id}", self._layout.path, error) from error

    def written_at(self, entry_id: str) -> float | None:
        """Return when the side of a mail was written (epoch seconds), or None: it has none."""
        try:
            status = os.stat(entry_id, dir_fd=self._layout["outcomes"], follow_symlinks=False)
        except OSError:
            return None
        return status.st_mtime

    def remove(self, entry_id: str) -> None:
        """Forget a mail; what cannot be removed is an orphan that `sweep` tries again."""
        try:
            os.unlink(entry_id, dir_fd=self._layout["outcomes"])
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("outcomes/%s cannot be removed: %s", entry_id, error)


def dump_side(side: Side) -> bytes:
    """Return a side as it is stored: JSON, in ASCII."""
    outcomes = {address: _fields(outcome) for address, outcome in side.outcomes.items()}
    fields: dict[str, object] = {
        "state": side.state.value,
        "due": side.due,
        "attempts": side.attempts,
        "reason": side.reason,
        "outcomes": outcomes,
    }
    if side.cancel is not None:
        fields["cancel"] = side.cancel
    return json.dumps(fields).encode("ascii")


def _load(data: bytes) -> Side:
    fields = json.loads(data)
    due, attempts = float(fields["due"]), int(fields["attempts"])
    if fields["state"] not in _STATES or not math.isfinite(due) or not 0 <= attempts < 1_000_000:
        raise ValueError("says what is never written")
    return Side(
        state=State(fields["state"]),
        due=due,
        attempts=attempts,
        reason=str(fields["reason"]),
        outcomes={address: _outcome(*each) for address, each in fields["outcomes"].items()},
        cancel=_cancel(fields.get("cancel")),
    )


def _cancel(fields: Any) -> Cancel | None:
    if fields is None:
        return None
    token, state, due, reason, earlier = fields
    due = float(due)
    if state not in _STATES or not math.isfinite(due):
        raise ValueError("says what is never written")
    return Cancel(str(token), State(state), due, str(reason), _cancel(earlier))


def load_side(text: str | None) -> Side:
    """Return what `dump_side` wrote; None: nothing.  Raises `DamagedSide`."""
    if text is None:
        return NOTHING
    try:
        return _load(text.encode())
    except _UNREADABLE:
        raise DamagedSide(
            "what earlier attempts left is damaged: who has the mail already is unknown; cancel it"
        ) from None


def _fields(outcome: Outcome) -> list[object]:
    fields: list[object] = [outcome.state.value, outcome.reply, outcome.at]
    return [*fields, outcome.doubts, outcome.held] if outcome.doubts else fields


def _outcome(state: str, reply: object, at: float, doubts: int = 0, held: bool = False) -> Outcome:
    return Outcome(State(state), str(reply), float(at), int(doubts), held is True)
