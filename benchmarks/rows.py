"""The rows of the table: what one turn of each contender does, and what is expected of it."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import ours, postfix, postgresql, zope_sendmail
from .child import call
from .sink import Sink

CONTENDERS = {"ours": ours, "zope.sendmail": zope_sendmail, "Postfix": postfix}
ALL = tuple(CONTENDERS)
OURS = ("ours",)

#: One turn: the values that it measured, and what else is known of it.
Result = dict[str, Any]


@dataclass
class Bench:
    """What all rows share.  `limit`: seconds after which a turn is broken off."""

    directory: Path
    scale: float = 1.0
    limit: float = 30.0
    certificates: dict[str, str] = field(default_factory=dict)

    def number(self, full: int, least: int = 20) -> int:
        return max(least, round(full * self.scale))

    def place(self) -> Path:
        """Return a fresh directory, in a block group of its own: see docs/performance.rst."""
        path = Path(tempfile.mkdtemp(dir=self.directory))
        path.chmod(0o755)  # Postfix is another user
        return path

    def tls(self) -> dict[str, str]:
        if not self.certificates:
            import trustme

            ca, place = trustme.CA(), self.place()
            ca.cert_pem.write_to_path(place / "ca.pem")
            ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
                place / "server.pem"
            )
            self.certificates = {"ca": f"{place}/ca.pem", "server": f"{place}/server.pem"}
        return self.certificates


@dataclass(frozen=True)
class Target:
    """What the issue asks for: `measure` of the medians, by (contender, value)."""

    text: str
    measure: Callable[[Callable[[str, str], float]], float]
    limit: float
    at_least: bool = True

    def met(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit


@dataclass(frozen=True)
class Row:
    """`turn`: one run of one contender.  `value`: the name of the value in the table."""

    key: str
    title: str
    unit: str
    turn: Callable[[Bench, str], Result]
    contenders: Sequence[str] = ALL
    targets: Sequence[Target] = ()
    value: str = "value"
    more_is_better: bool = True
    once: bool = False  # too much work for every round


# Draining


def drain(
    bench: Bench,
    who: str,
    *,
    mails: int,
    lanes: int = 1,
    size: int = 4096,
    latency: float = 0.0,
    chunking: bool = False,
    tls: bool = False,
    silent: Sequence[int] = (),
    connections: int | None = None,
    unused: Sequence[int] = (),
    limit: float | None = None,
) -> Result:
    """Queue mails, start the contender, wait until the relays have what they can get.

    `unused`: lanes without mails.
    """
    certificates = bench.tls() if tls else {}
    batch = [(number, number % lanes) for number in range(mails) if number % lanes not in unused]
    possible = sum(lane not in silent for _, lane in batch)
    with Sink(
        lanes=lanes,
        size=size,
        latency=latency,
        chunking=chunking,
        login=tls,
        certificate=certificates.get("server", ""),
        silent=list(silent),
    ) as sink:
        contender = CONTENDERS[who].Contender(
            bench.place(),
            ports=sink.ports,
            size=size,
            ca_file=certificates.get("ca", ""),
            connections=connections,
        )
        contender.fill(batch)
        started = contender.start()
        finished = sink.wait(possible, limit or bench.limit)
        usage = contender.finish()
        report = sink.report()
    return _drained(report, usage, started, len(batch), possible, finished)


def _drained(
    report: Result, usage: Result, started: float, queued: int, possible: int, finished: bool
) -> Result:
    unique = report["unique"]
    seconds = max(report["last_mail"] - report["first_connection"], 1e-9)
    if not finished and unique:  # extrapolated
        seconds *= possible / unique
    return {
        "value": possible / seconds if unique else 0.0,
        "seconds": seconds,
        "cpu_us": usage["cpu"] / max(unique, 1) * 1e6,
        "rss": usage.get("rss"),
        "first": report["first_mail"] - started,
        "capped": not finished,
        "unique": unique,
        "missing": max(queued - unique - usage["left"], 0),
        **{key: report[key] for key in ("duplicate", "misrouted", "leaked", "damaged")},
        "left": usage["left"],
        "sessions": report["sessions"],
        "most_open": report["most_open"],
        "sink_cpu_us": report["cpu"] / max(unique, 1) * 1e6,
    }


def _plain(bench: Bench, who: str) -> Result:
    return drain(bench, who, mails=bench.number(5000))


def _chunks(bench: Bench, who: str) -> Result:
    return drain(bench, who, mails=bench.number(5000), chunking=True)


def _tls(bench: Bench, who: str) -> Result:
    return drain(bench, who, mails=bench.number(5000), tls=True)


def _relays(bench: Bench, who: str) -> Result:
    return drain(bench, who, mails=bench.number(5000, 200), lanes=100, latency=0.005)


_SILENT = (13, 57)


def _silent(bench: Bench, who: str) -> Result:
    """The 98 lanes alone, then the 98 beside two silent ones."""
    same = {"mails": bench.number(5000, 200), "lanes": 100, "latency": 0.005}
    alone = drain(bench, who, **same, unused=_SILENT)
    beside = drain(bench, who, **same, silent=_SILENT)
    return {
        **beside,
        "value": beside["seconds"],
        "ratio": beside["seconds"] / alone["seconds"],
        "alone": alone["seconds"],
        "capped": alone["capped"] or beside["capped"],
    }


def _latency(bench: Bench, who: str, *, chunking: bool) -> Result:
    mails, delay = bench.number(100), 0.05
    result = drain(bench, who, mails=mails, latency=delay, connections=1, chunking=chunking)
    return {**result, "value": result["seconds"] / delay / mails}


# From the commit to the relay


def _idle(bench: Bench, who: str) -> Result:
    slow = who == "zope.sendmail"
    count = bench.number(40, 10) if slow else bench.number(300)
    gap = 0.4 if slow else 0.05
    with Sink() as sink:
        if who == "ours in-process":
            contender = ours.Contender(bench.place(), ports=sink.ports)
            times = call("ours", "in_process", count=count, gap=gap, **contender._base)
            times = {int(number): pair for number, pair in times.items()}
            sink.wait(count, 10)
        else:
            contender = CONTENDERS[who].Contender(bench.place(), ports=sink.ports)
            if who != "Postfix":
                contender.fill([])
            contender.start()
            times = contender.commit_slowly(count, gap)
            sink.wait(count, 10)
            contender.finish()
        report = sink.report(times=True)
    arrived = {int(number): when for number, when in report["times"].items()}
    after = sorted(arrived[n] - done for n, (_, done) in times.items() if n in arrived)
    whole = sorted(arrived[n] - begun for n, (begun, _) in times.items() if n in arrived)
    commits = sorted(done - begun for begun, done in times.values())
    return {
        "value": _percentile(after, 50) * 1e3,
        "p99": _percentile(after, 99) * 1e3,
        "whole_p50": _percentile(whole, 50) * 1e3,
        "whole_p99": _percentile(whole, 99) * 1e3,
        "commit_p50": _percentile(commits, 50) * 1e3,
        "unique": len(arrived),
        "missing": count - len(arrived),
        **{key: report[key] for key in ("duplicate", "misrouted", "leaked", "damaged")},
    }


def _percentile(ordered: Sequence[float], percent: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


# Commits


def _commits(bench: Bench, who: str) -> Result:
    place = bench.place()
    if who == "Postfix":
        contender = postfix.Contender(place, ports=[9])
        contender.start_without_manager()
        rate = contender.commit_quickly(bench.number(1000))
        left = contender.finish()["left"]
        return {"value": rate, "missing": bench.number(1000) - left}
    blocks = 10 if bench.scale > 0.3 else 3
    result = call(
        "ours",
        "commits",
        place=str(place / "outbox"),
        size=4096,
        blocks=blocks,
        count=bench.number(2000, 60) // blocks,
    )
    rates = result["rates"]
    return {
        "value": rates["one"],
        **rates,
        "of_raw": rates["one"] / rates["raw"],
        "by_batch": rates["batch"] / rates["one"],
        "by_threads": rates["threads"] / rates["one"],
        "cpu_us": result["cpu_us"]["one"],
        "cpu": result["cpu_us"],
        "missing": result["missing"],
    }


# Size


def _million(bench: Bench, who: str) -> Result:
    count, lanes, patience = bench.number(1_000_000, 1000), 100, 120
    with _roomy_place(bench, count * 8192) as directory, Sink(lanes=lanes, size=1024) as sink:
        contender = ours.Contender(Path(directory), ports=sink.ports, size=1024)
        contender.stock(count, lanes)
        started = contender.start()
        begun = sink.wait(1, patience)
        sink.wait(min(10_000, count // 2), 30)
        usage = contender.finish()
        report = sink.report()
    result = _drained(report, usage, started, count, count, True)
    return {
        **result,
        "value": result["first"] if begun else patience,
        "capped": not begun,
        "mib": usage["rss"] / 2**20,
    }


def _roomy_place(bench: Bench, size: int) -> tempfile.TemporaryDirectory[str]:
    """Return a directory in memory if it is large enough: to remove a million files takes long."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > size
    return tempfile.TemporaryDirectory(dir=memory if roomy else bench.directory)


