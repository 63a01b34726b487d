"""Which mails a form of the tab *Queue* means: those that are ticked, or all that are listed."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ..errors import NoSuchEntry
from ..interfaces import Entry, State
from ..steering import entries_of, is_unclear
from .page import text, texts
from .queue_view import MOST_OPENED, Selection, select

#: Mails that are decided on in one request.
MOST_AT_ONCE: Final = 1000

#: States that are meant by all mails, when none was chosen; none: any.
_USUAL: Final[dict[str, Collection[State]]] = {
    "retry": (State.DEFERRED,),
    "hold": (State.QUEUED, State.DEFERRED),
    "release": (State.HELD,),
    "cancel": (),
    "accepted": (State.UNCLEAR, State.DEFERRED, State.HELD),
    "refused": (State.UNCLEAR, State.DEFERRED, State.HELD),
}

#: What is for recipients that are unclear.
_SETTLES: Final = ("accepted", "refused")


@dataclass(frozen=True)
class Chosen:
    """``mails``: those that are meant; ``more``: how many more fit.

    ``all_are_meant``: not those that were ticked.  ``not_seen``: what was not looked at, as a
    sentence with a space before it.
    """

    mails: list[str | Entry]
    more: int = 0
    all_are_meant: bool = False
    not_seen: str = ""


def selection_of(request: Any) -> Selection:
    """Return what a browser says about which mails are meant."""
    names = ("state", "lane", "older", "search", "by")
    return Selection.typed({name: text(request, name) for name in names})


def choose(outbox: Any, request: Any, what: str) -> Chosen:
    """Return the mails that are meant by a button: `what` is to be done with them."""
    if text(request, "which") != "all" or text(request, "search"):
        return Chosen(entries_of(outbox.queue, texts(request, "ids")))
    fitting = select(outbox, selection_of(request), _USUAL[what], outbox.clock())
    unclear = _Unclear(outbox.queue, fitting) if what in _SETTLES else None
    found = iter(unclear if unclear else fitting)
    mails: list[str | Entry] = list(itertools.islice(found, MOST_AT_ONCE))
    more = sum(1 for _ in found)
    not_seen = ""
    if unclear and unclear.not_opened:
        not_seen = (
            f" Only the oldest {MOST_OPENED} that might be unclear in part were opened: name a"
            " mailbox to look at fewer."
        )
    return Chosen(mails, more, True, not_seen)


class _Unclear:
    """Of entries, those of mails of which a recipient is unclear.

    Where the name says something else, a mail is opened; ``not_opened``: how many were not.
    """

    def __init__(self, queue: Any, entries: Iterable[Entry]) -> None:
        self._queue = queue
        self._entries = entries
        self.not_opened = 0

    def __iter__(self) -> Iterator[Entry]:
        opened = 0
        for entry in self._entries:
            if entry.state is State.UNCLEAR:
                yield entry
            elif opened < MOST_OPENED:
                opened += 1
                if self._is_unclear(entry):
                    yield entry
            else:
                self.not_opened += 1

    def _is_unclear(self, entry: Entry) -> bool:
        try:
            return any(is_unclear(record) for record in self._queue.find(entry))
        except (NoSuchEntry, ValueError):  # gone meanwhile, or cannot be read
            return False
