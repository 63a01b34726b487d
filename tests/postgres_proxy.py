"""Between an outbox and its PostgreSQL: loses one request, or one answer, or lets one fail.

It knows enough of the protocol to count: a request ends with Sync, is a simple Query, or the rows
of a COPY; its answer ends with ReadyForQuery.  Nothing is encrypted.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO, Final
from urllib.parse import urlsplit

#: What may happen to a request: it never arrives; it is done, and its answer never arrives; the
#: server refuses it, with what a busy one may say.
REQUEST: Final = "request"
ANSWER: Final = "answer"
CODES: Final = (
    "57014",  # statement_timeout
    "55P03",  # lock_timeout
    "40P01",  # deadlock
    "40001",  # serialization failure
    "53100",  # disk full
)

_STARTUP, _TYPED = 4, 5  # bytes before a message


class Proxy:
    """`url`: of the database; `self.url`: the way through here.

    ``happened``: what `arm` asked for has happened.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.port is not None
        self._server = (str(parts.hostname), parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        here = f"{parts.username}@127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = f"{parts.scheme}://{here}{parts.path}?sslmode=disable&gssencmode=disable"
        self._lock = threading.Lock()
        self._at = 0  # requests until it happens, the last one counted; 0: never
        self._how = ""
        self._lasting = False
        self._away = False
        self.happened = False
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def arm(self, at: int, how: str, *, lasting: bool = False) -> None:
        """Let it happen to the `at`-th request from now.  `lasting`: then nobody gets through."""
        with self._lock:
            self._at, self._how, self._lasting = at, how, lasting
            self.happened = False

    def disarm(self) -> bool:
        """Let everything through; return whether it has happened."""
        with self._lock:
            self._at, self._away = 0, False
            return self.happened

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._cut(*list(self._sockets))
        for thread in self._threads:
            thread.join()

    def _start(self, run: Callable[..., None], *arguments: _Link) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._away:
                client.close()
                continue
            server = socket.create_connection(self._server)
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets |= {client, server}
            link = _Link(client, server)
            self._start(self._requests, link)
            self._start(self._answers, link)

    def _requests(self, link: _Link) -> None:
        try:
            with link.client.makefile("rb") as stream, suppress(OSError, EOFError):
                link.server.sendall(_message(stream, _STARTUP))
                request = b""
                while True:
                    message = _message(stream, _TYPED)
                    request += message
                    kind = message[:1]
                    how = self._next() if kind in b"QSc" else ""
                    if how == REQUEST:
                        return
                    link.swallows = link.swallows or how == ANSWER
                    if kind in b"QScfXH":
                        link.server.sendall(_failure(how, kind) if how in CODES else request)
                        request = b""
        finally:
            if not link.swallows:
                self._cut(link.client, link.server)

    def _answers(self, link: _Link) -> None:
        try:
            with link.server.makefile("rb") as stream, suppress(OSError, EOFError):
                while True:
                    message = _message(stream, _TYPED)
                    if not link.swallows:
                        link.client.sendall(message)
                    elif message[:1] in b"ZG":  # or what asks for the rows of a COPY
                        return
        finally:
            self._cut(link.client, link.server)

    def _next(self) -> str:
        with self._lock:
            if self._away:
                return REQUEST
            if not self._at:
                return ""
            self._at -= 1
            if self._at:
                return ""
            self.happened, self._away = True, self._lasting
            return self._how

    def _cut(self, *sockets: socket.socket) -> None:
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
            self._sockets.discard(each)


class _Link:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.swallows = False


def _message(stream: BinaryIO, head: int) -> bytes:
    start = stream.read(head)
    if len(start) < head:
        raise EOFError
    (size,) = struct.unpack("!I", start[-4:])
    rest = stream.read(size - 4)
    if len(rest) < size - 4:
        raise EOFError
    return start + rest


def _failure(code: str, kind: bytes) -> bytes:
    """Return a request in whose place the server says that it cannot."""
    if kind == b"c":
        kind, text = b"f", b"not now"
    else:
        kind = b"Q"
        text = f"DO $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '{code}'; END $$".encode()
    return kind + struct.pack("!I", len(text) + 5) + text + b"\0"