def _large(bench: Bench, who: str) -> Result:
    result = drain(bench, who, mails=bench.number(5000), size=1024 * 1024, limit=300)
    return {**result, "value": result["rss"] / 2**20, "rate": result["seconds"]}


# PostgreSQL


def _pg_commit(bench: Bench, who: str) -> Result:
    with postgresql.database(bench.place()) as url:
        rates = call("postgresql", "commits", place=url, size=4096, count=bench.number(1000, 100))
    return {
        "value": rates["one"],
        **rates,
        "of_raw": rates["one"] / rates["raw_one"],
        "hundred_of_raw": rates["hundred"] / rates["raw_hundred"],
    }


def _pg_drain(bench: Bench, *, lanes: int, mails: int = 5000) -> Result:
    mails = bench.number(mails, lanes)
    with (
        postgresql.database(bench.place()) as url,
        Sink(lanes=lanes, size=4096) as sink,
    ):
        contender = postgresql.Contender(url, ports=sink.ports)
        contender.fill_evenly(mails, list(range(lanes)))
        started = contender.start()
        finished = sink.wait(mails, bench.limit)
        usage = contender.finish()
        return _drained(sink.report(), usage, started, mails, mails, finished)


def _pg_lanes(bench: Bench, who: str) -> Result:
    """Twenty mails a lane: with few the start of workers and lanes is all that there is."""
    few, many = (_pg_drain(bench, lanes=lanes, mails=10_000) for lanes in (20, 500))
    return {**many, "ratio": many["value"] / few["value"], "few": few["value"]}


