"""The sessions of a lane: how many there are, when one is opened, and when one is closed.

What a session that ends says of its relay opens the lane's circuit, or lets it have fewer.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .connections import Connections
from .errors import VaultError, VaultUnreachable
from .limits import asks_for_less
from .outcome import Trouble, classify
from .password import resolve_secret
from .shared import Shared
from .smtp.events import Failure
from .smtp.explain import explain
from .smtp.machine import WINDOW
from .smtp.session import Session

if TYPE_CHECKING:
    from .lanes import Lane

#: Entries that one session may have before it is worth opening another.
_BACKLOG = 8

#: Seconds that an unused session is kept, for the next mail of the same account.
_IDLE = 10.0

#: Seconds until accounts are asked for again that could not be.
_AGAIN = 2.0


class Sessions:
    """The sessions of one lane, which is their `smtp.session.Source`."""

    def __init__(self, lane: Lane, shared: Shared, connections: Connections) -> None:
        self.careful = False  # learned: one mail at a time in the next session
        self._lane = lane
        self._shared = shared
        self._connections = connections
        self._sessions: set[Session] = set()
        self._quitting: set[Session] = set()  # those that we have told to
        self._proven = False  # one got through: more may be opened beside it
        self._stopping = False
        self._idle_timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def here(self) -> int:
        """Sessions with the lane's relay, not with one that it has left."""
        relay = self._lane.terms.relay
        return sum(session.account.relay == relay for session in self._sessions)

    @property
    def working(self) -> int:
        """Sessions that were not told to end."""
        return len(self._sessions) - len(self._quitting)

    def work(self) -> None:
        """Let them ask for mails; open what is missing."""
        self.wake()
        while self._lane.ready and self._wants_one() and self._open():
            pass

    def wake(self) -> None:
        """Let them ask for mails."""
        for session in list(self._sessions):
            session.wake()

    def stop(self) -> None:
        """Finish what is past the end of data, give back the rest; open none."""
        self._stopping = True
        self._cancel_idle_timer()
        for session in list(self._sessions):
            session.stop()

    def abort(self) -> None:
        """Drop every connection now."""
        self._stopping = True
        for session in list(self._sessions):
            session.abort()

    def quit(self) -> None:
        """Close them when they have finished what is in flight."""
        for session in list(self._sessions):
            self._quitting.add(session)
            session.quit()

    def leave(self) -> None:
        """Close them: finish what is past the end of data, give back the rest."""
        self._proven = False
        for session in list(self._sessions):
            self._quitting.add(session)
            session.stop()

    def give_up_one(self) -> None:
        """Close one when it has finished what is in flight, an idle one if there is."""
        open_ones = [session for session in self._sessions if session not in self._quitting]
        if open_ones:
            session = min(open_ones, key=lambda each: each.in_flight)
            self._quitting.add(session)
            session.quit()

    def longest_silence(self, now: float) -> tuple[float, Session | None]:
        """Return for how long a session has waited for its relay, in seconds, and which.

        `now`: of the loop's clock.  The session that waits longest.
        """
        found = ((session.silence(now), session) for session in self._sessions)
        return max(found, key=lambda pair: pair[0], default=(0.0, None))

    def yield_to_others(self, session: Session, silence: float) -> None:
        """Give up the connection to a silent relay: other lanes have none."""
        reason = f"silent for {silence:.0f} s, while others wait"
        self._lane.circuit.open(Trouble.RELAY, reason)
        self._quitting.add(session)
        session.stop()

    def have_nothing_to_do(self) -> None:
        """Close them soon: at once when others wait, or when nothing will come."""
        ready, loop = self._lane.ready, self._shared.loop
        drained = self._shared.draining and not ready
        if drained or self._connections.is_waited_for(self._lane):
            loop.call_soon(self._idle_over)
        elif self._idle_timer is None and not ready:
            self._idle_timer = loop.call_later(_IDLE, self._idle_over)

    def want_fewer(self, *, close: bool) -> None:
        """The relay has too many of us: open none for a while.

        `close`: some of those that work, too.  Not while it turns away new ones: those that it
        lets in may be the only ones.
        """
        now, limit = self._shared.now(), self._lane.terms.limit
        limit.refused(now, self.working)
        if close:
            for _ in range(self.working - limit.current):
                self.give_up_one()
        self._lane.wake_at(limit.next_step(now))

    def ready(self) -> None:
        """One got through: greeted, encrypted, logged in."""
        if not self._proven:
            self._proven = True
            self._lane.work()

    def closed(self, session: Session, failure: Failure | None) -> None:
        """One is over."""
        lane = self._lane
        self._sessions.discard(session)
        ours = session in self._quitting or self._stopping
        self._quitting.discard(session)
        if self.careful and session.accepted > _BACKLOG:
            self.careful = False
        if failure is not None and not session.accepted and not ours:
            self._judge(session, failure)
        elif failure is None and not session.answered and lane.ready and not ours:
            # Else a relay that greets and hangs up would be asked again at once, for ever.
            lane.circuit.open(Trouble.RELAY, "the relay closes the connection before any mail")
        elif (
            not ours
            and self.working
            and failure is not None
            and asks_for_less(failure.phase, failure.reply, delivered=True)
        ):
            self.want_fewer(close=True)
        if not self._sessions and (lane.circuit.is_open or not lane.ready):
            self._proven = False
        self._connections.give_back(lane, session.account.relay)

    def _judge(self, session: Session, failure: Failure) -> None:
        """A session failed and had delivered nothing."""
        if self.working:  # it wants fewer of us
            self.want_fewer(close=False)
            return
        meaning = classify(failure.phase, failure.reply, failure.error)
        self._lane.circuit.open(meaning.trouble, explain(session.account, failure))

    def _wants_one(self) -> bool:
        count, terms, now = self.here, self._lane.terms, self._shared.now()
        if wait := terms.wait(now):
            self._lane.wake_at(now + wait)
            return False
        if not count:
            return True
        if not self._proven or len(self._lane.ready) <= _BACKLOG * count:
            return False  # many bad logins at once would lock the mailbox
        if self._lane.cramped:
            return False  # it could do nothing
        limit = terms.limit
        if count < limit.allowed(now) and not limit.paused(now):
            return True
        if limit.learned:
            self._lane.wake_at(limit.next_step(now))
        return False

    def _open(self) -> bool:
        """Return whether one is opened: else the account, or the limit of connections, forbids."""
        if not self._connections.spare(self._lane):
            return False
        try:
            account = self._lane.terms.load()  # it says to which relay
            secret = resolve_secret(account)
        except VaultUnreachable as error:
            if self._shared.draining:
                self._lane.circuit.open(Trouble.RELAY, str(error))
            else:  # of no account and no relay: nobody is told, and all go on together
                self._lane.wake_at(self._shared.now() + _AGAIN)
            return False
        except VaultError as error:
            self._lane.circuit.open(Trouble.ACCOUNT, str(error))
            self._lane.wait_for_probe()  # no session is there whose end would wake it
            return False
        if not self._connections.take(self._lane):
            return False
        self._cancel_idle_timer()
        session = Session(
            account,
            secret,
            self._lane,
            helo_name=self._shared.helo_name,
            loop=self._shared.loop,
            window=1 if self.careful else WINDOW,
        )
        self._sessions.add(session)
        session.connect()
        return True

    def _cancel_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _idle_over(self) -> None:
        self._idle_timer = None
        if self._lane.idle:
            self.quit()
