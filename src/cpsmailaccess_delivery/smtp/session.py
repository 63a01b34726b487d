"""One connection for one account: the transport that drives `machine.Machine`.

It pulls: whenever the machine has room, it asks its source for a mail.  Only connecting
and TLS handshakes are a task; everything else is a callback of the event loop, one turn
per arrival of bytes: replies in, results to the source, more mails from it, one write.  `tls`
stands between the two, where there is encryption.  All calls in the thread of the loop.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Final, Protocol, TypeVar, cast

from ..account import Account, Secret
from ..address import is_ip_address
from ..errors import RelayNotAllowed
from ..networks import is_within
from ..outcome import Phase
from .events import Closed, Event, Failure, Mail, MailDone, MailUnsent, Ready, Result, StartTls
from .hello import Capabilities
from .machine import WINDOW, Machine, State
from .tls import Tls, client_context

__all__ = ["Failure", "Mail", "Result", "Session", "Source"]

#: Seconds for the reply to QUIT: nothing depends on it.
QUIT_TIMEOUT: Final = 5.0

_HAPPY_EYEBALLS: Final = 0.25  # seconds, RFC 8305 section 5
_BUFFER_SIZE: Final = 64 * 1024

_local = threading.local()
_T = TypeVar("_T")


class Source(Protocol):
    """Where a session gets its mails, and tells what became of them: a lane.

    What it gets back is the very object that it gave: any type of `Mail`.
    """

    def next_mail(self) -> Mail | None:
        """Return a mail to be sent now.  None: nothing; `Session.wake` asks again."""

    def mail_done(self, mail: Any, results: Mapping[str, Result]) -> None:
        """Take the results of all recipients."""

    def mail_unsent(self, mail: Any) -> None:
        """Take a mail back that was not tried."""

    def mail_broken(self, mail: Any, error: Exception) -> None:
        """Take a mail back that cannot be put into SMTP, for a fault of ours."""

    def session_ready(self, session: Session) -> None:
        """Greeted, encrypted, logged in."""

    def session_closed(self, session: Session, failure: Failure | None) -> None:
        """The session is over and has let go of everything.  Once, last."""


class Session(asyncio.BufferedProtocol):
    """See the module.

    `window`: with CHUNKING, mails that may wait for their replies.
    `secret`: the password, opened; it is read at the login.  `helo_name`: what EHLO
    says of us (RFC 5321 section 4.1.1.1).
    """

    def __init__(
        self,
        account: Account,
        secret: Secret | None,
        source: Source,
        *,
        helo_name: str,
        loop: asyncio.AbstractEventLoop,
        window: int = WINDOW,
    ) -> None:
        self.account = account
        self.peer = ""  # the relay's address, once connected
        self._source = source
        self._loop = loop
        self._machine = Machine(account, secret, helo_name=helo_name)
        self._machine.window = window
        self._transport: asyncio.Transport | None = None
        self._tls: Tls | None = None
        self._shaken: asyncio.Future[None] | None = None  # the handshake that is under way
        self._view = memoryview(b"")
        self._task: asyncio.Task[None] | None = None
        self._phase: Phase | None = None  # of the task
        self._events: deque[Event] = deque()
        self._turning = False
        self._paused = False  # the relay does not read
        self._over = False  # the machine is done
        self._closed = False  # and the source knows
        self._failure: Failure | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = math.inf
        self._asked_at = loop.time()  # when we began to wait for what the deadline is set for
        self._heard = -1  # `Machine.replies` when the deadline was set
        self._waited = False  # for a reply, then

    def __repr__(self) -> str:
        return f"<Session {self._machine!r}>"

    # What the source may call

    def connect(self) -> None:
        """Begin; `Source.session_closed` comes whatever happens."""
        self._run(self._connect(), Phase.CONNECT)

    def wake(self) -> None:
        """Ask the source for mails again."""
        self._turn(())

    def quit(self) -> None:
        """Take no more mails, finish those in flight, QUIT."""
        self._turn(self._machine.quit())

    def stop(self) -> None:
        """Finish what is past its end of data, hand back the rest, QUIT."""
        self._turn(self._machine.stop())

    def abort(self) -> None:
        """Drop the connection now."""
        self._turn(self._machine.abort())

    @property
    def accepted(self) -> int:
        """Mails that the relay took in this session."""
        return self._machine.accepted

    @property
    def answered(self) -> int:
        """Mails that the relay has answered for in this session, in one way or another."""
        return self._machine.answered

    def silence(self, now: float) -> float:
        """Return for how many seconds the relay has owed us something; `now`: of the loop."""
        waits = self._task is not None or self._machine.awaiting is not None
        return now - self._asked_at if waits else 0.0

    @property
    def in_flight(self) -> int:
        """Mails that the source gave and has not got back."""
        return self._machine.in_flight

    @property
    def is_idle(self) -> bool:
        """Whether it is ready and has nothing to do."""
        return self._machine.state is State.READY and not self._machine.in_flight

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def capabilities(self) -> Capabilities:
        """What the relay offers, as of its last EHLO reply."""
        return self._machine.capabilities

    @property
    def login(self) -> str:
        """The mechanism that logged us in, or ""."""
        return self._machine.login

    @property
    def cipher(self) -> tuple[str, str] | None:
        """TLS version and cipher, or None: not encrypted."""
        return self._tls.cipher if self._tls is not None else None

    # Connecting

    async def _connect(self) -> None:
        """TCP, and TLS from the first byte when the account says so."""
        account = self.account
        # One address needs no race; and a race that is cancelled may forget a socket.
        delay = None if is_ip_address(account.host) else _HAPPY_EYEBALLS
        if account.security == "tls":  # before a byte can come
            self._phase = Phase.TLS
            self._tls = Tls(client_context(account.verify), account.host)
            self._phase = Phase.CONNECT
        async with asyncio.timeout(account.connect_timeout):
            if account.networks:
                await self._connect_within(account.networks)
            else:
                await self._loop.create_connection(
                    lambda: self,
                    account.host,
                    account.port,
                    happy_eyeballs_delay=delay,
                )
            if account.security == "tls":
                self._phase = Phase.TLS
                await self._shake_hands()
        self._phase = None

    async def _connect_within(self, networks: tuple[str, ...]) -> None:
        """Connect to an address of the relay that its account may reach, and to no other.

        The name is looked up once, and what was looked at is what is connected to.
        """
        host, port = self.account.host, self.account.port
        found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(where[0]) for *_, where in found if is_within(str(where[0]), networks)]
        if not addresses:
            raise RelayNotAllowed(f"{host} is in no network that this account may reach")
        patience = self.account.connect_timeout / len(addresses)
        for address in addresses[:-1]:
            try:
                async with asyncio.timeout(patience):
                    await self._loop.create_connection(lambda: self, address, port)
                    return
            except OSError:  # a TimeoutError, too
                continue
        await self._loop.create_connection(lambda: self, addresses[-1], port)

    async def _start_tls(self) -> None:
        self._tls = Tls(client_context(self.account.verify), self.account.host)
        async with asyncio.timeout(self.account.connect_timeout):
            await self._shake_hands()
        self._phase = None
        self._events += self._machine.tls_started()

    async def _shake_hands(self) -> None:
        self._shaken = self._loop.create_future()
        self._go_on_shaking()
        await self._shaken

    def _go_on_shaking(self) -> None:
        tls, shaken, transport = self._tls, self._shaken, self._transport
        if tls is None or transport is None or shaken is None or shaken.done():
            return  # not begun, over, failed or out of time
        try:
            if tls.shake_hands():
                shaken.set_result(None)
        except ssl.SSLError as error:
            shaken.set_exception(error)
        transport.write(tls.output())

    def _run(self, work: Coroutine[None, None, None], phase: Phase) -> None:
        self._phase = phase
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._after_task)

    def _after_task(self, task: asyncio.Task[None]) -> None:
        if task is not self._task:  # the next one has begun
            return
        self._task = None
        error = None if task.cancelled() else task.exception()
        if isinstance(error, TimeoutError) and not str(error):
            error = TimeoutError(f"no connection within {self.account.connect_timeout:g} seconds")
        if error is not None:
            self._turn(self._machine.fail(error, self._phase))
        if not self._over:
            if self._tls is not None:
                self._decrypt()  # what came with the end of the handshake
            self._turn(())
            return
        if self._transport is not None:
            self._transport.abort()
        self._loop.call_soon(self._end)

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # TCP_NODELAY is set by asyncio
        self._transport = cast(asyncio.Transport, transport)
        self.peer = str((transport.get_extra_info("peername") or [""])[0])
        self._view = _receive_buffer()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self._view[:nbytes])
        if self._tls is None:
            self._turn(self._machine.receive(data))
            return
        self._tls.feed(data)
        if self._task is None:
            self._decrypt()
        else:
            self._go_on_shaking()

    def _decrypt(self) -> None:
        tls, machine, transport = self._tls, self._machine, self._transport
        assert tls is not None  # noqa: S101 - for the type checker
        assert transport is not None  # noqa: S101
        data = tls.decrypt()
        if output := tls.output():  # what TLS itself has to say
            transport.write(output)
        if data:
            self._turn(machine.receive(data))
        if tls.over is not None:
            self._turn(machine.fail(tls.over))

    def eof_received(self) -> None:
        if self._task is None:
            self._turn(self._machine.eof())

    def connection_lost(self, exc: Exception | None) -> None:
        error = exc or ConnectionResetError("the relay closed the connection")
        self._turn(self._machine.fail(error, self._phase))
        self._end()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._heard = -1  # it reads: that is progress
        self._turn(())

    # One turn

    def _turn(self, events: Iterable[Event]) -> None:
        """Tell the source what happened, take what it has, write: until nothing moves.

        The source may call us from within: that only adds to the turn.
        """
        self._events += events
        if self._turning:
            return
        self._turning = True
        try:
            self._give_and_take()
            self._write()
        finally:
            self._turning = False
        self._watch_clock()

    def _give_and_take(self) -> None:
        machine, source, events = self._machine, self._source, self._events
        while True:
            while events:
                event = events.popleft()
                if type(event) is MailDone:  # once per mail
                    self._tell(source.mail_done, event.mail, event.results)
                else:
                    self._dispatch(event)
            if self._paused or not machine.wants_mail:
                return
            mail = self._tell(source.next_mail)
            if mail is None:
                if not events:
                    return
            elif machine.wants_mail:
                try:
                    events += machine.send(mail)
                except Exception as error:  # before anything of it was written
                    self._tell(source.mail_broken, mail, error)
            else:  # the source has said quit in the meantime
                self._tell(source.mail_unsent, mail)

    def _tell(self, call: Callable[..., _T], *args: object) -> _T | None:
        """Call the source.  Its bug with one mail must not make the others unclear."""
        try:
            return call(*args)
        except Exception as error:
            self._loop.call_exception_handler(
                {"message": f"{self!r}: {call.__qualname__} failed", "exception": error}
            )
            return None

    def _dispatch(self, event: Event) -> None:
        match event:
            case MailUnsent(mail):
                self._tell(self._source.mail_unsent, mail)
            case Ready():
                self._tell(self._source.session_ready, self)
            case StartTls():
                self._run(self._start_tls(), Phase.TLS)
            case Closed(failure):
                self._over = True
                self._failure = failure

    def _write(self) -> None:
        transport = self._transport
        if transport is not None:
            while not self._paused and (data := self._machine.data_to_send()):
                if self._tls is not None:
                    self._tls.encrypt(data)
                    data = self._tls.output()
                    if self._tls.over is not None:
                        self._loop.call_soon(self._decrypt)  # says it to the machine
                transport.write(data)
        if self._over:
            if self._task is not None:
                self._task.cancel()
            elif transport is not None:
                transport.abort()  # what was written is in the kernel, or not worth a wait
            else:
                self._loop.call_soon(self._end)

    def _end(self) -> None:
        if not self._closed:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            self._tell(self._source.session_closed, self, self._failure)

    # One timer, which is late rather than re-armed for every reply

    def _watch_clock(self) -> None:
        """Set the deadline for the reply that is awaited: absolute, however bytes drip."""
        machine = self._machine
        awaiting = machine.awaiting if self._task is None else None
        if machine.replies == self._heard and (awaiting is not None) is self._waited:
            return
        self._heard = machine.replies
        self._waited = awaiting is not None
        if awaiting is None:
            self._deadline = math.inf
            return
        self._asked_at = self._loop.time()
        self._deadline = when = self._asked_at + self._patience(awaiting)
        if self._timer is None:
            self._timer = self._loop.call_at(when, self._on_timer)
        elif when < self._timer.when():
            self._timer.cancel()
            self._timer = self._loop.call_at(when, self._on_timer)

    def _patience(self, awaiting: Phase) -> float:
        if self._machine.state is State.QUIT:
            return QUIT_TIMEOUT
        account = self.account
        return account.data_timeout if awaiting is Phase.BODY else account.command_timeout

    def _on_timer(self) -> None:
        self._timer = None
        if self._deadline > self._loop.time():
            if self._deadline < math.inf:
                self._timer = self._loop.call_at(self._deadline, self._on_timer)
            return
        awaiting = self._machine.awaiting
        if awaiting is not None:
            seconds = self._patience(awaiting)
            self._turn(self._machine.fail(TimeoutError(f"no reply within {seconds:g} seconds")))


def _receive_buffer() -> memoryview:
    """Return the one buffer that all sessions of this thread receive into, each at once."""
    view: memoryview | None = getattr(_local, "view", None)
    if view is None:
        view = _local.view = memoryview(bytearray(_BUFFER_SIZE))
    return view
