"""Telling a sender what became of his mail: delivery status notifications (RFC 3464).

Text only: who sends it, when, and through which account, is `notices`' business.  A
notification has the null reverse-path, so that none is ever made for a notification, and
says ``Auto-Submitted`` (RFC 3834), so that no vacation program answers it.

Replies and headers are hostile text: every value is reduced to one line before it stands in
a field, and the boundary is made from what it separates.
"""

from __future__ import annotations

import quopri
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from enum import StrEnum
from itertools import islice
from typing import Final

from .address import ascii_host
from .envelope import digest
from .errors import InvalidAddress
from .interfaces import Outcome

#: How the reply of a recipient begins that was given up; the relay's words follow after "; ".
GIVEN_UP: Final = "given up after "

#: Recipients that are named: for people, and for programs.
_NAMED: Final = 100
_LISTED: Final = 1000

_MAX_HEADER: Final = 64 * 1024  # bytes of the original header that are returned
_MAX_REPLY: Final = 500  # characters: a field stays below the 998 of RFC 5322

_CODE = re.compile(r"[245]\d\d(?:[ -](?P<enhanced>[245]\.\d{1,3}\.\d{1,3})\b)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_PLAIN = re.compile(rb"[\t\n\x20-\x7e]*\Z")
_LONG = re.compile(rb"[^\n]{999}")
_MESSAGE_ID = re.compile(r"[!-;=?-~]{1,250}\Z")


class Action(StrEnum):
    """What happened, in the words of RFC 3464 section 2.3.3."""

    FAILED = "failed"
    DELAYED = "delayed"


@dataclass(frozen=True, slots=True)
class Notice:
    """What a notification tells.

    ``to``: the sender of the mail, who gets it.  ``recipients``: those concerned, with their
    last outcome.  ``message``: the mail, or its header, as it is stored.  ``message_id``: of
    the mail, without angle brackets.  ``queued_at``, ``now``, ``give_up_at``: seconds since
    the epoch.
    """

    action: Action
    to: str
    recipients: Mapping[str, Outcome]
    message: bytes
    message_id: str
    queued_at: float
    now: float
    give_up_at: float = 0.0


def notice_id(action: str, key: str, number: int | str, to: str) -> str:
    """Return the Message-Id of a notification: the same whenever it is made again.

    `key`, `number`: what it is about: the id of an entry, and the attempt.
    """
    try:
        domain = ascii_host(to.rpartition("@")[2])
        domain = f"[{domain}]" if ":" in domain else domain
    except InvalidAddress:
        domain = "localhost"
    return f"{action}.{digest(key)}.{number}@{domain}"


def compose(notice: Notice, *, message_id: str, reporting_mta: str) -> bytes:
    """Return the notification as a message: multipart/report (RFC 6522), lines end in LF.

    `message_id`: its own, without angle brackets.  `reporting_mta`: our host name.  A sender
    whose own address is not ASCII reads message/global-delivery-status (RFC 6533).
    """
    failed = notice.action is Action.FAILED
    international = not notice.to.isascii()
    kind = "message/global-delivery-status" if international else "message/delivery-status"
    status = _status(notice, reporting_mta, international=international)
    parts = [
        _text_part("text/plain", _text(notice).encode("utf-8", "replace")),
        _part(kind, "8bit" if international else "7bit", status),
        _text_part("text/rfc822-headers", original_header(notice.message)),
    ]
    boundary = "=_cpsmail_" + digest(b"\n".join(parts).decode("utf-8", "replace"))
    fields = [
        *_common_fields(notice.to, notice.now, message_id),
        ("Subject", f"Your mail {'could not be delivered' if failed else 'is delayed'}"),
        ("Auto-Submitted", "auto-replied"),
        ("MIME-Version", "1.0"),
        (
            "Content-Type",
            f'multipart/report; report-type={kind.partition("/")[2]};\n boundary="{boundary}"',
        ),
    ]
    if _MESSAGE_ID.match(notice.message_id):
        fields.append(("References", f"<{notice.message_id}>"))
    mark = f"--{boundary}".encode()
    body = b"".join(b"%s\n%s\n" % (mark, part) for part in parts)
    return _block(fields) + b"\n" + body + mark + b"--\n"


def compose_trouble(
    *, mailbox: str, reason: str, now: float, message_id: str, give_up: float
) -> bytes:
    """Return the mail that tells the owner of a mailbox that it cannot send.

    `give_up`: seconds that a mail may wait.
    """
    text = (
        f"The mailbox {_line(mailbox)} cannot send mail at the moment:\n\n"
        f"    {_line(reason)}\n\n"
        "Its mails wait; none is lost so far.  Once the settings of its account are right\n"
        "(password, host name, security), they leave by themselves, and at once.  What has\n"
        f"waited for {age_text(give_up)} is given up, and its sender is told.\n\n"
        "This is an automatic message, sent once, through another account.\n"
    )
    fields = [
        *_common_fields(mailbox, now, message_id),
        ("Subject", "Your mailbox cannot send mail"),
        ("Auto-Submitted", "auto-generated"),
        ("MIME-Version", "1.0"),
    ]
    return _block(fields) + _text_part("text/plain", text.encode("utf-8", "replace"))


def original_header(message: bytes) -> bytes:
    """Return the header of a message as it is, bounded, its lines ended by LF."""
    start = message[:_MAX_HEADER].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if start.startswith(b"\n"):
        return b"\n"  # it has none
    header, end, _ = start.partition(b"\n\n")
    if not end and len(message) > _MAX_HEADER:
        header = header[: header.rfind(b"\n") + 1] or header
    return header.rstrip(b"\n") + b"\n"


def age_text(seconds: float) -> str:
    """Return a time span as people say it: ``5 days``, ``4 hours``."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            number = round(seconds / size)
            return f"{number} {unit}{'s' if number > 1 else ''}"
    return f"{seconds:.0f} seconds"


def _common_fields(to: str, now: float, message_id: str) -> list[tuple[str, str]]:
    return [
        ("From", f"Mail Delivery System <{_line(to)}>"),
        ("To", f"<{_line(to)}>"),
        ("Date", _date(now)),
        ("Message-Id", f"<{message_id}>"),
    ]


def _text(notice: Notice) -> str:
    lines = ["This is an automatic message about a mail of yours"]
    if queued := _date(notice.queued_at):
        lines[0] += f" of {queued}"
    lines[0] += "."
    if notice.action is Action.FAILED:
        lines += [
            "",
            "It could not be delivered to the following recipients, and is not tried again:",
        ]
    else:
        lines += [
            "",
            "It has not been delivered yet to the following recipients.  You need not send it",
            f"again: it is tried until {_date(notice.give_up_at)}.",
        ]
    for recipient, outcome in islice(notice.recipients.items(), _NAMED):
        lines += ["", f"    {_line(recipient)}", f"        {_line(outcome.reply) or outcome.state}"]
    if (more := len(notice.recipients) - _NAMED) > 0:
        lines += ["", f"    and {more} more recipients"]
    return "\n".join([*lines, "", "The header of your mail is attached.", ""])


def _status(notice: Notice, reporting_mta: str, *, international: bool) -> bytes:
    """The part for programs: RFC 3464 section 2, one group of fields for each recipient."""
    mta = _line(reporting_mta).encode("ascii", "replace").decode("ascii")
    groups = [[("Reporting-MTA", f"dns; {mta}"), ("Arrival-Date", _date(notice.queued_at))]]
    for recipient, outcome in islice(notice.recipients.items(), _LISTED):
        reply = _relay_words(outcome.reply)
        groups.append(
            [
                ("Final-Recipient", _address(_line(recipient), international=international)),
                ("Action", str(notice.action)),
                ("Status", _enhanced(notice.action, outcome.reply, reply)),
                ("Diagnostic-Code", _diagnostic(reply)),
                ("Last-Attempt-Date", _date(outcome.at)),
                (
                    "Will-Retry-Until",
                    _date(notice.give_up_at) if notice.action is Action.DELAYED else "",
                ),
            ]
        )
    return b"\n".join(_block(group) for group in groups)


def _block(fields: Iterable[tuple[str, str]]) -> bytes:
    """Return fields whose values are safe already; empty ones are left out."""
    lines = (f"{name}: {value}\n" for name, value in fields if value)
    return "".join(lines).encode("utf-8", "replace")


def _part(kind: str, encoding: str, content: bytes) -> bytes:
    return f"Content-Type: {kind}\nContent-Transfer-Encoding: {encoding}\n\n".encode() + content


def _text_part(kind: str, content: bytes) -> bytes:
    if _PLAIN.match(content) and not _LONG.search(content):
        return _part(f"{kind}; charset=us-ascii", "7bit", content)
    try:
        content.decode("utf-8")
        charset = "utf-8"
    except UnicodeDecodeError:
        charset = "unknown-8bit"  # RFC 1428: nobody knows, and the bytes are kept
    return _part(f"{kind}; charset={charset}", "quoted-printable", quopri.encodestring(content))


def _line(text: str) -> str:
    return _CONTROL.sub(" ", text).strip()[:_MAX_REPLY]


def _date(when: float) -> str:
    try:
        return formatdate(when, localtime=True) if when > 0 else ""
    except (ValueError, OverflowError, OSError):
        return ""


def _address(recipient: str, *, international: bool) -> str:
    """RFC 3464 section 2.1.2; beyond ASCII RFC 6533 section 3: as it is, or utf-8-addr-xtext."""
    if recipient.isascii():
        return f"rfc822; {recipient}"
    if international:
        return f"utf-8; {recipient}"
    escaped = "".join(
        c if "!" <= c <= "~" and c not in "\\+=" else f"\\x{{{ord(c):02X}}}" for c in recipient
    )
    return f"utf-8; {escaped}"


def _relay_words(reply: str) -> str:
    return reply.partition("; ")[2] if reply.startswith(GIVEN_UP) else reply


def _diagnostic(reply: str) -> str:
    kind = "smtp" if _CODE.match(reply) else "x-cpsmail"
    text = _line(reply).encode("ascii", "replace").decode("ascii")
    return f"{kind}; {text or 'no reply'}"


def _enhanced(action: Action, outcome: str, reply: str) -> str:
    """The relay's own enhanced code when it fits, else the undefined one of its class."""
    if action is Action.FAILED and outcome.startswith(GIVEN_UP):
        return "5.4.7"  # RFC 3463: delivery time expired
    wanted = "5" if action is Action.FAILED else "4"
    found = _CODE.match(reply)
    enhanced = found["enhanced"] if found else None
    return enhanced if enhanced and enhanced[0] == wanted else f"{wanted}.0.0"