def _pg_claim(bench: Bench, who: str) -> Result:
    """Ten lanes that nobody asks for, and twenty with what is claimed."""
    dead, live, claims = 10, 20, bench.number(100, 5)
    waiting = bench.number(100_000, 1000)
    with postgresql.database(bench.place()) as url:
        contender = postgresql.Contender(url, ports=[9] * (dead + live), size=1024)
        contender.fill_evenly(waiting, list(range(dead)))
        contender.fill_evenly(claims * 60, list(range(dead, dead + live)))  # none runs dry
        times = sorted(contender.claims(list(range(dead, dead + live)), claims))
    return {"value": _percentile(times, 50) * 1e3, "p99": _percentile(times, 99) * 1e3}


def _pg_killed(bench: Bench, who: str) -> Result:
    """Kill the worker that has the only lane, while the other looks for work."""
    mails = 400
    with (
        postgresql.database(bench.place(), lease=postgresql.LEASE) as url,
        Sink(latency=0.02) as sink,
    ):
        contender = postgresql.Contender(url, ports=sink.ports, connections=1)
        contender.fill([(number, 0) for number in range(mails)])
        started = contender.start(1)
        begun = sink.wait(1, bench.limit)
        contender.start(1)
        killed = contender.kill()
        finished = sink.wait(mails, bench.limit + postgresql.LEASE)
        usage = contender.finish()
        report = sink.report(times=True)
    after = [when for when in report["times"].values() if when > killed + postgresql.LEASE / 2]
    result = _drained(report, usage, started, mails, mails, begun and finished)
    explained = min(result["duplicate"], 8)  # of the session that was cut: what it had on its way
    return {
        **result,
        "value": min(after, default=math.nan) - killed,
        "duplicate": result["duplicate"] - explained,
        "again": explained,
    }


def _rate(who: str) -> Callable[[Callable[[str, str], float]], float]:
    return lambda of: of("ours", "value") / (of(who, "value") or float("nan"))


def _own(value: str) -> Callable[[Callable[[str, str], float]], float]:
    return lambda of: of("ours", value)


