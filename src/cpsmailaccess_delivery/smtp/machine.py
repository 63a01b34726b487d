"""The SMTP client as a machine: bytes in, events and bytes out.  No socket, no clock.

`opening` leads to the login, `mails` sends; here is what connects them with a transport,
and how a session ends.  What holds whatever a relay says and whenever the connection dies:

* every mail taken by `send` comes back once, as `MailDone` or as `MailUnsent`;
* a recipient is unclear (`Phase.BODY` without a reply) exactly when the transport was
  given the end of data, the relay has not refused the recipient, and no reply came;
* after an error of one mail, RSET goes before the next;
* `Closed` comes once, last.
"""

from __future__ import annotations

from ..outcome import Phase
from .events import (
    Closed,
    Event,
    Failure,
    Mail,
    MailDone,
    MailUnsent,
    Ready,
    Result,
    StartTls,
)
from .mails import SLICE, WINDOW, Mails
from .opening import State
from .prepare import Transaction
from .reply import ProtocolError

__all__ = [
    "WINDOW",
    "Closed",
    "Event",
    "Failure",
    "Machine",
    "Mail",
    "MailDone",
    "MailUnsent",
    "Ready",
    "Result",
    "StartTls",
    "State",
]


class Machine(Mails):
    """One session with one relay, for one account."""

    def __repr__(self) -> str:
        return f"<Machine {self.account.relay} {self.state.name} {len(self._flying)} in flight>"

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the relay."""
        self._fresh = True
        expected = self._expected
        try:
            for raw in self._parser.split(data):
                if self.state is State.CLOSED:
                    break
                self.replies += 1
                if not expected:
                    self._unasked(raw)
                    break
                handler, self._phase, transaction = expected.popleft()
                if raw.startswith(b"421"):
                    self._hung_up(raw, transaction)
                else:
                    handler(raw, transaction)
            if self.state is State.TLS and (self._parser.pending or self._parser.error):
                self._unasked(data)
            if self._parser.error:
                self._phase = expected[0][1] if expected else Phase.IDLE
                raise self._parser.error
        except ProtocolError as error:
            if self._gives_away(str(error)):
                error = ProtocolError("the relay speaks no SMTP")
            self._lost(self._phase, error)
        return self._take_events()

    def data_to_send(self) -> bytes:
        """Return what the transport must write now, about `SLICE` bytes at most; or b"".

        A transaction whose last byte is in it has its end of data sent from now on.
        """
        out = self._out
        if not out:
            self._fresh = False
            return b""
        pieces: list[bytes | memoryview] = []
        size = 0
        while out and (size < SLICE or isinstance(out[0], Transaction)):
            piece = out.popleft()
            if isinstance(piece, Transaction):
                piece.ended = True
            else:
                pieces.append(piece)
                size += len(piece)
        return b"".join(pieces)

    def eof(self) -> list[Event]:
        """Take the end of the connection."""
        return self.fail(ConnectionResetError("the relay closed the connection"))

    def fail(self, error: BaseException, phase: Phase | None = None) -> list[Event]:
        """Take a failure of the connection, or a deadline that has passed.

        `phase`: when the transport knows better than the machine: CONNECT, TLS.
        """
        self._lost(phase or self.awaiting or Phase.IDLE, error)
        return self._take_events()

    def quit(self) -> list[Event]:
        """Take no more mail; QUIT when those in flight are done."""
        self._leaving = True
        if self.state is State.READY:
            if not self._flying:
                self._say_quit()
        elif self.state not in (State.QUIT, State.CLOSED):
            self._close(None)
        return self._take_events()

    def stop(self) -> list[Event]:
        """Hand back every mail whose end of data is not sent; `quit` after the others."""
        self._hand_back()
        return self.quit()

    def abort(self) -> list[Event]:
        """End now.  What is past its end of data is unclear, the rest is handed back."""
        if self.state is not State.CLOSED:
            self._hand_back()
            error = ConnectionAbortedError("the session was aborted on our side")
            self._abandon(Phase.BODY, None, error, executed=True)
            self._close(None)
        return self._take_events()

    def _unasked(self, raw: bytes) -> None:
        if self.state is State.READY and raw.startswith(b"421"):
            self._close(None)  # it has waited long enough for us
            return
        self._phase = Phase.TLS if self.state is State.TLS else Phase.IDLE
        raise ProtocolError("the relay sent a reply that nothing had asked for")

    def _hung_up(self, raw: bytes, transaction: Transaction | None) -> None:
        """421: the relay ends the session, and does nothing of what else is on its way."""
        if self.state is State.QUIT:
            self._close(None)
            return
        reply = self._reply(raw)
        self._abandon(self._phase, reply, None, executed=False)
        self._close(Failure(self._phase, reply))

    def _lost(self, phase: Phase, error: BaseException) -> None:
        if self.state is State.CLOSED:
            return
        if self.state is State.QUIT:
            self._close(None)
            return
        head = self._flying[0] if self._flying else None
        stale = self._stale(head, error)
        if head is not None and phase is Phase.BODY and not head.ended:
            phase = Phase.DATA
        self._abandon(phase, None, error, executed=True)
        self._close(None if stale else Failure(phase, None, error))

    def _stale(self, head: Transaction | None, error: BaseException) -> bool:
        """Whether the relay hung up between two mails, as it may."""
        if self.state is not State.READY or isinstance(error, ProtocolError):
            return False
        if head is None:
            return True
        untouched = self._done and not head.asked and not head.ended
        return bool(untouched) and isinstance(error, ConnectionError)
