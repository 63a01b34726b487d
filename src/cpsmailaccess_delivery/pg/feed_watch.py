"""Leases the next mails of a processor ahead, and tells it: a thread beside its loop.

With one connection: it listens, looks for lanes (`lane_sharing`), and asks the engine.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import psycopg

from ..errors import SpoolError
from ..interfaces import Entry
from ..spool.postgres import PostgresSpool
from .connections import Connection, Outage, notes_of, wait_for_any
from .engine import MOST_AT_ONCE
from .functions import TAKEABLE
from .lane_sharing import LaneSharing
from .mails import CHANNEL, ENTRY, MAILS, entry_of
from .watch import Listener

if TYPE_CHECKING:
    from .feed import Feed

log = logging.getLogger(__name__)

#: Mails that are leased ahead: of one lane, of one worker.  Of a lane that has none it is always
#: some: the others may be slow.
_LANE_AHEAD: Final = 100
_AHEAD: Final = 1000

#: Seconds before the first look for lanes: of workers that start together each gets its share.
_START: Final = 0.25

#: Seconds between two looks when nothing is told, and when what is leased must be sent first.
_LOOK: Final = 1.0
_SOON: Final = 0.02
_FULL: Final = 0.1

#: Seconds between two looks at the mails of lanes that wait, and how many are told in one.
_AGE: Final = 60.0
_AGE_STEP: Final = 1000


class FeedWatch(Listener):
    """Tells of mails that are leased already; `close` gives them back, and the lanes."""

    def __init__(self, feed: Feed, spool: PostgresSpool) -> None:
        self._feed = feed
        self._spool = spool
        self._sharing = LaneSharing(feed, spool)
        self._renew_at = 0.0  # monotonic, as all times here
        self._seek_at = time.monotonic() + _START
        self._age_at = 0.0
        self._aged: dict[str, str] = {}  # by lane: the last id that was told because of its age
        self._expired: set[str] = set()  # ids that were told since because their time is over
        super().__init__(spool.connections, CHANNEL, "cpsmail-feed")

    def _run(self, connection: Connection | None) -> None:
        outage = Outage(log, "no mail is taken")
        while not self._closed:
            try:
                if connection is None:
                    connection = self._listen()
                    # The server may have died and forgotten claims, which do not wait for its disk.
                    self._feed.give_back(connection)
                seconds = self._work(connection)
                outage.end()
                self._wait(connection, seconds)
                continue
            except (SpoolError, psycopg.Error) as error:
                outage.begin(error)
            except Exception:  # a fault of ours: nothing spins on it, and it is not the end
                log.exception("a fault in the feed; going on in a moment")
            # What was leased, and perhaps not told, is given back by the next one.
            if connection is not None:
                connection.close()
                connection = None
            wait_for_any(self._ended, seconds=_LOOK)
        if connection is not None:
            self._go(connection)

    def _wait(self, connection: Connection, seconds: float) -> None:
        if notes_of(connection, self._ended, seconds=seconds):
            self._seek_at = 0.0

    def _go(self, connection: Connection) -> None:
        try:
            self._feed.give_back(connection)
            self._sharing.leave_all(connection)
        except psycopg.Error as error:
            log.warning("lanes are free in %.0f s: %s", self._spool.leases.seconds, error)
        finally:
            connection.close()

    # One round

    def _work(self, connection: Connection) -> float:
        """Do what is to be done; return the seconds until there may be more."""
        now, sharing = time.monotonic(), self._sharing
        if now >= self._renew_at:
            sharing.renew(connection)
            self._renew_at = now + self._spool.leases.seconds / 3
        if now >= self._seek_at:
            for lane in sharing.look_at_notes(connection):
                self._aged.pop(lane, None)
            sharing.seek(connection, now)
            self._tell_expired(connection)
            self._seek_at = now + _LOOK
        if now >= self._age_at:
            self._tell_old(connection)
            self._expired.clear()  # one that is still there is told again
            self._age_at = now + _AGE
        held = self._feed.held()
        sharing.had_mail([lane for lane, count in held.items() if count], now)
        sharing.make_room(connection, held, now)
        fed = sharing.fed()
        full = held.total() >= _AHEAD
        open_ = [lane for lane in fed if held[lane] < (1 if full else _LANE_AHEAD)]
        more, asked = False, 0
        while asked < len(open_):
            part = self._feed.next_of(open_)
            asked += len(part)
            most = len(part) if full else MOST_AT_ONCE
            entries = self._feed.lease(connection, part, most)
            try:
                self._feed.read_accounts(entries)
            finally:  # they are leased: nobody else tells of them
                self._tell(entries)
            sharing.had_mail((entry.lane for entry in entries), now)
            if len(entries) >= most:
                more = True
            else:
                sharing.are_dry(part)
        if more:
            return 0.0
        if sharing.wants_more or len(open_) < len(fed):
            return _FULL if full else _SOON
        return max(0.0, self._seek_at - now)

    def _tell_old(self, connection: Connection) -> None:
        """Tell a lane that waits of its oldest mails: they may be late, or too old."""
        query = (
            f"SELECT {ENTRY} FROM {MAILS} WHERE lane = %s AND id > %s AND {TAKEABLE}"  # noqa: S608
            " AND due <= %s ORDER BY id LIMIT %s"
        )
        for lane in self._sharing.waiting:
            after, now = self._aged.get(lane, ""), self._spool.connections.now()
            rows = connection.execute(query, [lane, after, now, _AGE_STEP]).fetchall()
            entries = [entry_of(row) for row in rows]
            if entries:
                self._aged[lane] = entries[-1].id
                self._tell(entries)

    def _tell_expired(self, connection: Connection) -> None:
        """Tell a lane that waits of its mails that are not to be sent any more."""
        if not self._sharing.waiting:
            return
        query = (
            f"SELECT {ENTRY} FROM {MAILS} WHERE lane = ANY(%s) AND expires > 0 AND expires <= %s"  # noqa: S608
            f" AND {TAKEABLE} AND due <= %s AND id <> ALL(%s) LIMIT %s"
        )
        now = self._spool.connections.now()
        values = [list(self._sharing.waiting), now, now, list(self._expired), _AGE_STEP]
        entries = [entry_of(row) for row in connection.execute(query, values)]
        self._expired.update(entry.id for entry in entries)
        self._tell(entries)

    def _tell(self, entries: list[Entry]) -> None:
        if entries:
            self._told.tell(entries)
