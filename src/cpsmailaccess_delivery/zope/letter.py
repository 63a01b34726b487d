"""A letter as somebody has typed it, as a message: whatever was typed, it adds no header.  Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from email import policy
from email.message import EmailMessage
from email.utils import getaddresses
from typing import Final, NamedTuple

from ..address import check_address, check_recipients
from ..errors import InvalidMessage

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_TYPE = re.compile(r"[a-z]+/[a-z0-9][a-z0-9.+-]{0,60}")
_CONTAINERS: Final = ("multipart", "message")
_LONGEST_SUBJECT: Final = 900
_LONGEST_NAME: Final = 150


class Attachment(NamedTuple):
    """A file that a browser has sent; its name and type are what the browser says."""

    name: str
    type: str
    content: bytes


def recipients_of(text: str) -> tuple[str, ...]:
    """Return the addresses in a line, with commas between them, names allowed.

    Raises `InvalidAddress`, `NoRecipients`.
    """
    if _CONTROL.search(text):
        check_address(text)  # which says so
    parts = [part for part in re.split(r"[,;]", text) if part.strip()]
    if all("@" in part for part in parts):
        return check_recipients(parts)
    return check_recipients([address for _, address in getaddresses([text])])


def letter(
    sender: str,
    recipients: Sequence[str],
    subject: str,
    text: str,
    attachments: Sequence[Attachment] = (),
) -> EmailMessage:
    """Return the message.  Raises `InvalidMessage`: the subject is more than a line."""
    if _CONTROL.search(subject) or len(subject) > _LONGEST_SUBJECT:
        raise InvalidMessage(
            f"subject: is one line of at most {_LONGEST_SUBJECT} characters, without control"
            " characters"
        )
    addresses = [sender, *recipients]
    is_ascii = all(address.isascii() for address in addresses)
    message = EmailMessage(policy.SMTP if is_ascii else policy.SMTPUTF8)
    message["From"] = sender
    message["To"] = ", ".join(recipients)
    message["Subject"] = subject
    message.set_content(text.replace("\r\n", "\n").replace("\r", "\n"))
    for each in attachments:
        kind = each.type.lower()
        if not _TYPE.fullmatch(kind) or kind.startswith(_CONTAINERS):
            kind = "application/octet-stream"
        main, _, sub = kind.partition("/")
        message.add_attachment(
            each.content, maintype=main, subtype=sub, filename=_file_name(each.name)
        )
    return message


def _file_name(name: str) -> str:
    """Return the name without the path that some browsers put before it."""
    name = _CONTROL.sub("", re.split(r"[/\\]", name)[-1]).strip(" .\"'")
    return name[-_LONGEST_NAME:] or "attachment"
