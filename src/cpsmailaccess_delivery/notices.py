"""Who is told what: notices to senders and to the owners of mailboxes.

::

    settlement --of--> nothing: recorded at once
                   |
                   +--`notice_queue`--> made durable in the spool --> settlement recorded

A notice is a mail like any other, with the null reverse-path: for such a mail none is ever
made, so there are no loops.  Its Message-Id says what it is about.

That somebody was told of a delay is remembered by the outcomes of the mail: it is told in the
first attempt after the time, when the attempt before was earlier than that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from .account import DEFAULT_MAILBOX
from .attempt import Attempt
from .bounce import compose, compose_trouble, notice_id
from .dsn import DELAY, FAILURE, FULL, wants
from .envelope import Route
from .errors import SpoolError
from .interfaces import LaneNote, Outcome, Settlement, State
from .notice_queue import NoticeWriter, Wanted
from .report import Action, Notice
from .retry import Schedule

log = logging.getLogger(__name__)


class Notices:
    """Says what is to be told; nothing is queued here, and nothing waits for the disk.

    ``writer``: knows which account there is, and which lane is in trouble; writes what was
    returned.  `clock`: seconds since the epoch.
    """

    def __init__(
        self,
        writer: NoticeWriter,
        *,
        schedule: Schedule,
        reporting_mta: str,
        clock: Callable[[], float],
    ) -> None:
        self.writer = writer
        self._schedule = schedule
        self._reporting_mta = reporting_mta
        self._now = clock

    def of(self, attempt: Attempt, settlement: Settlement) -> tuple[Wanted, ...]:
        """Return what the sender is to be told with this settlement: mostly nothing."""
        if not attempt.sender or not (settlement.outcomes or attempt.relayed):
            return ()
        earlier: Mapping[str, Outcome] = attempt.lease.outcomes
        number = attempt.entry.attempts + 1
        found = []
        if attempt.relayed:
            found.append(self._notice(Action.RELAYED, attempt, attempt.relayed, number))
        refused = _those(settlement.outcomes, State.REFUSED)
        refused = {r: o for r, o in refused.items() if earlier.get(r) != o}
        if refused and wants(attempt.lease.envelope.notify, FAILURE):
            found.append(self._notice(Action.FAILED, attempt, refused, number))
        if settlement.due and self.delay_is_due(attempt):
            deferred = _those(settlement.outcomes, State.DEFERRED)
            if deferred:
                found.append(self._notice(Action.DELAYED, attempt, deferred, 0))
        return tuple(found)

    def of_refusals(
        self, attempt: Attempt, refused: Mapping[str, Outcome], occasion: str
    ) -> tuple[Wanted, ...]:
        """Return what tells the sender, if he wants it, of refusals that no attempt has brought.

        `occasion`: a word for the Message-Id, another one for each.
        """
        if not attempt.sender or not wants(attempt.lease.envelope.notify, FAILURE):
            return ()
        return (self._notice(Action.FAILED, attempt, refused, occasion),)

    def delay_is_due(self, attempt: Attempt) -> bool:
        """Tell whether an attempt now is the first one after the time to tell of a delay."""
        after = self._schedule.delay_notice
        since = attempt.since
        if not wants(attempt.lease.envelope.notify, DELAY):
            return False
        if not after or not since or self._now() - since < after:
            return False
        earlier = attempt.lease.outcomes
        last = max((o.at for o in earlier.values() if o.state is State.DEFERRED), default=0.0)
        return last < since + after

    def _notice(
        self, action: Action, attempt: Attempt, recipients: Mapping[str, Outcome], number: int | str
    ) -> Wanted:
        entry, envelope = attempt.entry, attempt.lease.envelope
        message_id = notice_id(action, entry.id, number, attempt.sender)
        now = self._now()
        give_up_at = (attempt.since or now) + self._schedule.give_up
        notice = Notice(
            action,
            to=attempt.sender,
            recipients=recipients,
            message=b"",  # read when it is wanted: many may wait here
            message_id=envelope.message_id,
            queued_at=entry.staged_at,
            now=now,
            give_up_at=min(give_up_at, envelope.expires or give_up_at),
            full=envelope.ret == FULL and action is Action.FAILED,
        )
        work = partial(self._compose, notice, attempt, message_id, envelope.route)
        return Wanted(message_id, attempt.sender, envelope.route, work)

    def _compose(self, notice: Notice, attempt: Attempt, message_id: str, route: Route) -> bytes:
        try:
            notice = replace(notice, message=attempt.read_message())
        except SpoolError as error:  # a notice without the mail's header is better than none
            log.error("%s", error)
        account = self.writer.account_of(route)
        return compose(
            notice,
            message_id=message_id,
            reporting_mta=self._reporting_mta,
            remote_mta=route.host if account is None else account.host,
        )

    def of_trouble(self, route: Route, note: LaneNote) -> tuple[Wanted, ...]:
        """Return what tells the owner of a mailbox that it cannot send; (): there is no way."""
        mailbox = route.mailbox
        default = Route(mailbox=DEFAULT_MAILBOX)
        if mailbox in ("", DEFAULT_MAILBOX) or mailbox.startswith("@"):
            return ()
        if not self.writer.works(default):
            return ()
        message_id = notice_id("trouble", mailbox, f"{note.since:.3f}", mailbox)
        work = partial(
            compose_trouble,
            mailbox=mailbox,
            reason=note.reason,
            now=self._now(),
            message_id=message_id,
            give_up=self._schedule.give_up,
        )
        return (Wanted(message_id, mailbox, default, work),)


def _those(outcomes: Mapping[str, Outcome], state: State) -> dict[str, Outcome]:
    return {r: outcome for r, outcome in outcomes.items() if outcome.state is state}
