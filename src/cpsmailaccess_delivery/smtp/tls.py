"""TLS for sessions: one context per setting and process, for each costs 30 ms to make.

`Tls` is without sockets, like the machine above it: bytes of the wire in, plain bytes out, and
back.  asyncio's own costs a turn of its loop for every write.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections import deque
from typing import Final

_READ: Final = 256 * 1024  # bytes; a read gives one record, at most 16 KiB

_lock = threading.Lock()
_contexts: dict[bool | str, tuple[object, ssl.SSLContext]] = {}


def client_context(verify: bool | str) -> ssl.SSLContext:
    """Return the context for an account's ``verify``; TLS 1.2 is the least (RFC 8997).

    A CA file that has changed on disk is read again.  Raises `OSError` (`ssl.SSLError`
    is one) when it cannot be read.
    """
    version = _version(verify)
    with _lock:
        known = _contexts.get(verify)
        if known is None or known[0] != version:
            known = _contexts[verify] = (version, _make(verify))
        return known[1]


def _version(verify: bool | str) -> object:
    if isinstance(verify, bool):
        return None
    stat = os.stat(verify)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _make(verify: bool | str) -> ssl.SSLContext:
    if isinstance(verify, str):
        context = ssl.create_default_context(cafile=verify)
    else:
        context = ssl.create_default_context()
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class Tls:
    """One encrypted connection, from the client's side.

    `host`: what its certificate must be for.  `shake_hands` raises
    `ssl.SSLError`; what must be written then (the alert) is in `output`.

    ``over``: why no more can be read; None: it can.
    """

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self.over: OSError | None = None
        self._held: deque[bytes] = deque()  # to be encrypted

    @property
    def cipher(self) -> tuple[str, str] | None:
        """Version and cipher; None before the handshake has ended."""
        version, cipher = self._object.version(), self._object.cipher()
        return (version, cipher[0]) if version and cipher else None

    def feed(self, data: bytes) -> None:
        """Take bytes of the wire."""
        self._incoming.write(data)

    def shake_hands(self) -> bool:
        """Go on with the handshake; return whether it is over."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def decrypt(self) -> bytes:
        """Return what has been fed and not been returned; then look at `over`, and `output`.

        What came before the end, or before a fault, counts: it may be the reply to a mail.
        """
        incoming, source = self._incoming, self._object
        parts = []
        try:
            while self.over is None and incoming.pending:
                part = source.read(_READ)
                if not part:  # close_notify: b"" for ever, whatever is still to be read
                    self.over = ConnectionResetError("the relay closed the connection")
                parts.append(part)
        except ssl.SSLWantReadError:
            pass  # the rest of a record is still to come
        except ssl.SSLError as error:
            self.over = error
        if self._held and self.over is None:
            self._encrypt_held()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def encrypt(self, data: bytes) -> None:
        """Put data into `output`; later, while the relay renegotiates (TLS 1.2)."""
        self._held.append(data)
        self._encrypt_held()

    def _encrypt_held(self) -> None:
        held = self._held
        try:
            while held:
                self._object.write(held[0])
                held.popleft()
        except ssl.SSLWantReadError:
            pass  # `decrypt` goes on
        except ssl.SSLError as error:
            self.over = error

    def output(self) -> bytes:
        """Return what must be written now; mostly nothing unless `encrypt` was called."""
        return self._outgoing.read() if self._outgoing.pending else b""
