"""Hands events to the subscribers of zope.event, in a thread of its own.

::

    announce --> deque --> thread --> zope.event.subscribers, one after the other

So a subscriber that is slow, hangs or raises delays no mail and undoes no commit.  Under
zope.component there is always a subscriber, so that what `announce` costs counts.  The thread
begins with the first event that somebody subscribes to.  A forked child starts afresh.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Final

import transaction
import zope.event
from transaction.interfaces import NoTransaction

from .envelope import Envelope
from .events import EVENTS, AccountEvent, MailEvent
from .interfaces import Outcome, State

log = logging.getLogger(__name__)

#: Events that wait for subscribers at most; those over it are dropped, not the mails' delivery.
LIMIT: Final = 20_000

#: Seconds in which events gather, so that the thread is not woken for each.
_GATHER: Final = 0.005

#: Seconds that `flush` waits for subscribers.
_PATIENCE: Final = 5.0

_UNKNOWN: Final = Outcome(State.QUEUED)

_announcers: weakref.WeakSet[Announcer] = weakref.WeakSet()


class Announcer:
    """See the module.  Thread-safe.  `limit`: events that wait at most."""

    _thread: threading.Thread | None

    def __init__(self, *, limit: int = LIMIT) -> None:
        self._limit = limit
        self._begin()
        _announcers.add(self)

    def _begin(self) -> None:
        self._pending: deque[MailEvent | AccountEvent] = deque()
        self._waiting: deque[threading.Event] = deque()
        self._dropped = 0
        self._signalled = False  # the thread will look at what is pending
        self._closed = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._thread = None

    def __repr__(self) -> str:
        return f"<Announcer {len(self._pending)} waiting>"

    def queued(self, at: float, entry_id: str, envelope: Envelope) -> None:
        """Tell that a mail was committed."""
        if zope.event.subscribers:
            self.outcomes(at, entry_id, envelope, dict.fromkeys(envelope.recipients, _UNKNOWN))

    def outcomes(
        self, at: float, entry_id: str, envelope: Envelope, outcomes: Mapping[str, Outcome]
    ) -> None:
        """Tell what became of recipients of a mail: an event for each state that occurs."""
        if not zope.event.subscribers:
            return
        route = str(envelope.route)
        for state in dict.fromkeys(outcome.state for outcome in outcomes.values()):
            event = EVENTS.get(state)
            if event is not None:
                those = {r: outcome for r, outcome in outcomes.items() if outcome.state is state}
                self.announce(
                    event(at, entry_id, envelope.message_id, route, envelope.sender, those)
                )

    def announce(self, event: MailEvent | AccountEvent) -> None:
        """Tell of an event, soon.  Never raises, never blocks."""
        if not zope.event.subscribers:
            return
        if len(self._pending) >= self._limit:
            self._dropped += 1
            return
        self._pending.append(event)
        if not self._signalled:
            self._signal()

    def flush(self, timeout: float = _PATIENCE) -> bool:
        """Wait until what was announced is told; return whether it is.

        In a subscriber it does not wait: that would be for itself.
        """
        with self._lock:
            thread = self._thread
            if thread is None:
                return True
            if thread is threading.current_thread():
                return False
            done = threading.Event()
            self._waiting.append(done)
        self._hurry.set()
        self._wake.set()
        return done.wait(timeout)

    def close(self) -> None:
        """Tell what is left, as far as subscribers let us, and end.  Twice is fine."""
        told = self.flush()
        if not told:
            log.warning("subscribers of zope.event are slow: %d events left", len(self._pending))
        with self._lock:
            thread, self._thread = self._thread, None
            self._closed = True
        if thread is not None:
            atexit.unregister(self.flush)
            self._hurry.set()
            self._wake.set()
            if told and thread is not threading.current_thread():
                thread.join(_PATIENCE)

    def _signal(self) -> None:
        with self._lock:
            if self._closed:
                self._pending.clear()
                return
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="cpsmail-events", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads, or the process ends
                    log.error("events cannot be told: %s", error)
                    self._pending.clear()
                    return
                self._thread = thread
                atexit.register(self.flush)
            self._signalled = True
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._hurry.wait(_GATHER)
            self._hurry.clear()
            self._wake.clear()
            self._signalled = False  # from here on, who announces wakes us again
            waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
            for _ in range(len(self._pending)):
                _tell(self._pending.popleft())
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                log.error(
                    "%d events were not told: subscribers of zope.event are slower than the mail;"
                    " the journal has them all",
                    dropped,
                )
            for done in waiting:
                done.set()
            if self._closed:
                return


def _abort() -> None:
    """What a subscriber has not committed must not be committed by the next one.

    To abort a transaction that was never begun costs more than all the rest, so we look first;
    where the look fails, one is aborted.
    """
    if getattr(transaction.manager.manager, "_txn", _UNKNOWN) is None:
        return
    try:
        transaction.abort()
    except NoTransaction:
        pass  # in the explicit mode
    except Exception:
        log.exception("the transaction of a subscriber cannot be aborted")


def _tell(event: MailEvent | AccountEvent) -> None:
    for subscriber in list(zope.event.subscribers):  # a copy: a subscriber may change it
        try:
            subscriber(event)
        except BaseException:  # the next one and the next event must be told, whatever this did
            which = event.id if isinstance(event, MailEvent) else event.mailbox
            log.exception("%s: a subscriber failed on %s", which, type(event).__name__)
        _abort()


def _after_fork_in_child() -> None:
    for announcer in list(_announcers):
        announcer._begin()


os.register_at_fork(after_in_child=_after_fork_in_child)
