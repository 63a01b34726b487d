"""The mails that the demo sends: read as bytes, addressed by their own headers."""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from email.utils import getaddresses
from pathlib import Path

_HEADER_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_MADE_SIZE = 5 * 1024 * 1024


class Unusable(ValueError):
    """A file that cannot be sent as a mail; the text says why."""


@dataclass(frozen=True)
class Mail:
    """One mail to send: ``data`` is what the file holds."""

    name: str
    data: bytes
    sender: str
    recipients: tuple[str, ...]


def read_mails(directory: Path) -> tuple[list[Mail], dict[str, str]]:
    """Return the mails of a directory's ``.eml`` files, and why others are none, by name.

    Raises OSError.
    """
    mails, unusable = [], {}
    for path in sorted(path for path in directory.iterdir() if path.suffix.lower() == ".eml"):
        try:
            mails.append(address(path.stem, path.read_bytes()))
        except (OSError, Unusable) as error:
            unusable[path.stem] = str(error)
    return mails, unusable


def address(name: str, data: bytes) -> Mail:
    """Return the mail with sender (From) and recipients (To, Cc, Bcc) from its header."""
    if data.startswith(b"From "):
        raise Unusable('begins with the "From " line of an mbox, which is no header: remove it')
    end = _HEADER_END.search(data)
    raw = data[: end.start()] if end else data
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    header = message_from_string(text)
    senders = list(_addresses(header, "From"))
    recipients = dict.fromkeys(_addresses(header, "To", "Cc", "Bcc"))
    if not senders:
        raise Unusable("has no address in From")
    if not recipients:
        raise Unusable("has no address in To, Cc or Bcc")
    return Mail(name, data, senders[0], tuple(recipients))


def make_large_mail() -> Mail:
    """Return a mail of 5 MiB: nothing that one would store in a repository."""
    header = (
        b"From: Alice Example <alice@example.org>\r\nTo: bob@example.net\r\n"
        b"Subject: Five mebibytes\r\nDate: Mon, 23 Nov 2026 10:00:00 +0100\r\n"
        b"Message-ID: <large.shape@example.org>\r\nMIME-Version: 1.0\r\n"
        b"Content-Type: application/octet-stream\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    )
    noise = random.Random(5).randbytes(_MADE_SIZE * 57 // 78)
    body = base64.encodebytes(noise).replace(b"\n", b"\r\n")
    return address("five-mebibytes (made)", header + body)


def make_mail(sender: str, subject: str) -> Mail:
    """Return a short mail whose subject stands in nothing else."""
    text = f"From: {sender}\r\nTo: nobody@example.net\r\nSubject: {subject}\r\n\r\n{subject}\r\n"
    return address(subject, text.encode())


def _addresses(header: Message, *names: str) -> Iterator[str]:
    for name in names:
        for _, found in getaddresses([str(value) for value in header.get_all(name, [])]):
            if "@" in found:
                yield found
