"""From what happened to an outcome: one pure function, `classify`.

Unknown means temporary: only what is known to be final is refused.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from .interfaces import State
from .smtp.reply import Reply


class Phase(StrEnum):
    """Where in a session something happened, in the order of RFC 5321 section 3."""

    CONNECT = "connect"  # name look-up and TCP
    TLS = "tls"  # handshake, and STARTTLS itself
    GREETING = "greeting"
    HELLO = "hello"  # EHLO or HELO
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"  # DATA, before its 354
    BODY = "body"  # from the end of data (or BDAT LAST) to its reply
    IDLE = "idle"  # between mails: RSET, NOOP, QUIT


class Trouble(StrEnum):
    """Whose trouble it is, beside what it means for the mail."""

    NONE = ""
    MAIL = "mail"  # this mail or recipient only
    ACCOUNT = "account"  # login, certificate, host name: somebody must mend the account
    RELAY = "relay"  # down, busy or silent: all mail of the lane waits


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an event means for the mail, and whose trouble it is."""

    state: State
    trouble: Trouble = Trouble.NONE


ACCEPTED: Final = Verdict(State.ACCEPTED)
REFUSED: Final = Verdict(State.REFUSED, Trouble.MAIL)
UNCLEAR: Final = Verdict(State.UNCLEAR, Trouble.RELAY)
_DEFERRED_MAIL: Final = Verdict(State.DEFERRED, Trouble.MAIL)
_DEFERRED_ACCOUNT: Final = Verdict(State.DEFERRED, Trouble.ACCOUNT)
_DEFERRED_RELAY: Final = Verdict(State.DEFERRED, Trouble.RELAY)

_MAIL_PHASES: Final = (Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.BODY)

#: Login needed or failed, mechanism too weak, encryption needed: RFC 4954 section 6.
_LOGIN_CODES: Final = (530, 534, 535, 538)

#: Said of a command, not of a mail: syntax, not implemented, bad sequence.
_PROTOCOL_CODES: Final = (500, 502, 503, 504)


def classify(
    phase: Phase, reply: Reply | None = None, error: BaseException | None = None
) -> Verdict:
    """Return what a reply, or its absence, means in a phase.

    `reply`: the relay's answer; None when the connection failed first.  `error`: what
    it failed with, if anything is known.
    """
    if reply is None:
        return _classify_silence(phase, error)
    code = reply.code
    if phase is Phase.BODY and 200 <= code < 300:
        return ACCEPTED
    if code in _LOGIN_CODES or (phase is Phase.AUTH and 500 <= code < 600):
        return _DEFERRED_ACCOUNT
    if code == 421 or phase not in _MAIL_PHASES:
        return _DEFERRED_RELAY  # RFC 5321 section 3.8: the session ends
    if 500 <= code < 600:
        if code == 552 and phase is Phase.RCPT:
            return _DEFERRED_MAIL  # RFC 5321 section 4.5.3.1.10: means 452
        if code in _PROTOCOL_CODES:
            return _DEFERRED_RELAY
        return REFUSED
    return _DEFERRED_MAIL


def _classify_silence(phase: Phase, error: BaseException | None) -> Verdict:
    if phase is Phase.BODY:
        return UNCLEAR
    if isinstance(error, ssl.SSLCertVerificationError):
        return _DEFERRED_ACCOUNT
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        return _DEFERRED_ACCOUNT
    return _DEFERRED_RELAY
