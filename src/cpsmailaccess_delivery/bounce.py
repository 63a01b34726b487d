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
from itertools import islice
from typing import Final

from .address import ascii_host
from .envelope import digest
from .errors import InvalidAddress
from .report import Action, Notice, block, date, delivery_status, one_line, status_code

#: Recipients that are named for people.
_NAMED: Final = 100

_MAX_HEADER: Final = 64 * 1024  # bytes of the original header that are returned
_MAX_FULL: Final = 5 * 1024 * 1024  # bytes of a mail that is returned: relays take twice as much

_PLAIN = re.compile(rb"[\t\n\x20-\x7e]*\Z")
_LONG = re.compile(rb"[^\n]{999}")

#: Too large, or cannot be converted for this relay (RFC 3463): so it would not take it back.
_TOO_MUCH: Final = ("5.2.3", "5.3.4", "5.6.")

_SUBJECTS: Final = {
    Action.FAILED: "Your mail could not be delivered",
    Action.DELAYED: "Your mail is delayed",
    Action.RELAYED: "Your mail was passed on",
}


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


def compose(notice: Notice, *, message_id: str, reporting_mta: str, remote_mta: str = "") -> bytes:
    """Return the notification as a message: multipart/report (RFC 6522), lines end in LF.

    `message_id`: its own, without angle brackets.  `reporting_mta`: our host name; `remote_mta`:
    that of the relay.  A sender whose own address is not ASCII reads
    message/global-delivery-status (RFC 6533).
    """
    international = notice.international
    kind = "message/global-delivery-status" if international else "message/delivery-status"
    status = delivery_status(notice, reporting_mta=reporting_mta, remote_mta=remote_mta)
    whole = _whole(notice)
    parts = [
        _text_part("text/plain", _text(notice, whole is not None).encode("utf-8", "replace")),
        _part(kind, "8bit" if international else "7bit", status),
        _header(notice) if whole is None else whole,
    ]
    boundary = "=_cpsmail_" + digest(b"\n".join(parts).decode("utf-8", "replace"))
    fields = [
        *_common_fields(notice.to, notice.now, message_id),
        ("Subject", _SUBJECTS[notice.action]),
        ("Auto-Submitted", "auto-replied"),
        ("MIME-Version", "1.0"),
        (
            "Content-Type",
            f'multipart/report; report-type={kind.partition("/")[2]};\n boundary="{boundary}"',
        ),
    ]
    if notice.envelope_id:
        fields.append(("References", f"<{notice.envelope_id}>"))
    mark = f"--{boundary}".encode()
    body = b"".join(b"%s\n%s\n" % (mark, part) for part in parts)
    return block(fields) + b"\n" + body + mark + b"--\n"


def compose_trouble(
    *, mailbox: str, reason: str, now: float, message_id: str, give_up: float
) -> bytes:
    """Return the mail that tells the owner of a mailbox that it cannot send.

    `give_up`: seconds that a mail may wait.
    """
    text = (
        f"The mailbox {one_line(mailbox)} cannot send mail at the moment:\n\n"
        f"    {one_line(reason)}\n\n"
        "Its mails wait; none is lost so far.  Once its mail server works, and the settings of\n"
        "its account are right (password, host name, security), they leave by themselves.  What\n"
        f"has waited for {age_text(give_up)} is given up, and its sender is told.\n\n"
        "This is an automatic message, sent once, through another account.\n"
    )
    fields = [
        *_common_fields(mailbox, now, message_id),
        ("Subject", "Your mailbox cannot send mail"),
        ("Auto-Submitted", "auto-generated"),
        ("MIME-Version", "1.0"),
    ]
    return block(fields) + _text_part("text/plain", text.encode("utf-8", "replace"))


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
        ("From", f"Mail Delivery System <{one_line(to)}>"),
        ("To", f"<{one_line(to)}>"),
        ("Date", date(now)),
        ("Message-Id", f"<{message_id}>"),
    ]


def _text(notice: Notice, whole: bool) -> str:
    lines = ["This is an automatic message about a mail of yours"]
    if queued := date(notice.queued_at):
        lines[0] += f" of {queued}"
    lines[0] += "."
    if notice.action is Action.FAILED:
        lines += [
            "",
            "It could not be delivered to the following recipients, and is not tried again:",
        ]
    elif notice.action is Action.DELAYED:
        lines += [
            "",
            "It has not been delivered yet to the following recipients.  You need not send it",
            f"again: it is tried until {date(notice.give_up_at)}.",
        ]
    else:
        lines += [
            "",
            "It was taken by the next mail server, which sends no such messages: you may not hear",
            "of its delivery to the following recipients:",
        ]
    for recipient, outcome in islice(notice.recipients.items(), _NAMED):
        reply = one_line(outcome.reply) or outcome.state
        lines += ["", f"    {one_line(recipient)}", f"        {reply}"]
    if (more := len(notice.recipients) - _NAMED) > 0:
        lines += ["", f"    and {more} more recipients"]
    what = "Your mail" if whole else "The header of your mail"
    return "\n".join([*lines, "", f"{what} is attached.", ""])


def _whole(notice: Notice) -> bytes | None:
    """Return the mail as a part, when it is wanted; None: its header must do.

    It must do for what this relay would not take back: see `_TOO_MUCH`; what is too large for
    most; and what cannot stand in a message as it is (RFC 2046 section 5.2.1).
    """
    message = notice.message
    if not notice.full or len(message) > _MAX_FULL:
        return None
    codes = {status_code(notice.action, outcome.reply) for outcome in notice.recipients.values()}
    if any(code.startswith(_TOO_MUCH) for code in codes):
        return None
    message = message.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if b"\0" in message or _LONG.search(message):
        return None
    header = message.partition(b"\n\n")[0]
    if not _is_utf8(header):
        return None
    kind = "message/rfc822" if header.isascii() else "message/global"
    return _part(kind, "7bit" if message.isascii() else "8bit", message)


def _header(notice: Notice) -> bytes:
    header = original_header(notice.message)
    fits = _is_utf8(header) and b"\0" not in header and not _LONG.search(header)
    if notice.international and fits and not header.isascii():
        return _part("message/global-headers", "8bit", header)
    return _text_part("text/rfc822-headers", header)


def _part(kind: str, encoding: str, content: bytes) -> bytes:
    return f"Content-Type: {kind}\nContent-Transfer-Encoding: {encoding}\n\n".encode() + content


def _text_part(kind: str, content: bytes) -> bytes:
    if _PLAIN.match(content) and not _LONG.search(content):
        return _part(f"{kind}; charset=us-ascii", "7bit", content)
    # RFC 1428: nobody knows, and the bytes are kept
    charset = "utf-8" if _is_utf8(content) else "unknown-8bit"
    return _part(f"{kind}; charset={charset}", "quoted-printable", quopri.encodestring(content))


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
