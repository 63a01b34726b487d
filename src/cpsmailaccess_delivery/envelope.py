"""The private block: how envelope and route stand in front of a message in the spool.

::

    X-Zope-Envelope: 1
    X-Zope-From: alice@example.org
    X-Zope-To: bob@example.net, carol@example.net
    X-Zope-Hostname: smtp.example.org
    X-Zope-Port: 587
    X-Zope-Mailbox: alice@example.org
    X-Zope-Message-Id: 17323692.4711@example.org
    X-Zope-Token: 4f0c...
    X-Zope-Not-Before: 1732369200.25
    X-Zope-Expires: 1732455600
    X-Zope-Priority: 8
    X-Zope-Key: invoice 4711
    X-Zope-Notify: failure,delay
    X-Zope-Ret: full

    From: ... (the message, opaque from here)

The block is framing, not mail headers: it ends at its first empty line, each field stands
at most once, in this order, and a field that is not ours makes the file unreadable rather than
sent.  A file that begins with ``X-Zope-From:`` was written by zope.sendmail, whose block
is two lines and has no empty line after it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from email.utils import getaddresses
from functools import lru_cache
from typing import Final, NamedTuple

from .account import DEFAULT_MAILBOX
from .address import check_address, check_recipients, relay_name
from .dsn import NOTIFIES, RETURNS, Wish
from .errors import InvalidAddress, InvalidEnvelope, NoRecipients
from .interfaces import NORMAL_PRIORITY
from .message import find_message_id

VERSION: Final = 1

_FIRST: Final = b"X-Zope-Envelope: "
_FIELDS: Final = (
    "X-Zope-From",
    "X-Zope-To",
    "X-Zope-Hostname",
    "X-Zope-Port",
    "X-Zope-Mailbox",
    "X-Zope-Message-Id",
    "X-Zope-Token",
    "X-Zope-Not-Before",
    "X-Zope-Expires",
    "X-Zope-Priority",
    "X-Zope-Key",
    "X-Zope-Notify",
    "X-Zope-Ret",
)
_PRIORITIES: Final = range(10)
_PRIORITY_DIGITS: Final = [str(each) for each in _PRIORITIES if each != NORMAL_PRIORITY]
_FOREIGN: Final = b"X-Zope-From: "
_MAX_BLOCK: Final = 4 * 1024 * 1024  # bytes: more recipients than any mail may have
_TIME = re.compile(r"(?:0|[1-9]\d{0,10})(?:\.\d{0,2}[1-9])?", re.ASCII)  # as `names` has it
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f]")
_BLOCK = re.compile(
    f"X-Zope-Envelope: {VERSION}\n" + "".join(f"(?:{name}: (.*)\n)?" for name in _FIELDS) + "\n"
)
_QUOTED_OR_COMMA = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|(, )')  # \Z: linear in any text


@dataclass(frozen=True, slots=True)
class Route:
    """What is stamped on a mail at `send`: a mailbox and its relay, or a relay alone.

    ``mailbox`` is the key of the account; "" for a relay without login.  ``host`` and
    ``port`` are then the relay; beside a mailbox they only say where its account
    pointed at `send`: credentials go to the relay that the account names now.
    """

    mailbox: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        return self.mailbox or relay_name(self.host, self.port)


class Envelope(NamedTuple):
    """Envelope of one mail (RFC 5321 section 2.3.1), its route and its options.

    ``sender`` "" is the null reverse-path.  ``message_id`` has no angle brackets.
    ``token`` names the transaction for a witness.  ``not_before`` and ``expires``: seconds
    since the epoch, in whole milliseconds; it is sent between them; 0: no limit.
    ``priority``: 0 to 9.  ``key``: no second mail with the same one is committed; "": none.
    ``notify``: of what the sender is told, one of `dsn.NOTIFIES`; ``ret``: what of the mail is
    returned to him, one of `dsn.RETURNS`; "": nothing was said.
    """

    sender: str
    recipients: tuple[str, ...]
    route: Route = Route()
    message_id: str = ""
    token: str = ""
    not_before: float = 0.0
    expires: float = 0.0
    priority: int = NORMAL_PRIORITY
    key: str = ""
    notify: str = ""
    ret: str = ""

    @property
    def wish(self) -> Wish | None:
        """What a relay is asked to tell the sender (RFC 3461); None: nothing was said."""
        if not (self.notify or self.ret):
            return None
        return Wish(self.notify, self.ret, self.message_id)


def lane_key(route: Route) -> str:
    """Return the lane of a route as it stands in file names: 16 hexadecimal digits.

    An index, not an identity: what is sent through an account is decided by the
    envelope alone.
    """
    return digest(str(route))


def digest(text: str) -> str:
    """Return 16 hexadecimal digits that stand for a text in a file name."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def format_block(envelope: Envelope) -> bytes:
    """Return the private block with its closing empty line, in UTF-8.

    Raises `InvalidEnvelope` when a value would break the framing.
    """
    route = envelope.route
    if not envelope.recipients:
        raise InvalidEnvelope("X-Zope-To: is empty; a mail has at least one recipient")
    if not route.mailbox and not (route.host and route.port):
        raise InvalidEnvelope("the route names neither a mailbox nor a relay")
    if not 0 <= route.port < 65536:
        raise InvalidEnvelope(f"X-Zope-Port: {route.port} is no port")
    recipients = ", ".join(envelope.recipients)
    if not all(envelope.recipients) or _split(recipients) != tuple(envelope.recipients):
        raise InvalidEnvelope(f"X-Zope-To: {recipients[:200]!r} does not read back as it is meant")
    values = (
        envelope.sender,
        recipients,
        route.host,
        str(route.port) if route.port else "",
        route.mailbox,
        envelope.message_id,
        envelope.token,
        _format_time("X-Zope-Not-Before", envelope.not_before),
        _format_time("X-Zope-Expires", envelope.expires),
        "" if envelope.priority == NORMAL_PRIORITY else str(envelope.priority),
        envelope.key,
        envelope.notify,
        envelope.ret,
    )
    if envelope.priority not in _PRIORITIES:
        raise InvalidEnvelope(f"X-Zope-Priority: {envelope.priority!r} is not from 0 to 9")
    for name, word, words in (
        ("X-Zope-Notify", envelope.notify, NOTIFIES),
        ("X-Zope-Ret", envelope.ret, RETURNS),
    ):
        if word and word not in words:
            raise InvalidEnvelope(f"{name}: {word!r} is none of {', '.join(words)}")
    lines = [f"X-Zope-Envelope: {VERSION}"]
    for name, value in zip(_FIELDS, values, strict=True):
        if value or name == "X-Zope-From":
            lines.append(f"{name}: {value}")
    text = "\n".join(lines) + "\n\n"
    if text.count("\n") > len(lines) + 1 or _is_odd(text):
        _check_values(values)
    try:
        block = text.encode()
    except UnicodeEncodeError:
        raise InvalidEnvelope("the envelope has a lone surrogate; addresses are Unicode") from None
    if len(block) > _MAX_BLOCK:
        raise InvalidEnvelope(
            f"the envelope has {len(block):,} bytes, at most {_MAX_BLOCK:,} are read: send the"
            " mail to fewer recipients at once"
        )
    return block


