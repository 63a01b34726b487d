"""``@@my-outbox``: what became of a user's own mails, with undo, cancel and retry."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from ..errors import InvalidOption
from ..interfaces import State
from .own_mails import KINDS, Mail, OwnMails
from .page import action, link, page, redirect, template, text
from .paging import Page
from .subjects import Subjects
from .throttle import Throttle
from .user_page import UserPage

_LIST: Final = template("my_outbox")
_MAIL: Final = template("my_mail")

#: Retries a minute of one user: each may be a connection to a relay of his choice.
_retries: Final = Throttle(12)

#: What is said of one recipient.
_FATES: Final = {
    State.QUEUED: "not sent yet",
    State.DEFERRED: "not sent yet, tried again",
    State.HELD: "set aside",
    State.ACCEPTED: "taken by your mail server",
    State.REFUSED: "refused",
    State.UNCLEAR: "nobody knows",
    State.CANCELLED: "not sent",
}

_SOON: Final = 60.0  # seconds: what happens within them is waited for on the page


class MyOutbox(UserPage):
    """See the module."""

    said: ClassVar[Mapping[str, str]] = {
        "cancelled": "Taken back.",
        "retried": "It is tried now.",
    }

    def __call__(self) -> str:
        """List them, all or those of one kind, a page at a time."""
        request, own, now = self.request, self.own_mails(), self._outbox.clock()
        mails, older = own.list()
        kind = text(request, "kind")
        listed = Page.of(
            [mail for mail in mails if kind in (mail.kind, "")], text(request, "start")
        )
        counts = Counter(mail.kind for mail in mails)
        return self.show(
            _LIST,
            request,
            kind=kind,
            counts=[(each, counts[each]) for each in KINDS if counts[each]],
            total=len(mails),
            older=older,
            page=listed,
            rows=[(mail, self._subject(own, mail), in_words(mail, now)) for mail in listed.items],
            clock=clock,
        )

    @page
    def mail(self, REQUEST: Any) -> str:
        """Show one; the page comes again while something may happen to it soon."""
        own = self.own_mails()
        if message_id := text(REQUEST, "message_id"):  # where a page goes that has sent it
            sent = own.sent_as(text(REQUEST, "mailbox"), message_id)
            return redirect(REQUEST, f"{self.url}/mail", id=sent.id)
        mail, now = own.get(text(REQUEST, "id")), self._outbox.clock()
        if not mail.is_over and mail.next_try < now + _SOON:
            again = link(f"{self.url}/mail", id=mail.id)
            REQUEST.response.setHeader("Refresh", f"2; url={again}")
        return self.show(
            _MAIL,
            REQUEST,
            mail=mail,
            subject=self._subject(own, mail),
            words=in_words(mail, now),
            fates=_FATES,
            clock=clock,
        )

    @action
    def cancel(self, REQUEST: Any) -> str:
        """Take one back."""
        id = text(REQUEST, "id")
        self.own_mails().cancel(id)
        return redirect(REQUEST, f"{self.url}/mail", id=id, done="cancelled")

    @action
    def retry(self, REQUEST: Any) -> str:
        """Let one be tried now."""
        id, own = text(REQUEST, "id"), self.own_mails()
        own.get(id)
        if wait := _retries.take(self.owner):
            raise InvalidOption(f"You have tried often enough: try again in {wait:.0f} seconds.")
        own.retry(id)
        return redirect(REQUEST, f"{self.url}/mail", id=id, done="retried")

    def _subject(self, own: OwnMails, mail: Mail) -> str:
        subjects = Subjects(self.context)
        return own.subject(mail) or subjects.of(self.owner, mail.message_id, mail.queued_at)


def in_words(mail: Mail, now: float) -> str:
    """Say in plain language how a mail fares; what a relay said stands beside it."""
    left = mail.next_try - now
    if mail.kind == "scheduled":
        if left < _SOON:
            return f"It leaves in {max(left, 1):.0f} seconds. Until then you can take it back."
        return f"It leaves at {clock(mail.next_try)}. Until then you can take it back."
    if mail.is_held:
        return "It was set aside, and waits for the administrator."
    if mail.kind == "waiting":
        if not mail.reason:
            return "It is about to leave."
        again = f" It is tried again at {clock(mail.next_try)}." if left > 0 else ""
        return f"It could not be handed over yet.{again}"
    if mail.kind == "taken back":
        states = {outcome.state for outcome in mail.recipients.values()}
        if states == {State.CANCELLED}:
            return "It was taken back. Nobody has got it."
        return "It was taken back before everybody had it."
    return {
        "sent": "Your mail server has taken it for all recipients.",
        "refused": "It was refused for good.",
        "unclear": "The connection broke before your mail server answered: it may have arrived, or"
        " not. Ask the recipient before you send it again.",
    }[mail.kind]


def clock(seconds: float) -> str:
    """Return a time for people: today's without the date."""
    then = time.localtime(seconds)
    today = time.localtime()[:3] == then[:3]
    return time.strftime("%H:%M" if today else "%d %b %Y, %H:%M", then)
