"""The 7-bit fallback: a message for a relay that takes less than the message has.

For a relay without 8BITMIME (RFC 6152 section 3), leaf parts become quoted-printable or
base64; for one without SMTPUTF8 (RFC 6531), raw UTF-8 header fields become encoded words
(RFC 2047) or parameters of RFC 2231.  Raw header bytes in another charset were never
allowed and are sent as they are, where 8 bits pass at all.  Every other byte stays.  What is
signed is never touched: better refused than delivered with a broken signature.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from email.errors import MessageError
from email.header import Header
from email.message import Message
from email.parser import BytesHeaderParser
from email.utils import formataddr, getaddresses
from itertools import count
from typing import Final

from ..address import ascii_host
from ..errors import InvalidAddress
from .wire import crlf, split_header

_FIELD = re.compile(rb"([!-9;-~]+)[ \t]*:([^\r\n]*(?:\r\n[ \t][^\r\n]*)*)\r\n")
_SIGNATURE = re.compile(rb"^DKIM-Signature[ \t]*:", re.IGNORECASE | re.MULTILINE)
_8BIT = re.compile(rb"[\x80-\xff]")
_ALL_8BIT: Final = bytes(range(128, 256))
_ADDRESSES: Final = frozenset(
    prefix + name
    for prefix in ("", "resent-")
    for name in ("from", "sender", "to", "cc", "reply-to")
)
_PKCS7: Final = ("application/pkcs7-mime", "application/x-pkcs7-mime")
# The email package takes quadratic time for some of what follows.
_MAX_DEPTH: Final = 30
_MAX_PARTS: Final = 10_000
_MAX_HEADER: Final = 256 * 1024  # bytes of one header that is converted
_MAX_FIELD: Final = 4 * 1024  # bytes of a field with parameters
_HAS_PARAMETERS: Final = (b"content-type", b"content-disposition")

#: What the email package raises on hostile MIME.
_UNREADABLE: Final = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    MessageError,
    RecursionError,
)


class CannotConvert(Exception):
    """The message cannot be made to fit; the text says why."""


def fit(message: bytes, *, eightbit: bool, smtputf8: bool) -> tuple[bytes, bool]:
    """Return CRLF lines as a relay can take them, and whether they need SMTPUTF8.

    `eightbit`, `smtputf8`: what the relay offers.  Raises `CannotConvert`.
    """
    header, body = split_header(message)
    needs_utf8 = not header.isascii() and _is_utf8(header)
    keep_header = header.isascii() or (smtputf8 if needs_utf8 else eightbit)
    keep_body = eightbit or body.isascii()
    if keep_header and keep_body:
        return message, needs_utf8
    if _SIGNATURE.search(header):
        raise CannotConvert("it has a DKIM signature")
    try:
        if not keep_header:
            header = _encode_header(header)
        if keep_body:
            return header + body, False
        return crlf(_convert(header + body, parts=count())), False
    except _UNREADABLE as error:
        raise CannotConvert(f"its MIME structure is broken ({error})") from error


def _convert(
    part: bytes, default: str = "text/plain", depth: int = 0, *, parts: Iterator[int]
) -> bytes:
    """Return one part, or a whole message, in 7 bits.  `parts`: counts them."""
    if part.isascii():
        return part
    if next(parts) > _MAX_PARTS:
        raise CannotConvert(f"it has more than {_MAX_PARTS:,} parts with 8-bit text")
    header, body = split_header(part)
    if not header.isascii():
        header = _encode_header(header)
    if body.isascii():
        return header + body
    if depth > _MAX_DEPTH:
        raise CannotConvert("its parts are nested too deep")
    _check_size(header)
    info = BytesHeaderParser().parsebytes(header)
    info.set_default_type(default)
    kind = info.get_content_type()
    if kind == "multipart/signed" or (kind in _PKCS7 and _is_signed_data(info)):
        raise CannotConvert("it is signed")
    if info.get_content_maintype() == "multipart":
        return _with_encoding(header, b"7bit") + _convert_parts(info, body, depth, parts)
    if kind == "message/rfc822":
        return (
            _with_encoding(header, b"7bit")
            + b"\r\n"
            + _convert(body[2:], depth=depth + 1, parts=parts)
        )
    return _convert_leaf(info, header, body[2:], top=not depth)


def _convert_parts(info: Message, body: bytes, depth: int, parts: Iterator[int]) -> bytes:
    boundary = str(info.get_boundary() or "").encode("ascii")
    marks = re.compile(rb"(?:\A|\r\n)--" + re.escape(boundary) + rb"(--)?[ \t]*(?=\r\n|\Z)")
    default = "message/rfc822" if info.get_content_subtype() == "digest" else "text/plain"
    out, end, inside = [], 0, False
    for mark in marks.finditer(body):
        piece = body[end : mark.start()]
        if inside and piece.startswith(b"\r\n"):
            out.append(b"\r\n" + _convert(piece[2:], default, depth + 1, parts=parts))
        else:  # the preamble, which nobody reads
            out.append(_8BIT.sub(b"?", piece))
        out.append(mark[0])
        end, inside = mark.end(), not mark[1]
        if not inside:
            break
    if not boundary or not out:
        raise CannotConvert("its MIME structure is broken (no boundary)")
    rest = body[end:]
    if inside and rest.startswith(b"\r\n"):  # cut off: the last part has no end
        out.append(b"\r\n" + _convert(rest[2:], default, depth + 1, parts=parts))
    else:
        out.append(_8BIT.sub(b"?", rest))
    return b"".join(out)


def _convert_leaf(info: Message, header: bytes, body: bytes, *, top: bool) -> bytes:
    encoding = str(info.get("content-transfer-encoding", "7bit")).strip().lower()
    if encoding == "quoted-printable":  # says so, and is not
        return header + b"\r\n" + _8BIT.sub(lambda match: b"=%02X" % match[0][0], body)
    if encoding == "base64":
        return header + b"\r\n" + body.translate(None, _ALL_8BIT)
    if encoding not in ("7bit", "8bit", "binary"):
        raise CannotConvert(f"a part has the unknown encoding {encoding[:40]!r}")
    many = len(body.translate(None, _ALL_8BIT)) < 0.7 * len(body)
    if info.get_content_maintype() != "text" or many:
        header = _with_encoding(header, b"base64", top=top)
        return header + b"\r\n" + crlf(base64.encodebytes(body).rstrip())
    header = _with_encoding(header, b"quoted-printable", top=top)
    return header + b"\r\n" + binascii.b2a_qp(body, istext=True)


def _with_encoding(header: bytes, encoding: bytes, *, top: bool = False) -> bytes:
    fields = [
        field[0]
        for field in _FIELD.finditer(header)
        if field[1].lower() != b"content-transfer-encoding"
    ]
    if top and not re.search(rb"(?im)^MIME-Version[ \t]*:", header):
        fields.append(b"MIME-Version: 1.0\r\n")
    fields.append(b"Content-Transfer-Encoding: %b\r\n" % encoding)
    return b"".join(fields)


def _check_size(header: bytes) -> None:
    if len(header) > _MAX_HEADER:
        raise CannotConvert(f"a header has more than {_MAX_HEADER:,} bytes")
    for field in _FIELD.finditer(header):
        if len(field[0]) > _MAX_FIELD and field[1].lower() in _HAS_PARAMETERS:
            raise CannotConvert(f"a {field[1].decode()} has more than {_MAX_FIELD:,} bytes")


def _encode_header(header: bytes) -> bytes:
    _check_size(header)
    fields = []
    for field in _FIELD.finditer(header):
        if field[0].isascii():
            fields.append(field[0])
            continue
        name = field[1].decode("ascii")
        value = _decode(field[2]).replace("\r\n", "").strip()
        fields.append(f"{name}: {_encode_value(name, value)}\r\n".encode("ascii"))
    return b"".join(fields)


def _encode_value(name: str, value: str) -> str:
    lower = name.lower()
    if lower in _ADDRESSES:
        return ",\r\n ".join(
            formataddr((phrase, _ascii_address(address)), "utf-8")
            for phrase, address in getaddresses([value])
        )
    if lower in ("content-type", "content-disposition"):
        message = Message()
        message[name] = value
        for parameter, content in message.get_params([], header=name)[1:]:
            if not str(content).isascii():
                message.set_param(parameter, content, header=name, charset="utf-8", replace=True)
        return str(message[name]).replace("\n", "\r\n")
    return Header(value, "utf-8", header_name=name).encode(linesep="\r\n")


def _ascii_address(address: str) -> str:
    if address.isascii():
        return address
    local, _, domain = address.rpartition("@")
    try:
        if local.isascii():
            return f"{local}@{ascii_host(domain)}"
    except InvalidAddress:
        pass
    raise CannotConvert("its header has an address that only SMTPUTF8 can carry")


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")  # a guess that loses nothing


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_signed_data(info: Message) -> bool:
    return str(info.get_param("smime-type", "signed-data")).lower() == "signed-data"
