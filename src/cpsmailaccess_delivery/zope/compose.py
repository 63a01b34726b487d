"""``@@compose``: a user writes from one of his mailboxes.  README.rst explains it line by line."""

from __future__ import annotations

import secrets
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

from zope.component import getUtility
from zope.sendmail.interfaces import IMailDelivery
from ZPublisher.HTTPRequest import FileUpload

from ..errors import InvalidOption, NoSuchAccount, OutboxError
from .letter import Attachment, letter, recipients_of
from .page import action, redirect, template, text
from .security import SEND_MAIL
from .subjects import Subjects
from .user_page import UserPage

_FORM: Final = template("compose")

#: Seconds in which its writer can take a mail back.
UNDO: Final = 10

_FIELDS: Final = ("mailbox", "to", "subject", "text", "later", "key")


class Compose(UserPage):
    """See the module."""

    permission = SEND_MAIL

    def __call__(self) -> str:
        """Show the form."""
        typed = {name: text(self.request, name) for name in ("mailbox", "to", "subject")}
        return self._form(self.request, {**dict.fromkeys(_FIELDS, ""), **typed})

    @action
    def send(self, REQUEST: Any) -> str:
        """Queue what was typed, and go to the page that offers undo, then shows its fate."""
        typed = {name: text(REQUEST, name) for name in _FIELDS}
        try:
            mailbox = self.own_account(typed["mailbox"]).mailbox
            recipients = recipients_of(typed["to"])
            attachments = _attachments(REQUEST)
            message = letter(mailbox, recipients, typed["subject"], typed["text"], attachments)
            delivery = getUtility(IMailDelivery, self.mail_accounts().delivery_name)
            message_id = delivery.send(
                mailbox,
                recipients,
                message,
                undo=UNDO,
                not_before=_later(typed["later"]),
                idempotency_key=self._key(typed, attachments),
            )
            now = self._outbox.clock()
            Subjects(self.context).note(self.owner, message_id, typed["subject"], now)
        except NoSuchAccount:
            return self._form(REQUEST, typed, "Choose one of your mailboxes.")
        except OutboxError as error:
            return self._form(REQUEST, typed, str(error))
        # With this request's transaction it is queued; when that fails, it never was.
        return redirect(
            REQUEST, f"{self.url_of('my-outbox')}/mail", mailbox=mailbox, message_id=message_id
        )

    def _form(self, request: Any, typed: dict[str, str], problem: str = "") -> str:
        mailboxes = [each.mailbox for each in self.own_accounts()]
        return self.show(
            _FORM,
            request,
            problem=problem,
            mailboxes=[each for each in mailboxes if not each.startswith(("@", "*"))],
            typed={**typed, "key": typed["key"] or secrets.token_urlsafe(16)},
            undo=UNDO,
            zone=datetime.now().astimezone().strftime("%Z"),
        )

    def _key(self, typed: dict[str, str], attachments: list[Attachment]) -> str | None:
        """One form is one mail, however often its button is pressed; nobody else's is meant.

        Whoever goes back to a form and writes something else in it has written another mail.
        """
        if not typed["key"]:
            return None
        files = [(file.name, file.type, sha256(file.content).digest()) for file in attachments]
        return "compose-" + sha256(repr((self.owner, typed, files)).encode()).hexdigest()


def _attachments(request: Any) -> list[Attachment]:
    upload = request.form.get("attachment")
    if not isinstance(upload, FileUpload) or not upload.filename:
        return []
    kind = upload.headers.get("content-type", "").partition(";")[0].strip()
    return [Attachment(upload.filename, kind, upload.read())]


def _later(typed: str) -> datetime | None:
    """Return the time that a browser has sent, of this machine's zone.  Raises `InvalidOption`."""
    if not typed:
        return None
    try:
        return datetime.fromisoformat(typed).astimezone()
    except (ValueError, OverflowError, OSError):
        raise InvalidOption(f"{typed!r}: is no time; write 2026-12-24T18:00") from None
