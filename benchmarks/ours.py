"""This project, as shipped: journal, leases, fsync and limits on."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .child import Child, Parent, call
from .mails import message, password_of, recipient_of, sender_of

NAME = "ours"
_KEY = bytes(range(32))


class Contender:
    """One run.  `ports`: of the relays, by lane."""

    def __init__(
        self,
        place: Path,
        *,
        ports: list[int],
        size: int = 4096,
        ca_file: str = "",
        connections: int | None = None,
        **_: Any,
    ) -> None:
        self.place = place
        self._base = {
            "place": str(place / "outbox"),
            "size": size,
            "accounts": [
                {
                    "mailbox": sender_of(lane),
                    "host": "127.0.0.1",
                    "port": port,
                    "security": "tls" if ca_file else "plain",
                    **({"verify": ca_file} if ca_file else {}),
                    **(
                        {"username": f"user{lane}", "password": password_of(lane)}
                        if ca_file
                        else {}
                    ),
                    **({"connections": connections} if connections else {}),
                }
                for lane, port in enumerate(ports)
            ],
        }

    def fill(self, mails: list[tuple[int, int]]) -> None:
        """Queue (number, lane)."""
        call("ours", "fill", mails=mails, **self._base)

    def stock(self, count: int, lanes: int) -> None:
        """Queue very many mails, past the transactions: two processes write the files."""
        call("ours", "fill", mails=[], **self._base)
        halves = [
            Child("ours", "stock", part=part, count=count, lanes=lanes, **self._base)
            for part in (0, 1)
        ]
        for half in halves:
            half.result()

    def start(self) -> float:
        """Start the processor; return when its process began."""
        self._child = Child("ours", "process", **self._base)
        self._child.line()
        return self._child.started

    def commit_slowly(self, count: int, gap: float) -> dict[int, list[float]]:
        """Commit mails from another process; return when, by number: begun, done."""
        times = call("ours", "commit_slowly", count=count, gap=gap, **self._base)
        return {int(number): pair for number, pair in times.items()}

    def finish(self) -> dict[str, Any]:
        """Stop; return CPU, peak memory and what is left."""
        usage = self._child.finish()
        outbox = self.place / "outbox"
        usage["left"] = sum(len(os.listdir(outbox / name)) for name in ("new", "cur"))
        return usage


def _outbox(place: str) -> Any:
    from cpsmailaccess_delivery import Outbox

    return Outbox(place, key=_KEY)


def _send(outbox: Any, number: int, lane: int, size: int) -> None:
    outbox.delivery.send(sender_of(lane), [recipient_of(number)], message(number, lane, size))


def fill(
    parent: Parent, place: str, accounts: list[Any], size: int, mails: Iterable[tuple[int, int]]
) -> None:
    """Make the outbox, its accounts and mails."""
    import transaction

    from cpsmailaccess_delivery import Account

    mails = list(mails)
    with _outbox(place) as outbox:
        with transaction.manager:
            for account in accounts:
                outbox.accounts.put(Account(**account))
        step = max(1, min(128, 64 * 1024 * 1024 // size // 4))
        for start in range(0, len(mails), step):
            with transaction.manager:
                for number, lane in mails[start : start + step]:
                    _send(outbox, number, lane, size)


def stock(
    parent: Parent, place: str, accounts: list[Any], size: int, part: int, count: int, lanes: int
) -> None:
    """Write every other of `count` mails where `publish` puts them."""
    from cpsmailaccess_delivery.envelope import Envelope, Route, format_block, lane_key
    from cpsmailaccess_delivery.interfaces import Entry
    from cpsmailaccess_delivery.spool import names

    now = time.time() - count / 1000
    directory = os.open(os.path.join(place, "new"), os.O_RDONLY)
    routes = [
        Route(account["mailbox"], account["host"], account["port"]) for account in accounts[:lanes]
    ]
    keys = [lane_key(route) for route in routes]
    for number in range(part, count, 2):
        lane = number % lanes
        envelope = Envelope(
            sender=sender_of(lane),
            recipients=(recipient_of(number),),
            route=routes[lane],
            message_id=f"{number}.{lane}@bench",
        )
        entry_id = names.new_id(now + number / 1000, os.urandom(3).hex(), envelope.message_id)
        data = message(number, lane, size).replace(b"Bcc: secret@example.net\n", b"")
        name = names.file_name(Entry(entry_id, keys[lane]))
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        os.write(fd, format_block(envelope) + data)
        os.close(fd)


def process(parent: Parent, place: str, accounts: list[Any], size: int) -> dict[str, Any]:
    """Run the processor until the parent has seen enough."""
    profile = os.environ.get("BENCH_PROFILE")
    with _outbox(place) as outbox:
        processor = outbox.processor()
        if profile:
            _profiled(processor, profile)
        parent.ready()
        processor.start()
        parent.wait()
        usage = parent.usage()
        usage["stopped"] = processor.stop(timeout=5)
    return usage


def _profiled(processor: Any, path: str) -> None:
    import cProfile

    profile, run = cProfile.Profile(), processor.run

    def profiled() -> None:
        try:
            profile.runcall(run)
        finally:
            profile.dump_stats(path)

    processor.run = profiled


def commit_slowly(
    parent: Parent, place: str, accounts: list[Any], size: int, count: int, gap: float
) -> dict[int, Any]:
    """Commit mail after mail, `gap` seconds apart in the mean."""
    with _outbox(place) as outbox:
        return _commit_slowly(outbox, size, count, gap)


def _commit_slowly(outbox: Any, size: int, count: int, gap: float) -> dict[int, Any]:
    import transaction

    times = {}
    chance = random.Random(1)
    for number in range(count):
        time.sleep(gap * (0.5 + chance.random()))
        transaction.begin()
        _send(outbox, number, 0, size)
        begun = time.monotonic()
        transaction.commit()
        times[number] = [begun, time.monotonic()]
    return times


def in_process(
    parent: Parent, place: str, accounts: list[Any], size: int, count: int, gap: float
) -> dict[int, Any]:
    """The same with the processor as a thread of the process that commits."""
    fill(parent, place, accounts, size, [])
    with _outbox(place) as outbox:
        processor = outbox.processor()
        processor.start()
        times = _commit_slowly(outbox, size, count, gap)
        time.sleep(0.5)
        processor.stop(timeout=5)
    return times


def commits(parent: Parent, place: str, size: int, blocks: int, count: int) -> dict[str, Any]:
    """Durable mails per second: raw files, and ours in three manners, block by block in turns."""
    fill(parent, place, [_ACCOUNT], size, [])
    seconds = {"raw": 0.0, "one": 0.0, "batch": 0.0, "threads": 0.0}
    mails = dict.fromkeys(seconds, 0)
    cpu = dict.fromkeys(seconds, 0.0)
    makers = {"raw": _raw, "one": _one, "batch": _batch, "threads": _threads}
    os.makedirs(f"{place}.raw/tmp")
    os.makedirs(f"{place}.raw/new")
    number = 0
    with _outbox(place) as outbox:
        for _ in range(blocks):
            for kind, make in makers.items():
                burst = count * 8 if kind in ("batch", "threads") else count
                cpu_begun, begun = time.process_time(), time.perf_counter()
                make(outbox, f"{place}.raw", number, burst, size)
                seconds[kind] += time.perf_counter() - begun
                cpu[kind] += time.process_time() - cpu_begun
                mails[kind] += burst
                number += burst
        there = sum(1 for _ in outbox.spool.scan())
    rates = {kind: mails[kind] / seconds[kind] for kind in seconds}
    return {
        "rates": rates,
        "cpu_us": {kind: cpu[kind] / mails[kind] * 1e6 for kind in cpu},
        "missing": number - mails["raw"] - there,
    }


_ACCOUNT = {"mailbox": sender_of(0), "host": "127.0.0.1", "port": 25, "security": "plain"}


def _raw(outbox: Any, place: str, first: int, count: int, size: int) -> None:
    new = os.open(place + "/new", os.O_RDONLY)
    for number in range(first, first + count):
        data = message(number, 0, size)
        fd = os.open(f"{place}/tmp/{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(fd, data)
        os.fsync(fd)
        os.close(fd)
        os.rename(f"{place}/tmp/{number}", f"{place}/new/{number}")
        os.fsync(new)
    os.close(new)


def _one(outbox: Any, place: str, first: int, count: int, size: int) -> None:
    import transaction

    for number in range(first, first + count):
        with transaction.manager:
            _send(outbox, number, 0, size)


def _batch(outbox: Any, place: str, first: int, count: int, size: int) -> None:
    import transaction

    for start in range(first, first + count, 128):
        with transaction.manager:
            for number in range(start, min(start + 128, first + count)):
                _send(outbox, number, 0, size)


def _threads(outbox: Any, place: str, first: int, count: int, size: int) -> None:
    threads = [
        threading.Thread(target=_one, args=(outbox, place, first + at, share, size))
        for at, share in _shares(count, 16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _shares(count: int, parts: int) -> list[tuple[int, int]]:
    edges = [count * part // parts for part in range(parts + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(edges)]
