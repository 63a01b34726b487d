"""A lane: the entries that share an account, and the sessions that carry them.

A lane hands its sessions mails, and says what became of each.  Whatever goes wrong with its
relay or account makes this lane wait, and no other::

    ready --next_mail--> in flight --mail_done--> settled
      ^                     |
      +----mail_unsent------+

It runs in the processor's event loop; nothing here blocks but short file operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from .aging import Aging
from .attempt import ALL_ACCEPTED, LARGE, Attempt
from .circuit import Circuit
from .connections import Connections
from .envelope import Route, lane_key
from .errors import VaultError
from .interfaces import Entry, LaneNote, Outcome, Settlement, State
from .limits import asks_for_less
from .outcome import Meaning, Trouble
from .ready import Ready
from .recorder import Recorder
from .results import account_trouble, relayed_of, settlement_of, weigh, were_too_many
from .room import MOST, OWN, Room
from .sessions import Sessions
from .shared import Shared
from .smtp.events import Failure, Result
from .smtp.session import Session
from .summary import Times
from .telling import tell_circuit, tell_outcomes
from .terms import Terms

#: Seconds between two looks whether a person has ended the wait of a lane.
_LOOK = 30.0


class Lane:
    """See the module; a `smtp.session.Source`.

    `claim`: leases an entry for a lane, or returns None.  `wake_at`: lets a lane `wake` at a
    time.  `changed`: called when the lane may have become quiet.
    """

    def __init__(
        self,
        route: Route,
        shared: Shared,
        connections: Connections,
        recorder: Recorder,
        room: Room,
        *,
        times: Times,
        claim: Callable[[Entry, Lane], Attempt | None],
        wake_at: Callable[[float, Lane], None],
        changed: Callable[[], None],
    ) -> None:
        self.route = route
        self.name = str(route)
        self.key = lane_key(route)
        self.ready = Ready()
        self.terms = Terms(route, shared.accounts, shared.spool.paces)
        self.sessions = Sessions(self, shared, connections)
        self._aging = Aging(self, shared, recorder, claim=claim, changed=changed)
        self._shared = shared
        self._recorder = recorder
        self._room = room
        self._times = times
        self._claim = claim
        self._wake_me_at = wake_at
        self._flying: dict[Attempt, float] = {}  # and since when, on the loop's clock
        self._bytes = 0  # in flight
        self._woken_at = math.inf  # seconds since the epoch: the wake-up that is under way
        self._stopping = False
        self.circuit = Circuit(
            self.key,
            self.name,
            shared.spool,
            schedule=shared.schedule,
            version=self.terms.version,
            now=shared.now,
            chance=shared.chance,
            tell=self._tell_owner,
            changed=self._circuit_changed,
        )
        self.circuit.recall(draining=shared.draining)

    def __repr__(self) -> str:
        return (
            f"<Lane {self.name} ready={len(self.ready)} in_flight={self.in_flight}"
            f" sessions={len(self.sessions)} {self.circuit!r}>"
        )

    @property
    def in_flight(self) -> int:
        """Mails that a session has."""
        return len(self._flying)

    @property
    def cramped(self) -> bool:
        """Whether no mail more may be in flight until there is room for its message."""
        return self._bytes >= OWN and self._room.used >= MOST

    @property
    def is_ours(self) -> bool:
        """Whether no other worker has it now."""
        return bool(self._shared.spool.serves(self.key))

    @property
    def quiet(self) -> bool:
        """Nothing is on its way, and nothing can be sent now."""
        if self.in_flight or self.sessions or self._aging.busy:
            return False
        return not self.ready or self._stopping or self.circuit.is_open

    @property
    def idle(self) -> bool:
        """Sessions are open, and there is nothing for them to do now."""
        if self.sessions.working <= 0 or self.in_flight:
            return False
        held_back = (
            self.circuit.is_open or self._recorder.full or self.terms.wait(self._shared.now()) > 0
        )
        return not self.ready or held_back

    def entries(self) -> list[Entry]:
        """Return what is ready and what is in flight; from any thread."""
        # Each copy is one step of the interpreter: the loop goes on meanwhile.
        flying = [mail.entry for mail in list(self._flying)]
        return [*self._aging.entries(), *self.ready.copy(), *flying]

    def forget(self) -> None:
        """Forget what is ready: it is told again."""
        self.ready.clear()
        self._aging.forget()

    def push(self, entry: Entry) -> None:
        """Add an entry; `work` follows."""
        self.ready.append(entry)
        if entry.expires:
            self._aging.expect(entry)

    def work(self) -> None:
        """Put the ready entries to work: wake sessions, open what is missing."""
        if self._stopping or not (self.ready or self._aging.walking):
            return
        if not self.is_ours:  # nor is it ours to try its relay; we are told again when it is
            self.forget()
            return
        self.circuit.look(begins=not (self.sessions or self._shared.draining))
        if self.circuit.is_open:
            self._aging.look()
            self.wait_for_probe()
            return
        self._aging.give_back()
        if not self.circuit.failures:
            self._aging.begin_again()
        self.sessions.work()

    def wake(self) -> None:
        """What `wake_at` asked for."""
        self._woken_at = math.inf
        self.work()

    def wake_at(self, when: float) -> None:
        """Ask for one wake-up, not one for each session that has nothing to do."""
        if when < self._woken_at:
            self._woken_at = when
            self._wake_me_at(when, self)

    def wait_for_probe(self) -> None:
        """Ask to be woken when the circuit lets one try, or to look whether a person does."""
        now = self._shared.now()
        when = min(self.circuit.until, now + _LOOK)
        self.wake_at(min(when, self._aging.next) if self._aging.next > now else when)

    def stop(self) -> None:
        """Take nothing more; finish what is past the end of data, give back the rest."""
        self._stopping = True
        self.sessions.stop()

    def abort(self) -> None:
        """Drop every connection now."""
        self._stopping = True
        self.sessions.abort()

    def account_changed(self) -> None:
        """Look whether the account is another now; if so, try at once with the new one."""
        if not self.terms.changed:
            return
        if self.is_ours:
            self.circuit.close("the account was changed")
        else:
            self.circuit.forget()
        self.sessions.leave()  # it may be because of their silence
        try:
            self.terms.load()
        except VaultError:
            pass  # for whoever opens a session
        self.work()

    # What sessions call: `smtp.session.Source`

    def next_mail(self) -> Attempt | None:
        if self._recorder.gathering:
            self._recorder.after(self.sessions.wake)
            return None
        while self.ready and not self._stopping and self._may_send():
            attempt = self._claim(self.ready.popleft(), self)
            if attempt is not None:
                self._flying[attempt] = self._shared.loop.time()
                size = attempt.size
                self._bytes += size
                self._room.used += size
                if size > LARGE:  # the session makes the wire form before anything else
                    self._shared.loop.call_soon(attempt.forget_message)
                return attempt
            self.terms.give_back()
        if self.idle:
            self.sessions.have_nothing_to_do()
        return None

    def mail_done(self, mail: Attempt, results: Mapping[str, Result]) -> None:
        shared = self._shared
        self._times.add(shared.loop.time() - self._landed(mail))
        try:
            now = shared.now()
            outcomes, failed = weigh(mail, results, now, doubts=shared.schedule.doubts)
            if failed or mail.lease.outcomes:
                self._settle(mail, results, outcomes, failed, now)
                return
            if self.circuit.failures:
                self.circuit.close()
            if mail.wish is not None:
                mail.relayed = relayed_of(mail, results, outcomes)
            self._tell(mail, outcomes, mail.lease.entry.attempts + 1)
            self._recorder.settle(mail, ALL_ACCEPTED)
        except Exception as error:  # a fault of ours; what the relay took is not sent again
            self._recorder.set_aside(mail, error)

    def mail_unsent(self, mail: Attempt) -> None:
        self._landed(mail)
        self._give_back(mail)

    def mail_broken(self, mail: Attempt, error: Exception) -> None:
        self._landed(mail)
        self._recorder.set_aside(mail, error)

    def session_ready(self, session: Session) -> None:
        self.sessions.ready()

    def session_closed(self, session: Session, failure: Failure | None) -> None:
        self.sessions.closed(session, failure)

    # What becomes of mails

    def _landed(self, mail: Attempt) -> float:
        """A session has given a mail back; return since when it had it."""
        room = self._room
        self._bytes -= mail.size
        room.used -= mail.size
        if room.waiting and room.used < MOST:
            room.serve()
        return self._flying.pop(mail)

    def _may_send(self) -> bool:
        if self.cramped:
            self._room.wait(self)
            return False
        if (self.circuit.until and self.circuit.is_open) or self._recorder.full:
            return False
        now = self._shared.now()
        wait = self.terms.take(now)
        if wait:
            self.wake_at(now + wait)
        return not wait

    def _settle(
        self,
        mail: Attempt,
        results: Mapping[str, Result],
        outcomes: Mapping[str, Outcome],
        failed: Mapping[str, Meaning],
        now: float,
    ) -> None:
        """Settle a mail that is not new, or that the relay did not take for all."""
        trouble = account_trouble(results, failed)
        if trouble is not None:
            reason = f"The relay does not let this account send: {trouble.text}"
            self.circuit.open(Trouble.LOGIN, reason)
            self._give_back(mail)
            self.sessions.quit()
            return
        slow_down = next(
            (r for r in results.values() if asks_for_less(r.phase, r.reply, delivered=True)), None
        )
        if (
            self.circuit.failures
            and slow_down is None
            and any(each.reply and each.reply.code != 421 for each in results.values())
        ):
            self.circuit.close()  # the relay works: it has an opinion on this mail
        shared = self._shared
        mail.relayed = relayed_of(mail, results, outcomes)
        settlement = settlement_of(
            mail,
            outcomes,
            schedule=shared.schedule,
            now=now,
            chance=shared.chance(),
            at_once=were_too_many(results, failed),
        )
        if any(meaning.state is State.UNCLEAR for meaning in failed.values()):
            # A relay that hangs up must not make others unclear, too.
            self.sessions.careful = True
        if settlement.state is State.DEFERRED:
            if self.sessions.working > 1:
                if any(asks_for_less(each.phase, each.reply) for each in results.values()):
                    self.sessions.want_fewer(close=True)
            elif slow_down is not None:  # else each mail of the lane would be told the same
                self.circuit.open(Trouble.RELAY, f"the relay asks for less: {slow_down.text}")
                self.sessions.quit()
        self._tell(mail, outcomes, mail.lease.entry.attempts + 1)
        self._recorder.settle(mail, settlement)

    def give_up(self, mail: Attempt, settlement: Settlement) -> None:
        """Record what is settled without an attempt: the mail has expired."""
        outcomes = {
            recipient: outcome
            for recipient, outcome in settlement.outcomes.items()
            if outcome != mail.lease.outcomes.get(recipient)
        }
        self._tell(mail, outcomes, mail.lease.entry.attempts)
        self._recorder.settle(mail, settlement)

    def _give_back(self, mail: Attempt) -> None:
        mail.lease.release()
        self.ready.appendleft(mail.entry)

    # What is told

    def _tell(self, mail: Attempt, outcomes: Mapping[str, Outcome], number: int) -> None:
        account = self.terms.account
        tell_outcomes(
            self._shared.journal,
            mail,
            outcomes,
            route=self.name,
            relay=account.relay if account else "",
            number=number,
        )

    def _tell_owner(self, note: LaneNote) -> None:
        self._recorder.tell_owner(self.route, note, self.circuit.told)

    def _circuit_changed(self, paused: bool, reason: str) -> None:
        tell_circuit(
            self._shared.journal,
            self._shared.announcer,
            self.route,
            relay=self.terms.relay,
            now=self._shared.now(),
            paused=paused,
            reason=reason,
        )
