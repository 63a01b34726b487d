"""This project on PostgreSQL: a server of its own, with Debian's settings, on the same disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import ours
from .child import Child, Parent, call

#: Worker processes of a drain.
WORKERS = 2

#: Seconds of silence after which a worker's mails are another's.
LEASE = 5


@contextmanager
def database(directory: Path, **parameters: Any) -> Iterator[str]:
    """Give the URL of an empty outbox on a server that ends with it.  Raises RuntimeError."""
    from postgres_server import Server, why_none  # in tests/, which make bench says

    if reason := why_none():
        raise RuntimeError(reason)
    directory.chmod(0o755)  # the server is another user
    server = Server({}, parent=directory)
    try:
        query = "&".join(f"{name}={quote(str(value))}" for name, value in parameters.items())
        yield server.new_database() + (f"?{query}" if query else "")
    finally:
        server.remove()


class Contender(ours.Contender):
    """See `ours.Contender`.  `url`: of the outbox."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(Path("."), **options)
        self._base["place"] = url
        self._workers: list[Child] = []

    def start(self, workers: int = WORKERS) -> float:
        """Start some workers; return when their processes began."""
        began = time.monotonic()
        new = [Child("ours", "process", **self._base) for _ in range(workers)]
        for child in new:
            child.line()
        self._workers += new
        return began

    def kill(self) -> float:
        """Kill the worker that was started first; return when."""
        child = self._workers.pop(0)
        child.kill()
        return time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Stop; return CPU and peak memory of the workers, and what is left."""
        usages = [child.finish() for child in self._workers]
        return {
            "cpu": sum(usage["cpu"] for usage in usages),
            "rss": max(usage["rss"] for usage in usages),
            "left": call("postgresql", "count", place=self._base["place"]),
        }

    def fill_evenly(self, count: int, lanes: list[int]) -> None:
        """Queue very many mails, in turn for each of these lanes."""
        call("postgresql", "fill_evenly", count=count, lanes=lanes, **self._base)

    def claims(self, lanes: list[int], count: int) -> list[float]:
        """Lease the next mails of these lanes, so many times; return the seconds of each."""
        taken: list[float] = call("postgresql", "claims", lanes=lanes, count=count, **self._base)
        return taken


def fill_evenly(
    parent: Parent, place: str, accounts: list[Any], size: int, count: int, lanes: list[int]
) -> None:
    """See `Contender`."""
    mails = ((number, lanes[number % len(lanes)]) for number in range(count))
    ours.fill(parent, place, accounts, size, mails)


def count(parent: Parent, place: str) -> int:
    """Return how many mails there are."""
    with ours._outbox(place) as outbox:
        return sum(1 for _ in outbox.spool.scan())


#: Per transaction.
_HUNDRED = 100


def commits(parent: Parent, place: str, size: int, count: int) -> dict[str, float]:
    """Return durable mails a second, one in a transaction and a hundred, and what they cost raw.

    Raw: rows of the same size, inserted by one transaction and changed by another; nothing else
    is two-phase.  Block by block in turns: the disk of a machine that others use has moods.
    """
    import transaction

    def ours_of(batch: int, first: int) -> None:
        with transaction.manager:
            for number in range(first, first + batch):
                ours._send(outbox, number, 0, size)

    ours.fill(parent, place, [ours._ACCOUNT], size, [])
    seconds = dict.fromkeys(("one", "hundred", "raw_one", "raw_hundred"), 0.0)
    mails = dict.fromkeys(seconds, 0)
    blocks = 10
    number = 0
    with ours._outbox(place) as outbox, outbox.spool.connections.use("measure") as connection:
        connection.execute(
            "CREATE TABLE cpsmail.raw (id bigint PRIMARY KEY, state text, message bytea)"
        )
        connection.execute("ALTER TABLE cpsmail.raw ALTER message SET STORAGE EXTERNAL")
        for batch in (1, _HUNDRED):
            name = "one" if batch == 1 else "hundred"
            times = max(1, count // blocks if batch == 1 else count // blocks // 20)
            for kind in (name, f"raw_{name}") * blocks:
                begun = time.perf_counter()
                for _ in range(times):
                    if kind == name:
                        ours_of(batch, number)
                    else:
                        _raw(connection, batch, number, size)
                    number += batch
                seconds[kind] += time.perf_counter() - begun
                mails[kind] += batch * times
        there = sum(1 for _ in outbox.spool.scan())
        (raw,) = connection.execute("SELECT count(*) FROM cpsmail.raw").fetchone()
    rates = {kind: mails[kind] / seconds[kind] for kind in seconds}
    return {**rates, "missing": number - raw - there}


def _raw(connection: Any, batch: int, first: int, size: int) -> None:
    rows = [(number, ours.message(number, 0, size)) for number in range(first, first + batch)]
    if batch == 1:
        connection.execute("INSERT INTO cpsmail.raw VALUES (%s, 'staged', %s)", rows[0])
    else:
        with (
            connection.cursor() as cursor,
            cursor.copy("COPY cpsmail.raw (id, message) FROM STDIN (FORMAT BINARY)") as copy,
        ):
            copy.set_types(["int8", "bytea"])
            for row in rows:
                copy.write_row(row)
    ids = [number for number, _ in rows]
    connection.execute("UPDATE cpsmail.raw SET state = 'queued' WHERE id = ANY(%s)", [ids])


def claims(
    parent: Parent, place: str, accounts: list[Any], size: int, lanes: list[int], count: int
) -> list[float]:
    """Ask as a worker does that has these lanes."""
    from cpsmailaccess_delivery.envelope import Route, lane_key
    from cpsmailaccess_delivery.pg.engine import MOST_AT_ONCE
    from cpsmailaccess_delivery.pg.feed import Feed

    chosen = (accounts[lane] for lane in lanes)
    keys = [lane_key(Route(each["mailbox"], each["host"], each["port"])) for each in chosen]
    taken = []
    with ours._outbox(place) as outbox:
        feed, connection = Feed(outbox.spool), outbox.spool.connections.connect()
        for _ in range(count):
            begun = time.perf_counter()
            entries = feed.lease(connection, feed.next_of(keys), MOST_AT_ONCE)
            taken.append(time.perf_counter() - begun)
            if len(entries) < MOST_AT_ONCE:
                raise RuntimeError(f"there were {len(entries)} to claim, not {MOST_AT_ONCE}")
        feed.give_back(connection)
        connection.close()
    return taken
