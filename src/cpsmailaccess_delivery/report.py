"""What a notification tells, and the part of it that programs read (RFC 3464 section 2).

Replies are hostile text: every value is reduced to one line, bounded, and its kind of field by
field; no reply can add a field or a group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from enum import StrEnum
from itertools import islice
from typing import Final

from .address import is_ip_address
from .dsn import seven_bit_address
from .interfaces import Outcome

#: How the reply of a recipient begins that was given up; the relay's words follow after "; ".
GIVEN_UP: Final = "given up after "

#: The same of a mail whose sender has set a time after which it is not tried any more.
EXPIRED: Final = "expired"

#: Recipients that are listed.
_LISTED: Final = 1000

_MAX_TEXT: Final = 500  # characters
_MAX_FIELD: Final = 900  # octets of a value: a line stays below the 998 of RFC 5322
_WIDTH: Final = 78  # characters of a line, where it can be folded

_CODE = re.compile(r"[245]\d\d(?:[ -](?P<enhanced>[245]\.\d{1,3}\.\d{1,3})(?!\S))?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_MESSAGE_ID = re.compile(r"[!-;=?-~]{1,250}\Z")

#: Subject and detail (RFC 3463) of replies that name none; codes that mean many things have none.
_DETAILS: Final = {
    "421": "3.2",  # system not accepting network messages
    "450": "2.0",  # something about the mailbox
    "451": "3.0",  # something about the system
    "452": "3.1",  # system full
    "454": "7.0",  # security, and so the next three
    "530": "7.0",
    "534": "7.0",
    "535": "7.0",
    "551": "1.6",  # mailbox has moved
    "552": "2.2",  # mailbox full
    "553": "1.3",  # bad mailbox address syntax
    "555": "5.4",  # invalid command arguments
}


class Action(StrEnum):
    """What happened, in the words of RFC 3464 section 2.3.3."""

    FAILED = "failed"
    DELAYED = "delayed"
    RELAYED = "relayed"  # accepted by a relay that sends no notifications


_CLASS: Final = {Action.FAILED: "5", Action.DELAYED: "4", Action.RELAYED: "2"}


@dataclass(frozen=True, slots=True)
class Notice:
    """What a notification tells.

    ``to``: the sender of the mail, who gets it.  ``recipients``: those concerned, with their
    last outcome.  ``message``: the mail, or its header, as it is stored.  ``message_id``: of
    the mail, without angle brackets.  ``queued_at``, ``now``, ``give_up_at``: seconds since
    the epoch.  ``full``: return the whole mail, not its header.
    """

    action: Action
    to: str
    recipients: Mapping[str, Outcome]
    message: bytes
    message_id: str
    queued_at: float
    now: float
    give_up_at: float = 0.0
    full: bool = False

    @property
    def international(self) -> bool:
        """Whether its reader takes addresses beyond ASCII as they are (RFC 6533)."""
        return not self.to.isascii()

    @property
    def envelope_id(self) -> str:
        """What the sender knows the mail by, or "": its Message-Id is none."""
        return self.message_id if _MESSAGE_ID.match(self.message_id) else ""


def delivery_status(notice: Notice, *, reporting_mta: str, remote_mta: str) -> bytes:
    """Return the fields of the whole mail, then a group for each recipient.

    `reporting_mta`: our host name.  `remote_mta`: host of the relay, whose words they are.
    """
    about = [
        ("Original-Envelope-Id", notice.envelope_id),
        ("Reporting-MTA", f"dns; {_ascii(one_line(reporting_mta))}"),
        ("Arrival-Date", date(notice.queued_at)),
    ]
    groups = [block(about)]
    for recipient, outcome in islice(notice.recipients.items(), _LISTED):
        address = _address(one_line(recipient), international=notice.international)
        reply = _relay_words(outcome.reply)
        delayed = notice.action is Action.DELAYED
        group = [
            ("Original-Recipient", address),
            ("Final-Recipient", address),
            ("Action", str(notice.action)),
            ("Status", status_code(notice.action, outcome.reply)),
            ("Remote-MTA", _remote(remote_mta) if _CODE.match(reply) else ""),
            ("Diagnostic-Code", _diagnostic(reply, international=notice.international)),
            ("Last-Attempt-Date", date(outcome.at)),
            ("Will-Retry-Until", date(notice.give_up_at) if delayed else ""),
        ]
        groups.append(block(group))
    return b"\n".join(groups)


def status_code(action: Action, reply: str) -> str:
    """Return the status of a recipient: the relay's own enhanced code, else one that fits.

    Its class follows from the action (RFC 3464 section 2.3.4): a relay's 552 may be temporary.
    """
    if action is Action.FAILED and reply.startswith((GIVEN_UP, EXPIRED)):
        return "5.4.7"  # RFC 3463: delivery time expired
    detail = "0.0"
    reply = _relay_words(reply)
    if found := _CODE.match(reply):
        enhanced = found["enhanced"]
        if enhanced and enhanced[0] == reply[0]:
            detail = enhanced[2:]
        else:
            detail = _DETAILS.get(reply[:3], detail)
    return f"{_CLASS[action]}.{detail}"


def block(fields: Iterable[tuple[str, str]]) -> bytes:
    """Return fields whose values are one line; bounded, long ones folded, empty ones left out."""
    return b"".join(_field(name, value) for name, value in fields if value)


def one_line(text: str) -> str:
    """Return a text of strangers as one line, bounded."""
    return _CONTROL.sub(" ", text).strip()[:_MAX_TEXT]


def date(when: float) -> str:
    """Return seconds since the epoch as a header has them; "": that is no time."""
    try:
        return formatdate(when, localtime=True) if when > 0 else ""
    except (ValueError, OverflowError, OSError):
        return ""


def _field(name: str, value: str) -> bytes:
    value = value.encode("utf-8", "replace")[:_MAX_FIELD].decode("utf-8", "ignore")
    if name == "Diagnostic-Code":
        value = _fold(f"{name}: ", value)
    return f"{name}: {value}\n".encode()


def _fold(before: str, value: str) -> str:
    lines = [before]
    for word in value.split(" "):
        if len(lines[-1]) + len(word) > _WIDTH and lines[-1].strip():
            lines.append(" ")
        lines[-1] += f"{word} "
    return "\n".join(line.rstrip() for line in lines).removeprefix(before)


def _address(recipient: str, *, international: bool) -> str:
    """RFC 3464 section 2.1.2; beyond ASCII RFC 6533 section 3: as it is, or utf-8-addr-xtext."""
    if recipient.isascii():
        return f"rfc822; {recipient}"
    return f"utf-8; {recipient if international else seven_bit_address(recipient)}"


def _remote(host: str) -> str:
    """RFC 3464 section 2.1.1: a name, or a literal of RFC 5321 section 4.1.3."""
    if is_ip_address(host):
        host = f"[IPv6:{host}]" if ":" in host else f"[{host}]"
    return f"dns; {_ascii(one_line(host))}" if host else ""


def _relay_words(reply: str) -> str:
    given_up = reply.startswith((GIVEN_UP, f"{EXPIRED}; "))
    return reply.partition("; ")[2] if given_up else reply


def _diagnostic(reply: str, *, international: bool) -> str:
    kind = "smtp" if _CODE.match(reply) else "x-cpsmail"
    text = " ".join(one_line(reply).split())
    return f"{kind}; {(text if international else _ascii(text)) or 'no reply'}"


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode("ascii")
