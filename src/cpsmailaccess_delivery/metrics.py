"""Prometheus metrics of a processor, through the official client library.

Asked for only: the library is an extra (``cpsmailaccess_delivery[metrics]``).  The
loop counts in plain integers; everything else is worked out in the thread of the scrape, from
copies that are made in one step.  Nobody waits for a lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from .address import relay_name
from .errors import InvalidSettings, SpoolError
from .interfaces import State
from .summary import TIME_BOUNDS

if TYPE_CHECKING:
    from .processor import QueueProcessorThread
    from .scheduler import Scheduler

#: Lanes that have a label of their own, those with the oldest mails; the others share one.
MOST_LANES: Final = 100
OTHERS: Final = "(others)"

#: What lanes do not know, mails that wait for a person, is counted in the spool: so many
#: seconds apart at least, and so many times as long as it took.
_COUNT_EVERY: Final = 30.0
_COUNT_SHARE: Final = 50.0

_COUNTED: Final = (State.ACCEPTED, State.DEFERRED, State.REFUSED, State.UNCLEAR, State.HELD)
_FOR_A_PERSON: Final = (State.HELD, State.REFUSED)


class Collector:
    """Reads a processor when it is asked: a `prometheus_client` collector."""

    def __init__(self, processor: QueueProcessorThread) -> None:
        self._processor = processor
        self._counts: Mapping[State, int] = {}
        self._count_again = 0.0

    def collect(self) -> Iterator[Any]:
        """Yield every family of metrics; only the totals while no processor runs."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        summary = self._processor.summary
        totals = CounterMetricFamily(
            "cpsmail_mails", "Attempts by what became of the mail", labels=["state"]
        )
        for state in _COUNTED:
            totals.add_metric([state.value], getattr(summary, state.value))
        yield totals
        scheduler = self._processor.scheduler
        beat = GaugeMetricFamily(
            "cpsmail_heartbeat_timestamp_seconds",
            "When the loop of the processor ran last; 0: it does not run",
            value=scheduler.heartbeat if scheduler else 0.0,
        )
        yield beat
        if scheduler is None:
            return
        yield from self._lanes(scheduler)
        yield _histogram(scheduler)

    def _lanes(self, scheduler: Scheduler) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        now = scheduler.shared.now()
        oldest: dict[str, float] = {}
        counts = dict.fromkeys((State.QUEUED, State.DEFERRED, State.UNCLEAR), 0)
        conditions = {"paused": 0, "no_connection": scheduler.lanes_waiting}
        sessions = 0
        names = {}
        for lane in scheduler.lanes:
            route = lane.name
            sessions += len(lane.sessions)
            if not lane.is_ours:  # its worker counts it
                continue
            names[lane.key] = route
            conditions["paused"] += lane.circuit.is_open
            for entry in set(lane.entries()):  # scan and watch may both have told of it
                counts[entry.state] = counts.get(entry.state, 0) + 1
                since = entry.due or entry.staged_at or now
                oldest[route] = min(oldest.get(route, now), since)
            oldest.setdefault(route, now)
        for entry in set(scheduler.entries_later()):
            counts[entry.state] = counts.get(entry.state, 0) + 1
            since = entry.due or entry.staged_at or now
            if since < now and entry.lane in names:
                route = names[entry.lane]
                oldest[route] = min(oldest[route], since)
        counted = self._counted(scheduler)
        if counted or scheduler.totals is None:  # else what we have of all says little
            counts.update(counted)
            yield _by_label("cpsmail_queue_mails", "Mails in the spool", "state", counts)
        ages = {route: max(now - since, 0.0) for route, since in oldest.items()}
        yield _by_label(
            "cpsmail_oldest_due_seconds",
            "For how long the oldest mail of a lane has been due; 0: none is",
            "lane",
            bounded(ages),
        )
        yield _by_label("cpsmail_lanes_waiting", "Lanes that wait", "for", conditions)
        yield GaugeMetricFamily("cpsmail_lanes", "Lanes that had a mail", value=len(names))
        yield GaugeMetricFamily("cpsmail_sessions", "Open SMTP sessions", value=sessions)

    def _counted(self, scheduler: Scheduler) -> Mapping[State, int]:
        """Return how many mails there are of which lanes know nothing, by state."""
        begun = time.monotonic()
        if begun >= self._count_again:
            try:
                self._counts = (scheduler.totals or partial(_for_a_person, scheduler))()
            except SpoolError:
                self._counts = {}  # no number is better than a wrong one
            now = time.monotonic()
            self._count_again = now + max(_COUNT_EVERY, _COUNT_SHARE * (now - begun))
        return self._counts


def _for_a_person(scheduler: Scheduler) -> dict[State, int]:
    counts = dict.fromkeys(_FOR_A_PERSON, 0)
    for entry in scheduler.shared.spool.scan():
        if entry.state in counts and scheduler.shared.share.owns(entry.lane):
            counts[entry.state] += 1
    return counts


def bounded(ages: dict[str, float], most: int = MOST_LANES) -> dict[str, float]:
    """Return the `most` greatest under their names, the greatest of the others under `OTHERS`."""
    if len(ages) <= most:
        return ages
    order = sorted(ages, key=ages.__getitem__, reverse=True)
    return {name: ages[name] for name in order[:most]} | {OTHERS: ages[order[most]]}


def require_client() -> Any:
    """Return the client library.  Raises `InvalidSettings` where it is not installed."""
    try:
        import prometheus_client
    except ImportError:
        raise InvalidSettings(
            "metrics_port: needs the package prometheus_client:"
            " pip install 'cpsmailaccess_delivery[metrics]'"
        ) from None
    return prometheus_client


def serve(processor: QueueProcessorThread, *, address: str, port: int) -> Callable[[], None]:
    """Serve the metrics of a processor over HTTP; return what ends it.

    Raises OSError when nothing can listen there, and `InvalidSettings` without the library.
    """
    client = require_client()
    registry = client.CollectorRegistry()
    registry.register(Collector(processor))
    try:
        server, thread = client.start_http_server(port, address, registry)
    except OSError as error:
        raise OSError(
            f"metrics: cannot listen at {relay_name(address, port)}: {error.strerror}: choose"
            " another --metrics-port (worker i takes this one + i) or --metrics-address"
        ) from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close


def _by_label(name: str, text: str, label: str, values: Any) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([str(key)], value)
    return family


def _histogram(scheduler: Scheduler) -> Any:
    from prometheus_client.core import HistogramMetricFamily

    times = scheduler.times
    counts, total = list(times.counts), times.total
    buckets, so_far = [], 0
    for bound, count in zip([*map(str, TIME_BOUNDS), "+Inf"], counts, strict=True):
        so_far += count
        buckets.append((bound, so_far))
    return HistogramMetricFamily(
        "cpsmail_attempt_seconds",
        "From the claim of a mail until its outcome",
        buckets=buckets,
        sum_value=total,
    )
