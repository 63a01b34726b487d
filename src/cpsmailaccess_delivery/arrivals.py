"""Where entries come from: a scan of the spool, and then its watch."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from .agenda import LONGEST_SLEEP
from .errors import SpoolError
from .interfaces import Entry
from .shared import Shared

log = logging.getLogger(__name__)

#: Entries taken from a scan before the loop may do something else.
_SCAN_STEP = 5_000


class Arrivals:
    """Hands over entries as they are found.

    `offer`: takes them.  `forget`: forgets all that were taken: a scan begins.  `changed`:
    called when a scan is done.  `failed`: called when there is none, and none will be tried.
    """

    def __init__(
        self,
        shared: Shared,
        *,
        offer: Callable[[list[Entry]], None],
        forget: Callable[[], None],
        changed: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._spool = shared.spool
        self._loop = shared.loop
        self._draining = shared.draining
        self._offer = offer
        self._forget = forget
        self._changed = changed
        self._failed = failed
        self._scan: Iterator[Entry] | None = None
        self._watch: Any = None

    @property
    def scanning(self) -> bool:
        """Whether a scan is under way."""
        return self._scan is not None

    def start(self) -> None:
        """Watch the spool, and scan it."""
        self._watch = self._spool.watch()
        self._loop.add_reader(self._watch.fileno(), self.read)
        self.look()

    def stop(self) -> None:
        """Scan no further."""
        self._scan = None

    def close(self) -> None:
        """Give back what `start` took."""
        if self._watch is not None:
            self._loop.remove_reader(self._watch.fileno())
            self._watch.close()

    def read(self) -> bool:
        """Hand over what the watch tells; return whether there was something."""
        entries = self._watch.read()
        if entries is None:
            log.info("the spool's watch lost count; scanning again")
            self.look()
            return True
        entries = list(entries)
        self._offer(entries)
        return bool(entries)

    def look(self) -> None:
        """Forget what was found, and scan the spool."""
        self._forget()
        self._scan = self._spool.scan()
        self._scan_step()

    def _scan_step(self) -> None:
        if self._scan is None:
            return
        try:
            step = list(itertools.islice(self._scan, _SCAN_STEP))
        except SpoolError as error:
            self._scan = None
            if self._draining:
                self._failed(error)
                return
            log.error("%s; trying again in %.0f s", error, LONGEST_SLEEP)
            self._loop.call_later(LONGEST_SLEEP, self.look)
            return
        self._offer(step)
        if len(step) < _SCAN_STEP:
            self._scan = None
            self._changed()
        else:
            self._loop.call_soon(self._scan_step)
