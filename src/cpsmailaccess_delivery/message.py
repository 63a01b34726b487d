"""What `send` does to a message, and all it does: Bcc out, Message-Id and Date in.

Every other byte stays as it was given, so that signatures (DKIM, S/MIME, OpenPGP) hold.
"""

from __future__ import annotations

import platform
import re
from email.errors import MessageError
from email.header import decode_header, make_header
from email.message import Message
from email.policy import EmailPolicy
from email.utils import formatdate, getaddresses, make_msgid
from functools import lru_cache
from typing import Final

from .address import ascii_host, check_address
from .errors import InvalidAddress, InvalidMessage, MessageTooLarge

#: Bytes of a message that `send` takes unless the outbox says otherwise.
DEFAULT_SIZE_LIMIT: Final = 50 * 1024 * 1024

#: Bytes that no message has more of, whatever the limit: files are read in one piece.
LARGEST: Final = 1024 * 1024 * 1024

#: Bytes of a header that `send` takes: more than any reader or relay does.
MAX_HEADER: Final = 1024 * 1024

# One field of RFC 5322 section 2.2 with its continuation lines, whatever ends its lines.
_EOL = rb"(?:\r\n|\r|\n)"
_FIELD = re.compile(
    rb"([!-9;-~]+)[ \t]*:([^\r\n]*(?:" + _EOL + rb"[ \t][^\r\n]*)*+)(" + _EOL + rb"|\Z)"
)  # *+: nothing is kept for going back, which is 240 bytes a line
_MESSAGE_ID = re.compile(r"<([^<>\s\x00-\x1f\x7f]{1,250})>\Z")
_BCC: Final = (b"bcc", b"resent-bcc")
_AUTHORS: Final = (b"from", b"sender", b"resent-from", b"resent-sender")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_BETWEEN_ADDRESSES = re.compile(r'[\s<>()",;:]+')

#: Bytes of the fields, and addresses in them, that say whom a message is from.
_MAX_AUTHORS_TEXT: Final = 64 * 1024
_MAX_AUTHORS: Final = 200

# What relays refuse or readers cannot decode: RFC 5322 section 2.1.1, RFC 2047 section 2.
_LONG_LINE = re.compile(rb"[^\r\n]{999}")
_LONG_WORD = re.compile(rb"=\?[^?\s]{1,70}\?[BbQq]\?[^?\s]{72}")


def to_bytes(message: bytes | str | Message) -> bytes:
    """Return the message as bytes.  Raises `InvalidMessage`.

    ``bytes`` stay as they are; ``str`` is encoded as UTF-8, as zope.sendmail does; an
    `email.message.Message` is flattened without mangling lines that begin with "From ",
    and without folding its headers unless one of them could not travel otherwise.
    """
    if isinstance(message, bytes):
        return message
    if isinstance(message, bytearray | memoryview):
        return bytes(message)
    if isinstance(message, str):
        try:
            return message.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidMessage(
                "the message has lone surrogates; hand it over as bytes as it was read"
            ) from None
    if isinstance(message, Message):
        try:
            return _flatten(message)
        except _UNWRITABLE as error:
            raise InvalidMessage(f"the message cannot be written as bytes: {error}") from error
    raise InvalidMessage(
        f"the message is a {type(message).__name__}; give bytes, str or email.message.Message"
    )


#: What the email package raises on messages that contradict themselves.
_UNWRITABLE: Final = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MessageError,
    RecursionError,
)


def _flatten(message: Message) -> bytes:
    policy = message.policy.clone(mangle_from_=False)
    if isinstance(policy, EmailPolicy):
        policy = policy.clone(refold_source="none")  # what was parsed stays as it was
    flat = message.as_bytes(policy=policy.clone(max_line_length=None))
    header = flat.partition((policy.linesep * 2).encode())[0]
    made = any(type(value) is not str for _, value in message.raw_items())  # not parsed
    if _LONG_LINE.search(header) or (made and _LONG_WORD.search(header)):
        return message.as_bytes(policy=policy)
    return flat


def complete(
    data: bytes, *, sender: str, now: float, size_limit: int = DEFAULT_SIZE_LIMIT
) -> tuple[bytes, str]:
    """Return the message as it is stored, and its Message-Id without angle brackets.

    Removes Bcc and Resent-Bcc (RFC 5322 section 3.6.3); puts a missing Message-Id or Date
    in front.  `now`: seconds since the epoch.  Raises `InvalidMessage`,
    `MessageTooLarge`.
    """
    if len(data) > size_limit:
        raise MessageTooLarge(
            f"the message has {len(data):,} bytes; the outbox takes {size_limit:,}:"
            " send less, or raise size_limit"
        )
    kept, seen, eol, start = _walk_header(data)
    message_id = _own_message_id(seen.get(b"message-id"))
    added = b""
    if message_id is None:
        message_id = _new_message_id(sender)
        added += b"Message-Id: <" + message_id.encode() + b">" + eol
    if b"date" not in seen:
        added += b"Date: " + _date(int(now)) + eol
    if start > MAX_HEADER:
        raise InvalidMessage(
            f"the header has {start:,} bytes, and at most {MAX_HEADER:,} are taken: is the empty"
            " line after it missing?"
        )
    if not added and kept is None:
        return data, message_id
    header = [data[:start]] if kept is None else kept
    return _join([added, *header, data[start:]]), message_id


