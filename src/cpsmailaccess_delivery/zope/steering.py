"""What can be done with mails in the tab *Queue*: for one, or for many that were chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from AccessControl import getSecurityManager
from AccessControl.class_init import InitializeClass
from AccessControl.SecurityInfo import ClassSecurityInfo

from ..errors import InvalidOption
from ..interfaces import Entry, Record, State
from ..selection import lane_of
from ..shape import UNREADABLE
from ..steering import Steered, is_unclear, release, steer
from ..wording import clean, counted
from .choosing import choose
from .page import action, page, redirect, render, template, text, texts
from .security import MANAGE_QUEUE

_CONFIRM: Final = template("confirm_mails")

#: Failures that a message names, and mails that a question does.
_NAMED: Final = 5
_SHOWN: Final = 50

_NONE: Final = "No mail is chosen: choose mails first."

#: What was done with mails, in words.
_DONE: Final = {
    "retry": "tried again now",
    "hold": "held",
    "release": "released",
    "cancel": "cancelled",
    "accepted": "settled as accepted",
    "refused": "settled as refused",
}

#: What becomes of the mails that a page asks about: its title, its button, what it says.
_QUESTIONS: Final = {
    "cancel": (
        "Cancel these mails?",
        "Cancel the mails",
        "They are removed from the queue for good. Their senders are not told.",
    ),
    "accepted": (
        "Did these mails arrive?",
        "They arrived",
        "Recipients that are unclear count as accepted: nothing is sent to them any more.",
    ),
    "refused": (
        "Did these mails not arrive?",
        "They did not arrive",
        "Recipients that are unclear count as refused: the senders are told, and nothing is sent"
        " to them any more.",
    ),
}


class Steering:
    """Mixin of `mail_accounts.MailAccounts`: the targets of the forms of `QueueTab`."""

    security = ClassSecurityInfo()

    @security.protected(MANAGE_QUEUE)
    @action
    def manage_retryMails(self: Any, REQUEST: Any) -> str:
        """Make mails due now, a lane in trouble that they wait for, too."""
        return self._steer(REQUEST, "retry", self._outbox().queue.retry)

    @security.protected(MANAGE_QUEUE)
    @action
    def manage_holdMails(self: Any, REQUEST: Any) -> str:
        """Set mails aside until they are released."""
        queue = self._outbox().queue
        user = getSecurityManager().getUser().getId()
        reason = text(REQUEST, "reason") or f"held by {user}"
        return self._steer(REQUEST, "hold", lambda mail: queue.hold(mail, reason))

    @security.protected(MANAGE_QUEUE)
    @action
    def manage_releaseMails(self: Any, REQUEST: Any) -> str:
        """Let mails go that are held, unclear or refused."""
        queue = self._outbox().queue
        return self._steer(REQUEST, "release", lambda mail: release(queue, mail))

    @security.protected(MANAGE_QUEUE)
    @page
    def manage_confirmCancel(self: Any, REQUEST: Any) -> str:
        """Ask whether mails are to be cancelled."""
        return self._ask(REQUEST, "cancel", "manage_cancelMails")

    @security.protected(MANAGE_QUEUE)
    @action
    def manage_cancelMails(self: Any, REQUEST: Any) -> str:
        """Remove mails that are not delivered yet."""
        return self._steer(REQUEST, "cancel", self._outbox().queue.cancel)

    @security.protected(MANAGE_QUEUE)
    @page
    def manage_confirmAccepted(self: Any, REQUEST: Any) -> str:
        """Ask whether unclear mails have arrived."""
        return self._ask(REQUEST, "accepted", "manage_settleAccepted")

    @security.protected(MANAGE_QUEUE)
    @page
    def manage_confirmRefused(self: Any, REQUEST: Any) -> str:
        """Ask whether unclear mails have not arrived."""
        return self._ask(REQUEST, "refused", "manage_settleRefused")

    @security.protected(MANAGE_QUEUE)
    @action
    def manage_settleAccepted(self: Any, REQUEST: Any) -> str:
        """Say that unclear recipients have got the mail."""
        return self._settle(REQUEST, State.ACCEPTED)

    @security.protected(MANAGE_QUEUE)
    @action
    def manage_settleRefused(self: Any, REQUEST: Any) -> str:
        """Say that unclear recipients have not got the mail: their sender is told."""
        return self._settle(REQUEST, State.REFUSED)

    @security.protected(MANAGE_QUEUE)
    @action
    def manage_resumeLane(self: Any, REQUEST: Any) -> str:
        """Try a paused account, or a relay in trouble, now."""
        outbox, lane = self._outbox(), text(REQUEST, "lane_key")
        note = outbox.spool.lane_note(lane) if lane == lane_of(lane) else None
        if note is None:
            raise InvalidOption(f"{lane!r}: waits for nothing: it was resumed meanwhile, or works")
        outbox.resume(lane)
        return redirect(
            REQUEST,
            f"{self.absolute_url()}/manage_queue",
            f"{clean(note.route)} is tried again now.",
        )

    def _settle(self: Any, request: Any, state: State) -> str:
        queue = self._outbox().queue
        recipients = texts(request, "recipients")
        if _no_recipient(request):
            return self._back(request, "Choose recipients first.", failed=True)
        return self._steer(
            request,
            str(state),
            lambda mail: queue.settle(mail, state, recipients),
        )

    def _steer(
        self: Any, request: Any, what: str, act: Callable[[str | Entry], list[Record]]
    ) -> str:
        outbox = self._outbox()
        chosen = choose(outbox, request, what)
        if not chosen.mails:
            return self._back(request, _NONE + chosen.not_seen, failed=True)
        steered = steer(chosen.mails, act, gone_is_fine=chosen.all_are_meant)
        outbox.look()
        message = _told(steered, _DONE[what])
        if chosen.more:
            message += f" {chosen.more} more fit: do it again for them."
        return self._back(request, message + chosen.not_seen, failed=bool(steered.failures))

    def _ask(self: Any, request: Any, what: str, target: str) -> str:
        outbox = self._outbox()
        chosen = choose(outbox, request, what)
        if not chosen.mails:
            return self._back(request, _NONE + chosen.not_seen, failed=True)
        if what != "cancel" and _no_recipient(request):
            return self._back(request, "Choose recipients first.", failed=True)
        title, button, words = _QUESTIONS[what]
        return render(
            _CONFIRM,
            self,
            request,
            tab="Queue",
            title=title,
            button=button,
            words=words,
            target=target,
            danger=what != "accepted",
            mails=_described(outbox.queue, chosen.mails[:_SHOWN]),
            ids=texts(request, "ids"),
            more=len(chosen.mails) + chosen.more - _SHOWN,
            kept=_kept(request),
            recipients=texts(request, "recipients"),
            back=self._back_link(request),
        )

    def _back(self: Any, request: Any, message: str, *, failed: bool) -> str:
        """Go back to where the form was, the mail's page or the list, and say what happened."""
        name, query = self._back_link(request)
        if failed:
            query["failed"] = "1"
        return redirect(request, f"{self.absolute_url()}/{name}", message, **query)

    def _back_link(self: Any, request: Any) -> tuple[str, dict[str, str]]:
        kept = _kept(request)
        if kept.pop("from", "") == "mail":
            return "manage_mail", {"id": kept.get("id", ""), "message_id": kept["message_id"]}
        return "manage_queue", {name: kept[name] for name in _LIST if kept.get(name)}


