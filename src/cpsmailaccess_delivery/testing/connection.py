"""The transport's side of a session of the test server: input, output, TLS and faults.

Input that cannot be handled yet (a delay, a handshake) stays in ``_in``; the replies to what
came in one read leave in one write.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from .script import Rule

if TYPE_CHECKING:
    from .server import SMTPServer

_ENHANCED = re.compile(rb"^([245]\d\d[ -])[245]\.\d{1,3}\.\d{1,3} ", re.MULTILINE)


class Connection(asyncio.BufferedProtocol):
    """Bytes in, replies out, when and how the server's settings and rules say."""

    def __init__(self, server: SMTPServer) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._handshake: asyncio.Task[None] | None = None
        self.number = 0
        self._group = 0
        self._in = bytearray()
        self._out: list[bytes] = []
        self._later: deque[tuple[float, bytes | None]] = deque()  # None: close
        self._blocked = False  # a delay or a handshake: input waits
        self._deaf = False  # silent for good, or closing: input is thrown away
        self._closing = False
        self._tls = False
        self._offered: frozenset[str] = frozenset()  # what EHLO said

    def _greet(self) -> None:
        raise NotImplementedError

    def _step(self) -> bool:
        """Take one unit out of ``_in``; False: more must come first."""
        raise NotImplementedError

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.number = self._server.session_opened(self)
        if self._server.security == "tls":
            self._blocked = True
            self._transport.pause_reading()
            self._perform("TLS", b"", self._start_handshake)
        else:
            self._perform("GREETING", b"", self._greet)
        self._flush()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._transport = None
        self._deaf = True
        self._later.clear()
        self._server.session_closed(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._deaf:
            return
        self._group += 1
        self._in += self._server.buffer[:nbytes]
        self._work()
        self._server.changed()

    def abort(self) -> None:
        """Close at once."""
        self._deaf = True
        if self._transport is not None:
            self._transport.abort()

    def _start_handshake(self) -> None:
        self._blocked = True
        self._handshake = self._loop.create_task(self._shake_hands())

    async def _shake_hands(self) -> None:
        transport, context = self._transport, self._server.context
        if transport is None or context is None:
            return
        failure = "connection lost"
        try:
            upgraded = await self._loop.start_tls(transport, self, context, server_side=True)
        except OSError as error:  # ssl.SSLError is one; asyncio has closed the transport
            upgraded, failure = None, str(error) or type(error).__name__
        if upgraded is None:  # also without an exception: the client closed
            self._server.tls_failures.append(failure)
            self.connection_lost(None)
            return
        self._transport = upgraded
        self._tls, self._blocked = True, False
        if self._server.security == "tls":
            self._perform("GREETING", b"", self._greet)
        self._work()

    # Input, output and script

    def _work(self) -> None:
        while self._in and not (self._blocked or self._deaf):
            if not self._step():
                break
        self._flush()

    def _perform(self, phase: str, subject: bytes, action: Callable[[], None]) -> bool:
        """Do what belongs to a phase unless a rule steps in; tell whether one did."""
        rule = self._server.find_rule(phase, subject)
        if rule is None:
            action()
            return False
        if rule.delay:
            self._blocked = True
            self._loop.call_later(rule.delay, self._resume, rule, action)
        else:
            self._apply(rule, action)
        return True

    def _resume(self, rule: Rule, action: Callable[[], None]) -> None:
        if self._transport is None:
            return
        self._blocked = False
        self._apply(rule, action)
        self._work()
        self._server.changed()

    def _apply(self, rule: Rule, action: Callable[[], None]) -> None:
        if rule.silence:
            self._deaf = True
            if self._transport is not None:
                self._transport.resume_reading()  # so that the client's close is seen
        elif rule.reply is not None:
            if rule.reply[:1] in b"23":
                self._substitute(rule.reply, action)
            else:
                self._out.append(rule.reply)
            if rule.drop:
                self._closing = self._deaf = True
        elif rule.drop:
            self._flush()
            self.abort()
        else:
            action()

    def _substitute(self, reply: bytes, action: Callable[[], None]) -> None:
        """Do it, but say it in other words, unless it is refused."""
        before = len(self._out)
        action()
        if all(said[:1] in b"23" for said in self._out[before:]):
            self._out[before:] = [reply]

    def _say(self, reply: bytes) -> None:
        if "ENHANCEDSTATUSCODES" not in self._offered:
            reply = _ENHANCED.sub(rb"\1", reply)
        self._out.append(reply + b"\r\n")

    def _hang_up(self, reply: bytes) -> None:
        self._say(reply)
        self._closing = self._deaf = True

    def _flush(self) -> None:
        transport, server = self._transport, self._server
        if transport is None or not (self._out or self._closing):
            return
        data = b"".join(self._out)
        self._out.clear()
        if not (server.latency or server.split_replies or self._later):
            transport.write(data)
            if self._closing:
                transport.close()
            return
        when, idle = self._loop.time() + server.latency, not self._later
        step = 1 if server.split_replies else max(len(data), 1)
        self._later.extend((when, data[at : at + step]) for at in range(0, len(data), step))
        if self._closing:
            self._later.append((when, None))
        if idle:
            self._loop.call_at(when, self._send_later)

    def _send_later(self) -> None:
        """Send one piece; the next leaves in a later turn of the loop, so in its own packet."""
        if self._transport is None or not self._later:
            return
        _, piece = self._later.popleft()
        if piece is None:
            self._transport.close()
        else:
            self._transport.write(piece)
        if self._later:
            self._loop.call_at(self._later[0][0], self._send_later)