def _join(pieces: list[bytes]) -> bytes:
    """Join lines, so that a CR at an end and an LF at a beginning do not become one line end."""
    joined: list[bytes] = []
    for piece in filter(None, pieces):
        if joined and joined[-1].endswith(b"\r") and piece.startswith(b"\n"):
            joined.append(b"\n")
        joined.append(piece)
    return b"".join(joined)


def authors(data: bytes) -> tuple[str, ...]:
    """Return whom a message says it is from: addresses in From, Sender and Resent- forms.

    As they stand there, and as a reader may understand them who is more lenient than we are.  Of
    a field that cannot be read, whatever looks like an address.  Raises `InvalidMessage`: they are
    too many to be asked about.
    """
    fields = []
    position = 0
    while match := _FIELD.match(data, position):
        position = match.end()
        if match[1].lower() in _AUTHORS:
            fields.append(match[2])
    size = sum(map(len, fields))
    if size > _MAX_AUTHORS_TEXT:
        raise InvalidMessage(
            f"From, Sender and their like: have {size:,} bytes: at most {_MAX_AUTHORS_TEXT:,}"
        )
    found: dict[str, None] = {}
    for field in fields:
        text = " ".join(field.decode("utf-8", "replace").split())
        found |= dict.fromkeys(_addresses_in(text))
    if len(found) > _MAX_AUTHORS:
        raise InvalidMessage(
            f"From, Sender and their like: name {len(found)} addresses: at most {_MAX_AUTHORS}"
        )
    return tuple(found)


def _addresses_in(value: str) -> list[str]:
    value = _CONTROL.sub("", value)
    try:
        found = [address for _, address in getaddresses([value]) if "@" in address]
    except RecursionError:  # comments in comments in comments
        found = []
    if not found or not all(map(_is_address, found)):
        found += _like_addresses(value)
        if "=?" in value:  # an encoded word has no place in an address, yet readers decode it
            found += _like_addresses(_decoded(value))
    else:
        found += [_decoded(address) for address in found if "=?" in address]
    return [address.rstrip(".") for address in found]


def _like_addresses(value: str) -> list[str]:
    return [word for word in _BETWEEN_ADDRESSES.split(value) if "@" in word.strip("@")]


def _is_address(text: str) -> bool:
    try:
        check_address(text)
    except InvalidAddress:
        return False
    return True


def _decoded(text: str) -> str:
    try:
        return str(make_header(decode_header(text)))
    except (MessageError, ValueError, LookupError):
        return text


def find_message_id(data: bytes) -> str | None:
    """Return the Message-Id of a message without angle brackets; None: none that is valid."""
    try:
        return _own_message_id(_walk_header(data)[1].get(b"message-id"))
    except InvalidMessage:
        return None


def _walk_header(data: bytes) -> tuple[list[bytes] | None, dict[bytes, bytes], bytes, int]:
    """Read the header once.

    Returns the fields to keep (None: all, nothing was dropped), the first value of each
    field by lower-case name, the line end in use, and where the header ends.
    """
    seen: dict[bytes, bytes] = {}
    cuts: list[tuple[int, int]] = []
    eol = b"\n"
    position = 0
    while match := _FIELD.match(data, position):
        name = match[1].lower()
        if not position and match[3]:
            eol = match[3]
        seen.setdefault(name, match[2])
        if name in _BCC:
            cuts.append(match.span())
        position = match.end()
    if position < len(data) and data[position] not in b"\r\n":
        # Not the line itself: it may be of the body, which is nobody's business.
        line = len(re.findall(_EOL, data[:position])) + 1
        raise InvalidMessage(
            f"line {line} is not a header field (Name: value): a message begins with its"
            " header, then an empty line, then the body"
        )
    if not position:
        if not data:
            raise InvalidMessage("the message is empty")
        eol = b"\r\n" if data.startswith(b"\r\n") else b"\n"
    if not cuts:
        return None, seen, eol, position
    kept, start = [], 0
    for begin, end in cuts:
        kept.append(data[start:begin])
        start = end
    kept.append(data[start:position])
    return kept, seen, eol, position


def _own_message_id(value: bytes | None) -> str | None:
    if value is None or not value.strip():
        return None
    match = _MESSAGE_ID.match(value.decode("utf-8", "replace").strip())
    if not match:
        raise InvalidMessage(
            f"Malformed Message-Id header {value.strip()[:80]!r}: it is one <id> in angle"
            " brackets; leave it out and one is made"
        )
    return match[1]


@lru_cache(16)  # mails of one transaction are of the same second
def _date(now: int) -> bytes:
    return formatdate(now, localtime=True).encode()


def _new_message_id(sender: str) -> str:
    domain = sender.rpartition("@")[2]
    try:
        domain = ascii_host(domain)
    except InvalidAddress:  # none, or an address literal; never a name look-up, which may hang
        domain = platform.node() or "localhost"
    return make_msgid(domain=domain)[1:-1]