def parse_block(data: bytes) -> tuple[Envelope, int]:
    """Return the envelope in front of a message, and the offset where the message begins.

    Also reads the files of zope.sendmail; they go through the default account.
    Raises `InvalidEnvelope`.
    """
    if data.startswith(_FIRST):
        return _parse_own(data)
    if data.startswith(_FOREIGN):
        return _parse_zope_sendmail(data)
    raise InvalidEnvelope(
        f"the file begins with {data[:24]!r}, not with X-Zope-Envelope or X-Zope-From:"
        " it is no mail of this outbox or of zope.sendmail"
    )


def _parse_own(data: bytes) -> tuple[Envelope, int]:
    end = data.find(b"\n\n", 0, _MAX_BLOCK) + 2
    if end < 2:
        raise InvalidEnvelope("the private block has no end: the file was cut off")
    try:
        block = data[:end].decode()
    except UnicodeDecodeError:
        raise InvalidEnvelope("the private block is not UTF-8") from None
    match = _BLOCK.match(block)
    if match is None:
        raise InvalidEnvelope(_what_is_wrong(block))
    if _is_odd(block):
        _check_values(match.groups(""))
    sender, to, host, port, mailbox, message_id, token, *wishes = match.groups()
    not_before, expires, priority, key, notify, ret = wishes
    if sender is None or not to:
        raise InvalidEnvelope("X-Zope-From or X-Zope-To is missing")
    recipients = _split(to)
    if not all(recipients):
        raise InvalidEnvelope("X-Zope-To has an empty address")
    envelope = Envelope(
        sender=sender,
        recipients=recipients,
        route=_parse_route(mailbox or "", host or "", "0" if port is None else port),
        message_id=message_id or "",
        token=token or "",
        not_before=_parse_time("X-Zope-Not-Before", not_before),
        expires=_parse_time("X-Zope-Expires", expires),
        priority=_parse_priority(priority),
        key=key or "",
        notify=_parse_word("X-Zope-Notify", notify, NOTIFIES),
        ret=_parse_word("X-Zope-Ret", ret, RETURNS),
    )
    return envelope, end


