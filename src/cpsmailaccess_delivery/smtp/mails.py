"""Mail after mail through one session, by what the relay offers.  Pure.

::

    one at a time       MAIL | RCPT | RCPT | DATA | body .        each waits for its reply
    PIPELINING          MAIL RCPT RCPT DATA | body . MAIL RCPT DATA | body . ...
    ... and CHUNKING    MAIL RCPT BDAT body RSET MAIL RCPT BDAT body RSET ...   (a window)

The second is RFC 2920 section 3.1: the next mail travels in the same group as this one's
end of data.  In the third (RFC 3030) a RSET stands between two mails, so that a BDAT that
fails leaves no transaction into which the next RCPT would fall.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from ..account import Account, Secret
from ..outcome import Phase
from .events import Event, Failure, Mail, MailDone, MailUnsent, Result
from .opening import Opening, State
from .prepare import Transaction, prepare
from .reply import ProtocolError, Reply
from .wire import stuff

#: With CHUNKING, mails and octets of bodies that may wait for their replies.
WINDOW: Final = 8
WINDOW_BYTES: Final = 1024 * 1024

#: Octets of a body that are handed to the transport at a time.
SLICE: Final = 256 * 1024

_MAIL: Final = Phase.MAIL  # to look a member up in its class costs ten times as much
_RCPT: Final = Phase.RCPT
_DATA: Final = Phase.DATA
_BODY: Final = Phase.BODY
_READY: Final = State.READY

_OK: Final = ord("2")
_GO_ON: Final = ord("3")
_REFUSED: Final = b"45"


class Mails(Opening):
    """The second half of `machine.Machine`: what happens once per mail."""

    def __init__(self, account: Account, secret: Secret | None, *, helo_name: str) -> None:
        super().__init__(account, secret, helo_name=helo_name)
        self.accepted = 0  # mails that the relay took
        self.window = WINDOW
        self._flying: deque[Transaction] = deque()  # the oldest first
        self._flying_bytes = 0
        self._left = account.mails_per_session
        self._done = 0  # mails that the relay has answered for
        self._fresh = True  # the relay was heard in this turn
        self._probing = False  # BDAT waits for the replies to RCPT
        self._dirty = False  # RSET before the next mail
        self._leaving = False  # no more mails, QUIT after those in flight
        self._cut = False  # the relay waits for data that will not come: no QUIT

    @property
    def answered(self) -> int:
        """Mails that the relay has answered for, in one way or another."""
        return self._done

    @property
    def in_flight(self) -> int:
        """Mails that were taken and not given back."""
        return len(self._flying)

    @property
    def wants_mail(self) -> bool:
        """Whether `send` may be called now."""
        if self._leaving or self.state is not _READY:
            return False
        flying = self._flying
        if not flying:
            return True
        relay = self.capabilities
        if not relay.pipelining:
            return False
        if relay.chunking:
            if self._probing:
                return False
            return len(flying) < self.window and self._flying_bytes < WINDOW_BYTES
        return len(flying) == 1 and self._expected[0][1] is _BODY

    def send(self, mail: Mail) -> list[Event]:
        """Take a mail; only while `wants_mail`."""
        relay = self.capabilities
        transaction = prepare(mail, relay)
        if not transaction.recipients:
            self._events.append(MailDone(mail, transaction.results))
            return self._take_events()
        reset = self._dirty or (relay.chunking and bool(self._flying))
        # Ask before a whole mail goes into a connection that is new, or was idle and may be
        # dead: else a relay that hangs up at once makes that mail, and others, unclear.
        untried = not self._fresh or not self._done
        self._probing = relay.chunking and not self._flying and untried
        self._dirty = False
        self._left -= 1
        self._leaving = not self._left
        self._flying.append(transaction)
        self._flying_bytes += len(transaction.body)
        if reset:
            self._out.append(b"RSET\r\n")
            self._expected.append((self._on_reset, Phase.IDLE, transaction))
        if relay.pipelining:
            group = [transaction.mail_command, *transaction.commands]
            self._expected.append((self._on_mail, _MAIL, transaction))
            expectation = (self._on_recipient, _RCPT, transaction)
            self._expected.extend([expectation] * len(transaction.commands))
            if not relay.chunking:
                group.append(b"DATA\r\n")
                self._expected.append((self._on_data, _DATA, transaction))
            self._out.append(b"".join(group))
            if relay.chunking and not self._probing:
                self._offer_data(transaction)
        elif not reset:
            self._out.append(transaction.mail_command)
            self._expected.append((self._on_mail, _MAIL, transaction))
        return self._take_events()

    def _offer_data(self, transaction: Transaction) -> None:
        if not self.capabilities.chunking:
            self._out.append(b"DATA\r\n")
            self._expected.append((self._on_data, _DATA, transaction))
            return
        self._probing = False
        self._out.append(b"BDAT %d LAST\r\n" % len(transaction.body))
        self._put_body(transaction.body, transaction)

    def _put_body(self, body: bytes, transaction: Transaction) -> None:
        if len(body) <= SLICE:
            self._out.append(body)
        else:
            view = memoryview(body)
            self._out.extend(view[at : at + SLICE] for at in range(0, len(body), SLICE))
        if not self.capabilities.chunking:
            self._out.append(b".\r\n")
        self._out.append(transaction)
        self._expected.append((self._on_end, _BODY, transaction))

    def _on_reset(self, raw: bytes, transaction: Transaction) -> None:
        if raw[0] == _OK:
            if not self.capabilities.pipelining:
                self._out.append(transaction.mail_command)
                self._expected.append((self._on_mail, _MAIL, transaction))
        elif raw[0] == _GO_ON:
            raise _out_of_turn(raw)
        elif transaction.ended:
            self._leaving = True  # its own replies tell
        else:
            reply = self._reply(raw)
            self._abandon(Phase.IDLE, reply, None, executed=True)
            self._close(Failure(Phase.IDLE, reply), polite=True)

    def _on_mail(self, raw: bytes, transaction: Transaction) -> None:
        transaction.asked = True
        if raw[0] == _GO_ON:
            raise _out_of_turn(raw)
        if raw[0] != _OK:
            transaction.refused = True
            if transaction.after_error and raw.startswith(b"503"):
                transaction.unsent = True  # the relay stumbles over the mail before
            else:
                transaction.settle(Result(_MAIL, self._reply(raw)))
            if not self.capabilities.pipelining:
                self._finish(transaction, failed=True)
                return
        if not self.capabilities.pipelining:
            self._next_recipient(transaction)

    def _on_recipient(self, raw: bytes, transaction: Transaction) -> None:
        recipient = transaction.recipients[transaction.cursor]
        transaction.cursor += 1
        if raw[0] == _OK:
            if transaction.refused:  # into whose transaction did it go?
                transaction.unsent = False
                transaction.results.pop(recipient, None)
                raise _out_of_turn(raw)
            transaction.accepted += 1
        elif raw[0] == _GO_ON:
            raise _out_of_turn(raw)
        elif not transaction.refused:
            transaction.results[recipient] = Result(_RCPT, self._reply(raw))
        if self._probing or not self.capabilities.pipelining:
            self._next_recipient(transaction)

    def _next_recipient(self, transaction: Transaction) -> None:
        """One at a time: RCPT, or what follows the last of them."""
        if transaction.cursor < len(transaction.commands):
            if not self.capabilities.pipelining:
                self._out.append(transaction.commands[transaction.cursor])
                self._expected.append((self._on_recipient, _RCPT, transaction))
        elif transaction.accepted:
            self._offer_data(transaction)
        else:
            self._finish(transaction, failed=True)

    def _on_data(self, raw: bytes, transaction: Transaction) -> None:
        if raw.startswith(b"354"):
            if transaction.accepted:
                self._put_body(stuff(transaction.body), transaction)
            else:  # RFC 2920 section 3.1: nothing for nobody
                self._out.append(b".\r\n")
                self._expected.append((self._on_nothing, _DATA, transaction))
        elif raw[0] in _REFUSED:
            transaction.settle(Result(_DATA, self._reply(raw)))
            self._finish(transaction, failed=True)
        else:
            raise _out_of_turn(raw)

    def _on_nothing(self, raw: bytes, transaction: Transaction) -> None:
        if raw[0] == _GO_ON:
            raise _out_of_turn(raw)
        self._finish(transaction, failed=True)

    def _on_end(self, raw: bytes, transaction: Transaction) -> None:
        if raw[0] == _GO_ON or (raw[0] == _OK and not transaction.ended):
            raise _out_of_turn(raw)
        if transaction.accepted:
            transaction.settle(Result(_BODY, self._reply(raw), None, transaction.notifies))
            self.accepted += raw[0] == _OK
        if transaction.ended:
            self._finish(transaction, failed=raw[0] != _OK or not transaction.accepted)
        else:  # refused while we were still writing it
            transaction.ended = True
            self._hand_back()
            self._leaving = self._cut = True
            self._finish(transaction, failed=True)

    def _finish(self, transaction: Transaction, *, failed: bool) -> None:
        self._flying.popleft()
        self._flying_bytes -= len(transaction.body)
        self._probing = False
        self._done += 1
        self._give(transaction)
        if failed:
            if self._flying:
                self._flying[0].after_error = True
            else:
                self._dirty = True
        if self._leaving and not self._flying:
            self._say_quit()

    def _give(self, transaction: Transaction) -> None:
        if transaction.unsent:
            self._events.append(MailUnsent(transaction.mail))
        else:
            self._events.append(MailDone(transaction.mail, transaction.results))

    def _hand_back(self) -> None:
        """Forget what is not past its end of data; the relay gets no more of it."""
        back = [transaction for transaction in self._flying if not transaction.ended]
        if not back:
            return
        self._cut = True
        self._out.clear()
        for transaction in back:  # always the last ones
            self._flying.pop()
            self._flying_bytes -= len(transaction.body)
            transaction.unsent = True
            self._give(transaction)
        expected = self._expected
        while expected and expected[-1][2] in back:
            expected.pop()

    def _abandon(
        self, phase: Phase, reply: Reply | None, error: BaseException | None, *, executed: bool
    ) -> None:
        """Give back every mail in flight with what can be said of it.

        `executed`: the relay may have done all that was sent, answered or not.  Only
        the first one can be blamed; and not it, when the session is to blame: it has
        carried mails before and ends before a word on this one.
        """
        head = True
        while self._flying:
            transaction = self._flying.popleft()
            if executed and transaction.ended:
                if not transaction.unsent:
                    transaction.settle(Result(_BODY, None, error))
            elif head and (transaction.asked or not self._done) and phase is not Phase.IDLE:
                transaction.settle(Result(phase, reply, error))
            else:
                transaction.unsent = True
            head = False
            self._give(transaction)
        self._flying_bytes = 0

    def _say_quit(self) -> None:
        if self._cut:
            self._close(None)
            return
        self.state = State.QUIT
        self._say(b"QUIT\r\n", self._on_quit, Phase.IDLE)

    def _on_quit(self, raw: bytes, _: None) -> None:
        self._close(None)


def _out_of_turn(raw: bytes) -> ProtocolError:
    return ProtocolError(f"the relay answered {raw[:3].decode()} where it may not")
