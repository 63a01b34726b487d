"""An SMTP reply (RFC 5321 section 4.2), and the parser that cuts it out of a byte stream."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from ..errors import OutboxError

#: Octets of one line; RFC 5321 section 4.5.3.1.5 says 512, relays say more.
MAX_LINE: Final = 2048
#: Lines and octets of one reply: more is an attack, or no SMTP.
MAX_LINES: Final = 1000
MAX_REPLY: Final = 64 * 1024

_CODES: Final = {b"%d" % code: code for code in range(200, 600)}
_LAST_LINES: Final = frozenset(code + b" " for code in _CODES)  # as they begin, nearly always
_ENHANCED = re.compile(r"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?: +|\Z)")
_PLAIN = re.compile(rb"[ -~]*\Z")


class ProtocolError(OutboxError):
    """The relay said what is no SMTP, or not what SMTP allows here."""


class Reply(NamedTuple):
    """One reply, all its lines.

    ``code``: three digits.  ``text``: its lines joined by a space, hostile text, control
    characters replaced.  ``enhanced``: ``"4.7.1"`` (RFC 3463), or "".
    """

    code: int
    text: str = ""
    enhanced: str = ""

    def __str__(self) -> str:
        return f"{self.code} {self.text}".rstrip()


class ReplyParser:
    """Cuts replies out of what a relay sends, wherever the network has split it."""

    __slots__ = ("_lines", "_partial", "_size", "error")

    def __init__(self) -> None:
        self._partial = b""  # of a line
        self._lines: list[bytes] = []  # of a reply that goes on
        self._size = 0  # octets in _lines
        self.error: ProtocolError | None = None

    @property
    def pending(self) -> bool:
        """Whether the beginning of a reply waits for its end."""
        return bool(self._partial or self._lines)

    def feed(self, data: bytes) -> list[Reply]:
        """Return the replies that are complete now.  Raises `ProtocolError`.

        Replies in front of garbage are returned; the next call raises.
        """
        replies = [] if self.error else self.split(data)
        if self.error and not replies:
            raise self.error
        return [parse_reply(raw) for raw in replies]

    def split(self, data: bytes) -> list[bytes]:
        """Return the replies that are complete now, each as its lines joined by LF.

        The hot path: no object but the bytes.  What came before garbage is returned, and
        `error` is set: a reply that says "accepted" counts whatever follows it.
        """
        lines = (self._partial + data if self._partial else data).split(b"\n")
        self._partial = lines.pop()
        replies: list[bytes] = []
        for line in lines:
            if line[-1:] == b"\r":
                line = line[:-1]
            if line[:4] in _LAST_LINES and len(line) <= MAX_LINE and not self._lines:
                replies.append(line)
                continue
            if line[:3] not in _CODES or len(line) > MAX_LINE or line[3:4] not in (b" ", b"-", b""):
                self._refuse(line)
                return replies
            if line[3:4] != b"-" and not self._lines:
                replies.append(line)
            elif not self._continues(line):
                return replies
            elif line[3:4] != b"-":
                replies.append(b"\n".join(self._lines))
                self._lines = []
                self._size = 0
        if len(self._partial) > MAX_LINE:
            self._refuse(self._partial)
        return replies

    def _continues(self, line: bytes) -> bool:
        """Take one line of a multi-line reply; all its lines have one code."""
        self._size += len(line)
        if self._lines and self._lines[0][:3] != line[:3]:
            self._refuse(line)
        elif len(self._lines) >= MAX_LINES or self._size > MAX_REPLY:
            self.error = ProtocolError("the relay's reply has no end")
        else:
            self._lines.append(line)
        return self.error is None

    def _refuse(self, line: bytes) -> None:
        self._partial = b""
        shown = line[:60].decode("ascii", "replace")
        self.error = ProtocolError(f"the relay does not speak SMTP here: {shown!r}")


def parse_reply(raw: bytes) -> Reply:
    """Return the reply in what `ReplyParser.split` cut out."""
    code = _CODES[raw[:3]]
    if b"\n" not in raw:
        text = _text(raw[4:])
        match = _ENHANCED.match(text)
        enhanced = match[1] if match and text[0] == chr(raw[0]) else ""
        return Reply(code, text, enhanced)
    texts = [_text(line[4:]) for line in raw.split(b"\n")]
    match = _ENHANCED.match(texts[0])
    enhanced = match[1] if match and texts[0][0] == chr(raw[0]) else ""
    if enhanced:  # RFC 2034 section 4 has it on every line: once is enough
        texts[1:] = [text.removeprefix(enhanced).lstrip() for text in texts[1:]]
    return Reply(code, " ".join(filter(None, texts)), enhanced)


def local_reply(code: int, enhanced: str, text: str) -> Reply:
    """Return a reply of ours, for what a relay need not be asked."""
    return Reply(code, f"{enhanced} {text}", enhanced)


def _text(line: bytes) -> str:
    """Return readable text: UTF-8 (RFC 6531 section 3.7.4) that no terminal obeys."""
    if _PLAIN.match(line):
        return line.decode("ascii").strip()
    text = line.decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "\ufffd" for char in text).strip()