InitializeClass(Steering)

#: What the forms of the list carry along, so that one comes back to it.
_LIST: Final = ("state", "lane", "older", "search", "start")


def possible(record: Record) -> frozenset[str]:
    """Return what can be done with a mail that is in the spool."""
    state = record.entry.state
    unclear = is_unclear(record)
    may = {"cancel"}
    if state in (State.QUEUED, State.DEFERRED):
        may.add("retry")
    if state is not State.HELD:
        may.add("hold")
    if state in (State.HELD, State.UNCLEAR, State.REFUSED) or unclear:
        may.add("release")
    if unclear:
        may.add("settle")
    return frozenset(may)


def _no_recipient(request: Any) -> bool:
    """Tell whether the page of a mail has sent none: that is not what all of a list means."""
    return text(request, "from") == "mail" and not texts(request, "recipients")


def _kept(request: Any) -> dict[str, str]:
    return {name: text(request, name) for name in (*_LIST, "from", "id", "message_id", "which")}


def _told(steered: Steered, done: str) -> str:
    """Say what happened to how many, and what could not be done and why."""
    message = f"{counted(len(steered.records), 'mail', 'mails')} {done}."
    if steered.failures:
        named = "; ".join(_failure(*failure) for failure in steered.failures[:_NAMED])
        more = len(steered.failures) - _NAMED
        message += f" Not done: {named}{f'; and {more} more' if more > 0 else ''}."
    return clean(message)


def _failure(name: str, error: Exception) -> str:
    words = str(error)
    return words if name in words else f"{name}: {words}"


def _described(queue: Any, mails: list[str | Entry]) -> list[str]:
    """Return what each mail is, in words."""
    described = []
    for mail in mails:
        try:
            (record,) = queue.find(mail)
        except ValueError:
            described.append(f"{_id(mail)}: {UNREADABLE}")
        except LookupError:
            described.append(clean(f"{_id(mail)}: has left the queue"))
        else:
            sender, recipients = record.envelope.sender, record.envelope.recipients
            described.append(clean(f"{sender or '<>'} to {', '.join(recipients)}"))
    return described


def _id(mail: str | Entry) -> str:
    return mail.id if isinstance(mail, Entry) else mail