ROWS = (
    Row(
        "plain",
        "drain 5,000 x 4 KiB, one idle relay, plain",
        "mails/s",
        _plain,
        targets=(
            Target("x zope.sendmail", _rate("zope.sendmail"), 8),
            Target("x Postfix", _rate("Postfix"), 6),
        ),
    ),
    Row(
        "chunks",
        "the same, from a relay that offers CHUNKING",
        "mails/s",
        _chunks,
    ),
    Row(
        "tls",
        "drain over TLS with login",
        "mails/s",
        _tls,
        targets=(Target("x zope.sendmail", _rate("zope.sendmail"), 15),),
    ),
    Row(
        "relays",
        "5,000 over 100 relays, 5 ms per reply",
        "mails/s",
        _relays,
        targets=(
            Target("x Postfix", _rate("Postfix"), 8),
            Target("x zope.sendmail", _rate("zope.sendmail"), 250),
        ),
    ),
    Row(
        "silent",
        "the same, 2 of the 100 silent: until the other 98 are done",
        "s",
        _silent,
        targets=(Target("x without them", _own("ratio"), 1.15, at_least=False),),
        more_is_better=False,
    ),
    Row(
        "pipelining",
        "one relay, 50 ms per reply, one connection, PIPELINING",
        "round trips/mail",
        lambda bench, who: _latency(bench, who, chunking=False),
        targets=(Target("round trips", _own("value"), 1.2, at_least=False),),
        more_is_better=False,
    ),
    Row(
        "chunking",
        "the same with CHUNKING",
        "round trips/mail",
        lambda bench, who: _latency(bench, who, chunking=True),
        contenders=OURS,
        targets=(Target("round trips", _own("value"), 0.5, at_least=False),),
        more_is_better=False,
    ),
    Row(
        "idle",
        "idle queue, commit to acceptance, p50 (p99)",
        "ms",
        _idle,
        contenders=("ours", "ours in-process", "zope.sendmail", "Postfix"),
        targets=(
            Target("ms p50", _own("value"), 3, at_least=False),
            Target("ms p99", _own("p99"), 15, at_least=False),
        ),
        more_is_better=False,
    ),
    Row(
        "commit",
        "durable commit, one mail per transaction",
        "mails/s",
        _commits,
        contenders=("ours", "Postfix"),
        targets=(
            Target("of the raw limit", _own("of_raw"), 0.85),
            Target("x with 128 per transaction", _own("by_batch"), 4),
            Target("x with 16 threads", _own("by_threads"), 2.5),
        ),
    ),
    Row(
        "large",
        "5,000 mails of 1 MiB: memory of the processor",
        "MiB",
        _large,
        contenders=OURS,
        targets=(Target("MiB", _own("value"), 150, at_least=False),),
        more_is_better=False,
        once=True,
    ),
    Row(
        "million",
        "start with 1,000,000 queued mails: first delivery",
        "s",
        _million,
        contenders=OURS,
        targets=(
            Target("s", _own("value"), 5, at_least=False),
            Target("MiB", _own("mib"), 400, at_least=False),
        ),
        more_is_better=False,
        once=True,
    ),
    Row(
        "pg-commit",
        "PostgreSQL: commit, one mail per transaction",
        "mails/s",
        _pg_commit,
        contenders=OURS,
        targets=(
            Target("mails/s", _own("value"), 400),
            Target("mails/s with 100 per transaction", _own("hundred"), 5000),
        ),
    ),
    Row(
        "pg-drain",
        "PostgreSQL: drain 5,000 x 4 KiB, 20 lanes, 2 workers",
        "mails/s",
        lambda bench, who: _pg_drain(bench, lanes=20),
        contenders=OURS,
        targets=(Target("mails/s", _own("value"), 1500),),
    ),
    Row(
        "pg-lanes",
        "PostgreSQL: drain 10,000 x 4 KiB over 500 lanes, 2 workers",
        "mails/s",
        _pg_lanes,
        contenders=OURS,
        targets=(Target("of the rate with 20", _own("ratio"), 0.7),),
    ),
    Row(
        "pg-claim",
        "PostgreSQL: claim 50 mails of 20 lanes beside 100,000 in dead lanes, p50 (p99)",
        "ms",
        _pg_claim,
        contenders=OURS,
        targets=(Target("ms", _own("value"), 10, at_least=False),),
        more_is_better=False,
        once=True,
    ),
    Row(
        "pg-killed",
        f"PostgreSQL: a worker is killed, lease {postgresql.LEASE} s: until another sends",
        "s",
        _pg_killed,
        contenders=OURS,
        targets=(Target("s", _own("value"), postgresql.LEASE + 1, at_least=False),),
        more_is_better=False,
    ),
)
