"""The relays: one process that takes mails as fast as Python can, and checks every one.

``Sink`` is the harness's side, ``python -m benchmarks.sink`` the process; one line of JSON
each way.  One port per lane.  A mail must be new, whole, without private header fields,
and must come with the right envelope and login to the port of its own lane.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys
import time
from base64 import b64decode
from collections import deque
from pathlib import Path
from typing import Any

from .mails import MESSAGE_ID, PRIVATE, SPECIAL, password_of, recipient_of, sender_of, text_of

_END = b"\r\n.\r\n"
_ROOT = Path(__file__).parent.parent


class Sink:
    """The process, as a context.  `options`: see `Relays`."""

    def __init__(self, **options: Any) -> None:
        self._options = options

    def __enter__(self) -> Sink:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sink"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            text=True,
        )
        self.ports: list[int] = self.ask("listen", **self._options)["ports"]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, what: str, **arguments: Any) -> Any:
        self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def wait(self, count: int, timeout: float) -> bool:
        """Return whether so many different mails are there within so many seconds."""
        return self.ask("wait", count=count, timeout=timeout)["there"]

    def report(self, *, times: bool = False) -> dict[str, Any]:
        return self.ask("report", times=times)


class Relays:
    """What listens.

    `latency`: seconds that each reply travels.  `silent`: lanes that accept connections
    and never say a word.  `size`: of the mails that come.
    """

    def __init__(self) -> None:
        self.view = memoryview(bytearray(256 * 1024))
        self.seen: dict[int, float] = {}  # when, by number
        self.problems = {"duplicate": 0, "misrouted": 0, "leaked": 0, "damaged": 0}
        self.sessions = self.open = self.most_open = 0
        self.first = 0.0  # connection
        self._changed: asyncio.Event | None = None

    async def listen(
        self,
        *,
        lanes: int = 1,
        size: int = 4096,
        latency: float = 0.0,
        chunking: bool = False,
        login: bool = False,
        certificate: str = "",
        silent: tuple[int, ...] | list[int] = (),
    ) -> dict[str, Any]:
        self.size, self.latency, self.login, self.chunking = size, latency, login, chunking
        offers = ["PIPELINING", "8BITMIME", "SIZE 100000000", "ENHANCEDSTATUSCODES"]
        offers += ["CHUNKING"] * chunking + ["AUTH PLAIN"] * login
        lines = ["relay.test", *offers]
        self.hello = b"".join(
            b"250%c%b\r\n" % (b" "[0] if line is lines[-1] else b"-"[0], line.encode())
            for line in lines
        )
        context = None
        if certificate:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate)
        loop = asyncio.get_running_loop()
        self._servers = [
            await loop.create_server(
                (lambda lane=lane: Session(self, lane))
                if lane not in silent
                else lambda: _Silent(self),
                "127.0.0.1",
                0,
                ssl=context,
                backlog=1024,
            )
            for lane in range(lanes)
        ]
        return {"ports": [server.sockets[0].getsockname()[1] for server in self._servers]}

    async def wait(self, *, count: int, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while len(self.seen) < count and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return {"there": len(self.seen) >= count}

    async def report(self, *, times: bool) -> dict[str, Any]:
        when = self.seen.values()
        return {
            "unique": len(self.seen),
            **self.problems,
            "first_connection": self.first,
            "first_mail": min(when, default=0.0),
            "last_mail": max(when, default=0.0),
            "sessions": self.sessions,
            "most_open": self.most_open,
            "cpu": time.process_time(),
            "times": self.seen if times else None,
        }

    def take(self, session: Session, data: bytes) -> None:
        """Check one mail."""
        end = data.find(b"\r\n\r\n")
        header = b"\r\n" + data[: end + 2]
        found = MESSAGE_ID.search(header)
        if not found:
            self.problems["damaged"] += 1
            return
        number, lane = int(found[1]), int(found[2])
        text = data[end + 4 :]
        if text != text_of(number % SPECIAL == 0, self.size):
            self.problems["damaged"] += 1
        if PRIVATE.search(header):
            self.problems["leaked"] += 1
        if (
            lane != session.lane
            or session.sender != sender_of(lane).encode()
            or session.recipients != [recipient_of(number).encode()]
            or (self.login and session.user != f"user{lane}")
        ):
            self.problems["misrouted"] += 1
        if number in self.seen:
            self.problems["duplicate"] += 1
        else:
            self.seen[number] = time.monotonic()


class _Silent(asyncio.Protocol):
    def __init__(self, relays: Relays) -> None:
        self._relays = relays

    def connection_made(self, transport: Any) -> None:
        self._relays.sessions += 1


class Session(asyncio.BufferedProtocol):
    """One connection."""

    def __init__(self, relays: Relays, lane: int) -> None:
        self.relays = relays
        self.lane = lane
        self.user = ""
        self.sender = b""
        self.recipients: list[bytes] = []
        self._rest = b""
        self._chunks: list[bytes] | None = None  # of a message that is coming
        self._tail = b""
        self._need = -1  # bytes of a BDAT that are to come
        self._out: list[bytes] = []
        self._travelling: deque[tuple[float, bytes]] = deque()
        self._timer: Any = None

    def connection_made(self, transport: Any) -> None:
        relays = self.relays
        self.transport = transport
        relays.first = relays.first or time.monotonic()
        relays.sessions += 1
        relays.open += 1
        relays.most_open = max(relays.most_open, relays.open)
        self._send(b"220 relay.test ESMTP\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        self.relays.open -= 1
        if self._timer is not None:
            self._timer.cancel()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.relays.view

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self.relays.view[:nbytes])
        while data:
            if self._need >= 0:
                data = self._chunk(data)
            elif self._chunks is not None:
                data = self._data(data)
            else:
                data = self._lines(data)
        if self._out:
            self._send(b"".join(self._out))
            self._out.clear()

    def _lines(self, data: bytes) -> bytes:
        data = self._rest + data
        at = 0
        while self._chunks is None and self._need < 0:
            end = data.find(b"\r\n", at)
            if end < 0:
                self._rest = data[at:]
                return b""
            self._command(data[at:end])
            at = end + 2
        self._rest = b""
        return data[at:]

    def _command(self, line: bytes) -> None:
        out, verb = self._out, line[:4].upper()
        if verb == b"MAIL":
            self.sender, self.recipients = _path(line), []
            out.append(b"250 2.1.0 Ok\r\n" if self._may_mail() else b"530 5.7.0 login\r\n")
        elif verb == b"RCPT":
            self.recipients.append(_path(line))
            out.append(b"250 2.1.5 Ok\r\n")
        elif verb == b"DATA":
            self._chunks, self._tail = [b"\r\n"], b"\r\n"
            out.append(b"354 go on\r\n")
        elif verb == b"BDAT":
            self._need, self._chunks = int(line.split()[1]), self._chunks or []
        elif verb in (b"EHLO", b"HELO"):
            out.append(self.relays.hello)
        elif verb == b"AUTH":
            _, self.user, password = b64decode(line.split()[2]).decode().split("\0")
            good = password == password_of(int(self.user.removeprefix("user")))
            out.append(b"235 2.7.0 welcome\r\n" if good else b"535 5.7.8 no\r\n")
        elif verb == b"QUIT":
            out.append(b"221 2.0.0 bye\r\n")
            self._send(b"".join(out))
            out.clear()
            if not self._travelling:
                self.transport.close()
        else:
            out.append(b"250 2.0.0 Ok\r\n")

    def _may_mail(self) -> bool:
        return bool(self.user) or not self.relays.login

    def _data(self, data: bytes) -> bytes:
        window = self._tail + data
        at = window.find(_END)
        if at < 0:
            self._chunks.append(data)
            self._tail = window[-4:]
            return b""
        before = sum(map(len, self._chunks)) - len(self._tail)
        whole = b"".join((*self._chunks, data))
        text = whole[: before + at + 2]
        if b"\r\n.." in text:
            text = text.replace(b"\r\n..", b"\r\n.")
        self._taken(text[2:])
        return whole[before + at + len(_END) :]

    def _chunk(self, data: bytes) -> bytes:
        part, rest = data[: self._need], data[self._need :]
        self._chunks.append(part)
        self._need -= len(part)
        if not self._need:
            self._need = -1
            self._taken(b"".join(self._chunks))  # our clients say LAST
        return rest

    def _taken(self, data: bytes) -> None:
        self._chunks = None
        self.relays.take(self, data)
        self._out.append(b"250 2.0.0 taken\r\n")

    def _send(self, data: bytes) -> None:
        if not self.relays.latency:
            self.transport.write(data)
            return
        loop = asyncio.get_running_loop()
        self._travelling.append((loop.time() + self.relays.latency, data))
        if self._timer is None:
            self._timer = loop.call_at(self._travelling[0][0], self._arrive)

    def _arrive(self) -> None:
        _, data = self._travelling.popleft()
        self.transport.write(data)
        self._timer = None
        if data.endswith(b"bye\r\n"):
            self.transport.close()
        elif self._travelling:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._travelling[0][0], self._arrive)


def _path(line: bytes) -> bytes:
    return line[line.find(b"<") + 1 : line.find(b">")]


async def _serve() -> None:
    relays = Relays()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        request = json.loads(line)
        answer = await getattr(relays, request.pop("do"))(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve())