def _what_is_wrong(block: str) -> str:
    """Say why a block does not have the form of `_BLOCK`."""
    first, *lines = block.split("\n")[:-2]
    if first != f"X-Zope-Envelope: {VERSION}":
        return f"{first[:60]!r}: this release reads version {VERSION}"
    expected = iter(_FIELDS)
    for line in lines:
        name, colon, _ = line.partition(": ")
        if not colon or name not in expected:  # consumes: so order and number are checked
            return f"{line[:60]!r}: unknown, repeated or out of order"
    return "the private block cannot be read"


def _is_odd(block: str) -> bool:
    """Glance at the whole block: nearly always no value needs a look of its own."""
    return " \n" in block or ":  " in block or not block.replace("\n", "").isprintable()


def _check_values(values: Sequence[str]) -> None:
    for name, value in zip(_FIELDS, values, strict=True):
        if _FORBIDDEN.search(value) or value != value.strip():
            raise InvalidEnvelope(f"{name}: {value!r:.200} has a control character or outer space")


@lru_cache(1024)
def _parse_route(mailbox: str, host: str, port: str) -> Route:
    """Return a route; those of one account are one object."""
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and int(port) < 65536):
        raise InvalidEnvelope(f"X-Zope-Port: {port[:20]!r} is no port")
    route = Route(mailbox=mailbox, host=host, port=int(port))
    if not mailbox and not (host and route.port):
        raise InvalidEnvelope("the block names neither a mailbox nor a relay")
    return route


def _format_time(name: str, seconds: float) -> str:
    """Return a time in the only way in which it is written; 0 is none at all."""
    if seconds == 0:
        return ""
    text = f"{seconds:.3f}".rstrip("0").rstrip(".")
    if not _TIME.fullmatch(text) or float(text) != seconds:
        raise InvalidEnvelope(f"{name}: {seconds!r} is no time in whole milliseconds")
    return text


def _parse_time(name: str, text: str | None) -> float:
    if text is None:
        return 0.0
    if text == "0" or not _TIME.fullmatch(text):
        raise InvalidEnvelope(f"{name}: {text[:20]!r} is no time")
    return float(text)


def _parse_priority(text: str | None) -> int:
    if text is None:
        return NORMAL_PRIORITY
    if text not in _PRIORITY_DIGITS:
        raise InvalidEnvelope(f"X-Zope-Priority: {text[:20]!r} is not from 0 to 9")
    return int(text)


def _parse_word(name: str, text: str | None, words: Collection[str]) -> str:
    if text is None:
        return ""
    if text not in words:
        raise InvalidEnvelope(f"{name}: {text[:60]!r} is not written so")
    return text


def _parse_zope_sendmail(data: bytes) -> tuple[Envelope, int]:
    first = data.find(b"\n")
    second = data.find(b"\n", first + 1, _MAX_BLOCK)
    if first < 0 or second < 0 or not data.startswith(b"X-Zope-To: ", first + 1):
        raise InvalidEnvelope("X-Zope-To is missing after X-Zope-From (a file of zope.sendmail)")
    try:
        sender = data[len(_FOREIGN) : first].decode()
        to = data[first + len(b"\nX-Zope-To: ") : second].decode()
        if _FORBIDDEN.search(to):
            raise InvalidEnvelope("X-Zope-To has a control character (a file of zope.sendmail)")
        recipients = check_recipients(address for _, address in getaddresses([to]) if address)
        if sender.strip():
            sender = check_address(sender)
    except (UnicodeDecodeError, InvalidAddress, NoRecipients, RecursionError) as error:
        raise InvalidEnvelope(f"a file of zope.sendmail: {error}") from None
    message = data[second + 1 :]
    envelope = Envelope(
        sender=sender.strip(),
        recipients=recipients,
        route=Route(mailbox=DEFAULT_MAILBOX),
        message_id=find_message_id(message) or "",
    )
    return envelope, second + 1


def _split(value: str) -> tuple[str, ...]:
    """Split at ", ", but not inside a quoted local part (RFC 5321 section 4.1.2)."""
    if '"' not in value:
        return tuple(value.split(", "))
    parts, start = [], 0
    for match in _QUOTED_OR_COMMA.finditer(value):
        if match.group(1):
            parts.append(value[start : match.start()])
            start = match.end()
    parts.append(value[start:])
    return tuple(parts)
