"""A lane: the entries that share an account, and the sessions that carry them.

A lane decides how many sessions are open, hands them mails, and records what became of
each.  Whatever goes wrong with its relay or account makes this lane wait, and no other::

    ready --next_mail--> in flight --mail_done--> settled
      ^                     |
      +----mail_unsent------+

It runs in the processor's event loop; nothing here blocks but short file operations.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .account import Account
from .address import relay_name
from .attempt import (
    Attempt,
    account_trouble,
    outcomes_of,
    relayed_of,
    settlement_of,
    waiting_of,
    were_too_many,
)
from .circuit import Circuit
from .envelope import Route, lane_key
from .errors import VaultError
from .interfaces import Entry, LaneNote, Outcome, Settlement, State
from .journal import Event
from .limits import SessionLimit, TokenBucket, asks_for_less, mails_per_minute
from .outcome import Trouble, classify
from .password import resolve_secret
from .ready import Ready
from .smtp.events import Failure, Result
from .smtp.explain import explain
from .smtp.machine import WINDOW
from .smtp.session import Session
from .telling import tell_circuit

if TYPE_CHECKING:
    from .scheduler import Scheduler

log = logging.getLogger(__name__)

#: Entries that one session may have before it is worth opening another.
_BACKLOG = 8

#: Seconds between two looks whether a person has ended the wait of a lane.
_LOOK = 30.0

#: Seconds between two looks whether mails that wait for a lane have become old, and how many
#: are looked at in one step of the loop.
_AGE = 60.0
_AGE_STEP = 100

#: Seconds that an unused session is kept, for the next mail of the same account.
_IDLE = 10.0


class Lane:
    """See the module; a `smtp.session.Source`."""

    def __init__(self, route: Route, scheduler: Scheduler) -> None:
        self.route = route
        self.key = lane_key(route)
        self.ready = Ready()
        self._flying: dict[Attempt, float] = {}  # and since when, on the loop's clock
        self._scheduler = scheduler
        self._sessions: set[Session] = set()
        self._quitting: set[Session] = set()  # those that we have told to
        self._account: Account | None = None
        self._version = ""
        self._bucket: TokenBucket | None = None
        self._limit = SessionLimit(1)
        self.relay = relay_name(route.host, route.port)
        self._proven = False  # a session got through: more may be opened beside it
        self._careful = False  # learned: one mail at a time in the next session
        self._idle_timer: asyncio.TimerHandle | None = None
        self._woken_at = math.inf  # seconds since the epoch: the wake-up that is under way
        self._stopping = False
        self._aged_at = 0.0  # seconds since the epoch: when old mails are looked for again
        self._aging = False  # more of them are looked at soon
        self._told: set[str] = set()  # ids of mails whose delay the sender knows
        self._version = self._current_version()
        self.circuit = Circuit(
            self.key,
            str(route),
            scheduler.spool,
            schedule=scheduler.schedule,
            version=self._current_version,
            now=scheduler.now,
            chance=scheduler.chance,
            tell=self._tell_owner,
            changed=self._circuit_changed,
        )
        self.circuit.recall(draining=scheduler.draining)

    def __repr__(self) -> str:
        return (
            f"<Lane {self.route} ready={len(self.ready)} in_flight={self.in_flight}"
            f" sessions={len(self._sessions)} {self.circuit!r}>"
        )

    @property
    def in_flight(self) -> int:
        """Mails that a session has."""
        return len(self._flying)

    @property
    def quiet(self) -> bool:
        """Nothing is on its way, and nothing can be sent now."""
        if self.in_flight or self._sessions or self._aging:
            return False
        return not self.ready or self._stopping or self.circuit.is_open

    @property
    def idle(self) -> bool:
        """Sessions are open, and there is nothing for them to do now."""
        if self.working <= 0 or self.in_flight:
            return False
        return not self.ready or self._held_back()

    @property
    def has_sessions(self) -> bool:
        """Whether it has sessions with its relay, not only with one that it has left."""
        return self._count_here() > 0

    @property
    def session_count(self) -> int:
        return len(self._sessions)

    @property
    def working(self) -> int:
        """Sessions that were not told to end."""
        return len(self._sessions) - len(self._quitting)

    def entries(self) -> list[Entry]:
        """Return what is ready and what is in flight; from any thread."""
        # Each copy is one step of the interpreter: the loop goes on meanwhile.
        return [*self.ready.copy(), *(mail.entry for mail in list(self._flying))]

    def push(self, entry: Entry) -> None:
        """Add an entry; `work` follows."""
        self.ready.append(entry)

    def work(self) -> None:
        """Put the ready entries to work: wake sessions, open what is missing."""
        if self._stopping or not self.ready:
            return
        self.circuit.look()
        if self.circuit.is_open:
            self._wake_at(min(self.circuit.until, self._scheduler.now() + _LOOK))
            self._age()
            return
        if not self.circuit.failed:
            self._told.clear()
        for session in list(self._sessions):
            session.wake()
        while self.ready and self._wants_session() and self._open_session():
            pass

    def wake(self) -> None:
        """What `_wake_at` asked for."""
        self._woken_at = math.inf
        self.work()

    def stop(self) -> None:
        """Take nothing more; finish what is past the end of data, give back the rest."""
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
        """Close the sessions when they have finished what is in flight."""
        for session in list(self._sessions):
            self._quitting.add(session)
            session.quit()

    def give_up_one(self) -> None:
        """Close one session when it has finished what is in flight, an idle one if there is."""
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
        self.circuit.open(Trouble.RELAY, f"silent for {silence:.0f} s, while others wait")
        self._quitting.add(session)
        session.stop()

    def account_changed(self) -> None:
        """Look whether the account is another now; if so, try at once with the new one."""
        if not self.route.mailbox or self._version == self._current_version():
            return
        self.circuit.close("the account was changed")
        self._proven = False
        for session in list(self._sessions):  # it may be because of their silence
            self._quitting.add(session)
            session.stop()
        try:
            self._load_account()
        except VaultError:
            pass  # for whoever opens a session
        self.work()

    # What sessions call: `smtp.session.Source`

    def next_mail(self) -> Attempt | None:
        while self.ready and not self._stopping and self._may_send():
            attempt = self._scheduler.claim(self.ready.popleft(), self)
            if attempt is not None:
                self._flying[attempt] = self._scheduler.loop.time()
                return attempt
            if self._bucket is not None:
                self._bucket.give_back()
        if self.idle:
            self._has_nothing_to_do()
        return None

    def mail_done(self, mail: Attempt, results: Mapping[str, Result]) -> None:
        self._scheduler.times.add(self._scheduler.loop.time() - self._flying.pop(mail))
        trouble = account_trouble(results)
        if trouble is not None:
            self._give_back(mail)
            reason = f"The relay does not let this account send: {trouble.text}"
            self.circuit.open(Trouble.LOGIN, reason)
            self.quit()
            return
        if self.circuit.failed and any(r.reply and r.reply.code != 421 for r in results.values()):
            self.circuit.close()  # the relay works: it has an opinion on this mail
        try:
            self._settle(mail, results)
        except Exception as error:  # a fault of ours; what the relay took is not sent again
            self._scheduler.set_aside(mail, error)

    def mail_unsent(self, mail: Attempt) -> None:
        del self._flying[mail]
        self._give_back(mail)

    def mail_broken(self, mail: Attempt, error: Exception) -> None:
        del self._flying[mail]
        self._scheduler.set_aside(mail, error)

    def session_ready(self, session: Session) -> None:
        if not self._proven:
            self._proven = True
            self.work()

    def session_closed(self, session: Session, failure: Failure | None) -> None:
        self._sessions.discard(session)
        ours = session in self._quitting or self._stopping
        self._quitting.discard(session)
        if self._careful and session.accepted > _BACKLOG:
            self._careful = False
        if failure is not None and not session.accepted and not ours:
            self._judge(failure)
        elif failure is None and not session.answered and self.ready and not ours:
            # Else a relay that greets and hangs up would be asked again at once, for ever.
            self.circuit.open(Trouble.RELAY, "the relay closes the connection before any mail")
        elif (
            not ours
            and self.working
            and failure is not None
            and asks_for_less(failure.phase, failure.reply, delivered=True)
        ):
            self._want_fewer(close=True)
        if not self._sessions and (self.circuit.is_open or not self.ready):
            self._proven = False
        self._scheduler.session_over(self, session.account.relay)

    def _settle(self, mail: Attempt, results: Mapping[str, Result]) -> None:
        scheduler = self._scheduler
        now = scheduler.now()
        outcomes = outcomes_of(mail, results, now, doubts=scheduler.schedule.doubts)
        mail.relayed = relayed_of(mail, results, outcomes)
        settlement = settlement_of(
            mail,
            outcomes,
            schedule=scheduler.schedule,
            now=now,
            chance=scheduler.chance(),
            at_once=were_too_many(results),
        )
        if any(outcome.state is State.UNCLEAR for outcome in outcomes.values()):
            self._careful = True  # a relay that hangs up must not make others unclear, too
        if (
            settlement.state is State.DEFERRED
            and self.working > 1
            and any(asks_for_less(each.phase, each.reply) for each in results.values())
        ):
            self._want_fewer(close=True)
        self._record(mail, outcomes)
        scheduler.settle(mail, settlement)

    def give_up(self, mail: Attempt, settlement: Settlement) -> None:
        """Record what is settled without an attempt: the mail has expired."""
        outcomes = {
            recipient: outcome
            for recipient, outcome in settlement.outcomes.items()
            if outcome != mail.lease.outcomes.get(recipient)
        }
        self._record(mail, outcomes, attempt=mail.entry.attempts)
        self._scheduler.settle(mail, settlement)

    def _give_back(self, mail: Attempt) -> None:
        mail.lease.release()
        self.ready.appendleft(mail.entry)

    # Mails that wait while the lane is in trouble

    def _tell_owner(self, note: LaneNote) -> None:
        self._scheduler.notices.tell_owner(self.route, note, self.circuit.told)

    def _circuit_changed(self, paused: bool, reason: str) -> None:
        tell_circuit(
            self._scheduler.journal,
            self._scheduler.announcer,
            self.route,
            relay=self.relay,
            now=self._scheduler.now(),
            paused=paused,
            reason=reason,
        )

    def _age(self) -> None:
        """Give up the mails that have waited too long, and tell the senders of the old ones."""
        scheduler = self._scheduler
        now = scheduler.now()
        if 0 < self._aged_at - now <= _AGE:
            return
        self._aged_at = now + _AGE
        young = Ready()
        claims = 0
        while self.ready:
            entry = self.ready.popleft()
            scheduled = entry.due if entry.state is State.QUEUED else 0.0
            age = now - (max(entry.staged_at, scheduled) or now)
            expired = scheduler.schedule.is_over(self.circuit.failures, age)
            delayed = 0 < scheduler.schedule.delay_notice <= age and entry.id not in self._told
            if not (expired or delayed):
                young.append(entry)
                continue
            if claims == _AGE_STEP or scheduler.disk_full:
                self.ready.appendleft(entry)
                self._age_soon()
                break
            claims += 1
            attempt = scheduler.claim(entry, self)
            if attempt is not None and not self._settle_old(attempt, now, expired=expired):
                attempt.lease.release()
                young.append(entry)
        for entry in self.ready:
            young.append(entry)
        self.ready = young

    def _age_soon(self) -> None:
        self._aged_at = 0.0
        if not self._scheduler.disk_full:  # else we are called when there is room
            self._aging = True
            self._scheduler.loop.call_soon(self._age_on)

    def _age_on(self) -> None:
        self._aging = False
        self.work()
        self._scheduler.check_quiet()

    def _settle_old(self, mail: Attempt, now: float, *, expired: bool) -> bool:
        """Return whether there was something to settle."""
        scheduler = self._scheduler
        self._told.add(mail.entry.id)
        if not expired and not scheduler.notices.delay_is_due(mail):
            return False
        note = scheduler.spool.lane_note(self.key)
        reason = note.reason if note is not None else "its relay or its account is in trouble"
        settlement = waiting_of(mail, reason, now=now, expired=expired)
        if expired:
            self._record(mail, {r: settlement.outcomes[r] for r in mail.recipients})
        scheduler.settle(mail, settlement)
        return True

    # How many sessions

    def _count_here(self) -> int:
        return sum(session.account.relay == self.relay for session in self._sessions)

    def _wants_session(self) -> bool:
        count = self._count_here()
        if self._bucket is not None and (wait := self._bucket.wait(self._scheduler.now())):
            self._wake_at(self._scheduler.now() + wait)
            return False
        if not count:
            return True
        if not self._proven or len(self.ready) <= _BACKLOG * count:
            return False  # many bad logins at once would lock the mailbox
        now = self._scheduler.now()
        if count < self._limit.allowed(now) and not self._limit.paused(now):
            return True
        if self._limit.learned:
            self._wake_at(self._limit.next_step(now))
        return False

    def _open_session(self) -> bool:
        """Return whether one is opened: else the account, or the limit of connections, forbids."""
        try:
            account = self._load_account()  # first: it says to which relay
            secret = resolve_secret(account)
        except VaultError as error:
            self.circuit.open(Trouble.ACCOUNT, str(error))
            return False
        if not self._scheduler.may_connect(self):
            return False
        self._cancel_idle_timer()
        session = Session(
            account,
            secret,
            self,
            helo_name=self._scheduler.helo_name,
            loop=self._scheduler.loop,
            window=1 if self._careful else WINDOW,
        )
        self._sessions.add(session)
        session.connect()
        return True

    def _load_account(self) -> Account:
        route = self.route
        if not route.mailbox:
            account = Account.without_login(route.host, route.port)
        else:
            self._version = self._current_version()
            account = self._scheduler.accounts.get(route.mailbox)
        if account != self._account:
            per_minute = mails_per_minute(account.host, account.mails_per_minute)
            self._bucket = TokenBucket(per_minute, self._scheduler.now()) if per_minute else None
            self._account = account
            self._limit = SessionLimit(account.connections)
            self.relay = account.relay
        return account

    def _current_version(self) -> str:
        if not self.route.mailbox:
            return ""
        try:
            return str(self._scheduler.accounts.version(self.route.mailbox))
        except VaultError as error:
            return str(error)  # to load it will fail, and says why; mended, it differs

    def _has_nothing_to_do(self) -> None:
        drained = self._scheduler.draining and not self.ready
        if drained or self._scheduler.is_waited_for(self):
            self._scheduler.loop.call_soon(self._idle_over)
        elif self._idle_timer is None and not self.ready:
            self._idle_timer = self._scheduler.loop.call_later(_IDLE, self._idle_over)

    def _cancel_idle_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _idle_over(self) -> None:
        self._idle_timer = None
        if self.idle:
            self.quit()

    # Limits and trouble

    def _held_back(self) -> bool:
        """Whether a limit, or trouble, keeps what is ready from being sent now."""
        if self.circuit.is_open or self._scheduler.disk_full:
            return True
        return self._bucket is not None and self._bucket.wait(self._scheduler.now()) > 0

    def _may_send(self) -> bool:
        if self.circuit.is_open or self._scheduler.disk_full:
            return False
        if self._bucket is None:
            return True
        now = self._scheduler.now()
        wait = self._bucket.take(now)
        if wait:
            self._wake_at(now + wait)
        return not wait

    def _wake_at(self, when: float) -> None:
        """Ask for one wake-up, not one for each session that has nothing to do."""
        if when < self._woken_at:
            self._woken_at = when
            self._scheduler.wake_at(when, self)

    def _judge(self, failure: Failure) -> None:
        """A session failed and had delivered nothing."""
        if self.working:  # it wants fewer of us
            self._want_fewer(close=False)
            return
        verdict = classify(failure.phase, failure.reply, failure.error)
        assert self._account is not None  # noqa: S101 - a session had it
        self.circuit.open(verdict.trouble, explain(self._account, failure))

    def _want_fewer(self, *, close: bool) -> None:
        """The relay has too many of us: open none for a while.

        `close`: some of those that work, too.  Not while it turns away new ones: those that it
        lets in may be the only ones.
        """
        now = self._scheduler.now()
        self._limit.refused(now, self.working)
        if close:
            for _ in range(self.working - self._limit.current):
                self.give_up_one()
        self._wake_at(self._limit.next_step(now))

    def _record(
        self, mail: Attempt, outcomes: Mapping[str, Outcome], *, attempt: int | None = None
    ) -> None:
        mail.news = outcomes
        envelope = mail.lease.envelope
        attempt = mail.entry.attempts + 1 if attempt is None else attempt
        if log.isEnabledFor(logging.INFO):
            told = ", ".join(f"{recipient} {outcome}" for recipient, outcome in outcomes.items())
            log.info("%s <%s> by %s: %s", mail.entry.id, envelope.message_id, self.route, told)
        relay = self._account.relay if self._account else ""
        record, entry, route = self._scheduler.journal.record, mail.entry.id, str(self.route)
        message_id, sender = envelope.message_id, mail.sender
        for recipient, (state, reply, at, _, _) in outcomes.items():
            record(
                Event(at, state, entry, message_id, route, sender, recipient, attempt, reply, relay)
            )
