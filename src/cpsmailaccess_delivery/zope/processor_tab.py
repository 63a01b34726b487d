"""The tab *Processor*: whether mails are delivered, how many, and what is in the way."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any, ClassVar, Final

from AccessControl.class_init import InitializeClass
from AccessControl.SecurityInfo import ClassSecurityInfo

from ..spool.presence import Deliverer
from ..wording import age, clean, moment, upcoming
from . import processors
from .chart import HEIGHT, KINDS, WIDTH, chart
from .page import action, page, redirect, render, template, text
from .queue_view import STATES
from .security import MANAGE_QUEUE

_PROCESSOR: Final = template("processor")

#: What the chart may span: steps, seconds of each, and what a step is called.
_SPANS: Final = {"hour": (60, 60, "minute"), "day": (48, 1800, "half hour")}

#: Minutes whose events are counted.
_MINUTES: Final = (1, 10, 60)

#: What is counted of them.
_COUNTED: Final = ("accepted", "deferred", "refused", "unclear")

#: Seconds without a sign of life after which a processor is said to hang.
_SILENCE: Final = 30.0

#: Lanes that are shown.
_MOST_LANES: Final = 20


class ProcessorTab:
    """Mixin of `mail_accounts.MailAccounts`."""

    security = ClassSecurityInfo()

    manage_options: ClassVar[tuple[dict[str, str], ...]] = (
        {"label": "Processor", "action": "manage_processor"},
    )

    @security.protected(MANAGE_QUEUE)
    @page
    def manage_processor(self: Any, REQUEST: Any) -> str:
        """Show who delivers, how much, and what is in the way."""
        outbox = self._outbox()
        now = outbox.clock()
        span = text(REQUEST, "span") if text(REQUEST, "span") in _SPANS else "hour"
        hour = outbox.journal.series(now - 3600, 60)
        counts = outbox.queue.counts()
        notes = sorted(outbox.spool.lane_notes().values(), key=lambda note: note.since)
        return render(
            _PROCESSOR,
            self,
            REQUEST,
            here=_here(outbox, now),
            others=[
                {"name": _name(each), "since": age(now - each.since), "when": moment(each.since)}
                for each in outbox.presence.deliverers()
                if not each.here
            ],
            states=[(str(state), counts.states.get(state, 0)) for state in STATES],
            oldest=age(now - counts.oldest) if counts.oldest else "",
            oldest_when=moment(counts.oldest),
            counted=_COUNTED,
            throughput=_throughput(hour),
            span=span,
            spans=list(_SPANS),
            chart=_chart(outbox, hour, span, now),
            kinds=KINDS,
            width=WIDTH,
            height=HEIGHT,
            journal_trouble=clean(outbox.journal.trouble),
            lanes=[
                {
                    "route": clean(note.route),
                    "reason": clean(note.reason),
                    "since": age(now - note.since),
                    "next": upcoming(note.until, now),
                }
                for note in notes[:_MOST_LANES]
            ],
            more_lanes=max(0, len(notes) - _MOST_LANES),
            message_type="warning" if text(REQUEST, "failed") else "success",
        )

    @security.protected(MANAGE_QUEUE)
    @action
    def manage_startProcessor(self: Any, REQUEST: Any) -> str:
        """Start the processor of this process."""
        started = processors.start(self._outbox())
        return self._to_processor(REQUEST, "Started." if started else "It runs already.")

    @security.protected(MANAGE_QUEUE)
    @action
    def manage_stopProcessor(self: Any, REQUEST: Any) -> str:
        """Stop the processor of this process, until it is started again, or Zope is."""
        if processors.stop(self._outbox()):
            return self._to_processor(REQUEST, "Stopped: what is in the queue waits.")
        return self._to_processor(REQUEST, _BUSY, failed="1")

    @security.protected(MANAGE_QUEUE)
    @action
    def manage_restartProcessor(self: Any, REQUEST: Any) -> str:
        """Stop the processor of this process and start another."""
        if processors.restart(self._outbox()):
            return self._to_processor(REQUEST, "Started anew.")
        return self._to_processor(REQUEST, _BUSY, failed="1")

    def _to_processor(self: Any, request: Any, message: str, **query: str) -> str:
        return redirect(request, f"{self.absolute_url()}/manage_processor", message, **query)


InitializeClass(ProcessorTab)

_BUSY: Final = "It was told to stop and has not ended yet: look again in a moment."


def _here(outbox: Any, now: float) -> dict[str, Any]:
    """Return what is known of the processor of this process."""
    found = processors.find(outbox)
    if found is None:
        return {"state": "none", "lanes": []}
    _, processor = found
    scheduler = processor.scheduler
    if not processor.is_alive():
        return {"state": "stopped", "lanes": []}
    if scheduler is None:
        return {"state": "starting", "lanes": []}
    silence = now - scheduler.heartbeat
    lanes = [lane for lane in scheduler.lanes if lane.sessions or lane.in_flight]
    lanes.sort(key=lambda lane: -len(lane.sessions))
    return {
        "state": "running" if silence < _SILENCE else "hangs",
        "silence": age(silence),
        "sessions": sum(len(lane.sessions) for lane in lanes),
        "lanes": [
            {
                "route": clean(lane.route),
                "sessions": len(lane.sessions),
                "in_flight": lane.in_flight,
                "ready": len(lane.ready),
            }
            for lane in lanes[:_MOST_LANES]
        ],
        "more_lanes": max(0, len(lanes) - _MOST_LANES),
    }


def _throughput(hour: list[tuple[int, str, int]]) -> list[tuple[str, list[int]]]:
    """Return for each number of minutes how many events there were of each kind."""
    rows = []
    for minutes in _MINUTES:
        counts: Counter[str] = Counter()
        for index, kind, number in hour:
            if index >= 60 - minutes:
                counts[kind] += number
        words = "last minute" if minutes == 1 else f"last {minutes} minutes"
        rows.append((words, [counts[kind] for kind in _COUNTED]))
    return rows


def _chart(outbox: Any, hour: list[tuple[int, str, int]], span: str, now: float) -> Any:
    steps, seconds, unit = _SPANS[span]
    since = now - steps * seconds
    series = hour if span == "hour" else outbox.journal.series(since, seconds)

    def label(index: int) -> str:
        return time.strftime("%H:%M", time.localtime(since + index * seconds))

    return chart(series, steps, label, unit)


def _name(deliverer: Deliverer) -> str:
    return f"{deliverer.pid} on {deliverer.host}" if deliverer.host else str(deliverer.pid)
