"""A scriptable SMTP server for tests and benchmarks: real sockets, on loopback.

    with SMTPServer(users={"alice": "pw"}) as server:
        server.on("RCPT", reply="450 4.2.0 greylisted", match="bob@", times=1)
        ...
        mail, = server.wait_for(1)

It is strict where real servers are, and it never sends mail anywhere.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Collection, Coroutine, Mapping
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

from .connection import Connection
from .login import MECHANISMS
from .received import Command, Login, ReceivedMail
from .script import Rule, make_rule
from .session import Session

__all__ = ["EXTENSIONS", "Command", "Login", "ReceivedMail", "Rule", "SMTPServer", "ServerThread"]

T = TypeVar("T")

EXTENSIONS: Final = frozenset(
    ("PIPELINING", "CHUNKING", "8BITMIME", "SMTPUTF8", "SIZE", "ENHANCEDSTATUSCODES", "DSN")
)

_BUFFER: Final = 256 * 1024  # octets; one for all sessions of a thread: see `Session`


class ServerThread:
    """A thread with an event loop; many servers may share one."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.buffer = memoryview(bytearray(_BUFFER))
        self._thread = threading.Thread(target=self.loop.run_forever, name="smtp-test-server")
        self._thread.daemon = True  # a test that fails to close it still ends
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 30.0) -> T:
        """Return what a coroutine returns in the loop.  `timeout`: seconds."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def close(self) -> None:
        """End the thread.  Twice is fine."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(30.0)
            self.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SMTPServer:
    """An SMTP server whose every answer can be changed, also while it runs.

    ``security``
        ``plain``, ``starttls`` (required before AUTH and MAIL) or ``tls``; the last two
        need a ``context`` (`certificates.Authority.server_context`).
    ``users``
        user name to password; AUTH is then required before MAIL.
    ``extensions``, ``esmtp``, ``mechanisms``
        what EHLO offers; ``esmtp=False``: there is no EHLO.
    ``max_size``
        octets of a mail; ``max_sessions``: at a time, then 421; ``mails_per_session``:
        then 421.
    ``latency``
        seconds that each reply travels (replies of one group travel together);
        ``split_replies``: every octet in a packet of its own.
    ``strict``
        refuse what servers of today refuse: CR or LF alone in a mail, 8-bit data that
        was not announced, pipelining where it is not allowed.  Not strict: recorded as it came.
    ``keep``
        False: bodies and commands are not kept; `ReceivedMail.message_id` and
        ``private`` say what a benchmark asks.

    ``mails``, ``commands``, ``logins``, ``tls_failures`` and ``sessions`` (how many there
    were) say what happened; lists grow in the order of events.
    """

    def __init__(
        self,
        *,
        security: Literal["plain", "starttls", "tls"] = "plain",
        context: ssl.SSLContext | None = None,
        users: Mapping[str, str] | None = None,
        extensions: Collection[str] = EXTENSIONS,
        esmtp: bool = True,
        mechanisms: tuple[str, ...] = MECHANISMS,
        max_size: int = 100 * 1024 * 1024,
        max_sessions: int | None = None,
        mails_per_session: int | None = None,
        latency: float = 0.0,
        split_replies: bool = False,
        strict: bool = True,
        keep: bool = True,
        host: str = "127.0.0.1",
        port: int = 0,
        hostname: str = "relay.test",
        thread: ServerThread | None = None,
    ) -> None:
        if security != "plain" and context is None:
            raise ValueError(f"security {security}: needs a context, see certificates.Authority")
        if unknown := frozenset(extensions) - EXTENSIONS:
            raise ValueError(f"extensions {sorted(unknown)}: known are {sorted(EXTENSIONS)}")
        self.security, self.context = security, context
        self.users = dict(users or {})
        self.extensions, self.esmtp, self.mechanisms = frozenset(extensions), esmtp, mechanisms
        self.max_size, self.max_sessions = max_size, max_sessions
        self.mails_per_session = mails_per_session
        self.latency, self.split_replies = latency, split_replies
        self.strict, self.keep = strict, keep
        self.host, self.port, self.hostname = host, port, hostname
        self.mails: list[ReceivedMail] = []
        self.commands: list[Command] = []
        self.logins: list[Login] = []
        self.tls_failures: list[str] = []
        self.sessions = 0
        self.buffer = memoryview(b"")  # the one of the thread, from `start` on
        self._rules: tuple[Rule, ...] = ()  # replaced, never changed: two threads use it
        self._open: set[Connection] = set()
        self._changed = threading.Condition()
        self._thread, self._own_thread = thread, thread is None
        self._listener: asyncio.Server | None = None

    def __repr__(self) -> str:
        return (
            f"<SMTPServer {self.security} {self.host}:{self.port}: {len(self.mails)} mails,"
            f" {self.sessions} sessions, {self.open_sessions} open>"
        )

    # Life

    def start(self) -> Self:
        """Listen.  ``port`` is the real one afterwards."""
        if self._thread is None:
            self._thread = ServerThread()
        self.buffer = self._thread.buffer
        self.start_accepting()
        return self

    def stop(self) -> None:
        """Close every session and stop listening.  Twice is fine."""
        if self._thread is None:
            return
        self._thread.run(self._stop())
        if self._own_thread:
            self._thread.close()
        self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start_accepting(self) -> None:
        """Listen again, on the same port."""
        self._running().run(self._listen())

    def stop_accepting(self) -> None:
        """Refuse new connections, as a relay that is down; sessions go on."""
        self._running().run(self._unlisten())

    def drop_sessions(self) -> None:
        """Cut every connection, as a relay that crashes."""
        self._running().run(self._drop())

    # Script

    def on(
        self,
        phase: str,
        *,
        reply: str | bytes | None = None,
        drop: bool = False,
        silence: bool = False,
        delay: float = 0.0,
        match: str = "",
        after: int = 0,
        times: int | None = None,
    ) -> Rule:
        """Change what happens in a phase (`script.PHASES`); the oldest rule that fits wins.

        `reply`: what is said instead.  A positive one rewords the success, a negative one
        keeps it from happening; bytes are sent as they are.  `drop`: the connection is
        cut, after the reply if there is one.  `silence`: nothing is ever said again.
        `delay`: seconds before any of this, or before the usual answer.  `match`: text that
        the command (BODY, TAKEN: the message) holds.  `after`: mails that this server has
        taken before.  `times`: how often; None: always.
        """
        rule = make_rule(
            phase,
            reply=reply,
            drop=drop,
            silence=silence,
            delay=delay,
            match=match,
            after=after,
            times=times,
        )
        self._rules = (*self._rules, rule)
        return rule

    def forget(self, *rules: Rule) -> None:
        """Drop these rules; without any, all of them."""
        self._rules = tuple(rule for rule in self._rules if rules and rule not in rules)

    # Waiting

    def wait_for(self, count: int, timeout: float = 10.0) -> list[ReceivedMail]:
        """Return the mails when there are at least `count`.  Raises TimeoutError."""
        self.wait_until(lambda: len(self.mails) >= count, timeout, f"{count} mails")
        return list(self.mails)

    def wait_until(
        self, predicate: Callable[[], object], timeout: float = 10.0, what: str = "that"
    ) -> None:
        """Return when the predicate holds; it is asked again whenever something happened.

        Raises TimeoutError.
        """
        with self._changed:
            if not self._changed.wait_for(predicate, timeout):
                raise TimeoutError(f"waited {timeout} s for {what}: {self!r}")

    @property
    def open_sessions(self) -> int:
        """Connections that are open now."""
        return len(self._open)

    # For sessions, in the loop

    def find_rule(self, phase: str, subject: bytes) -> Rule | None:
        """Return the rule that steps in now, counted."""
        for rule in self._rules:
            if rule.applies(phase, subject, len(self.mails)):
                rule.hits += 1
                return rule
        return None

    def take(self, mail: ReceivedMail) -> None:
        """Record a mail."""
        self.mails.append(mail)

    def changed(self) -> None:
        """Wake those who wait."""
        with self._changed:
            self._changed.notify_all()

    def session_opened(self, session: Connection) -> int:
        """Count a session; return its number."""
        self._open.add(session)
        self.sessions += 1
        self.changed()
        return self.sessions

    def session_closed(self, session: Connection) -> None:
        """Forget a session.  Twice is fine."""
        self._open.discard(session)
        self.changed()

    def _running(self) -> ServerThread:
        if self._thread is None:
            raise RuntimeError("the server is not started")
        return self._thread

    async def _listen(self) -> None:
        if self._listener is None:
            loop = asyncio.get_running_loop()
            self._listener = await loop.create_server(
                lambda: Session(self), self.host, self.port, backlog=1024
            )
            self.port = self._listener.sockets[0].getsockname()[1]

    async def _unlisten(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _drop(self) -> None:
        for session in list(self._open):
            session.abort()
        while self._open:  # their connection_lost is on its way through the loop
            await asyncio.sleep(0)

    async def _stop(self) -> None:
        await self._unlisten()
        await self._drop()
