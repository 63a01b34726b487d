"""From what happened to an outcome: one pure function, `classify`.

Unknown means temporary: only what is known to be final is refused.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from .errors import RelayNotAllowed
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
    ACCOUNT = "account"  # certificate, host name, TLS: somebody must mend the account
    LOGIN = "login"  # the same, and to try again too often may lock the mailbox
    RELAY = "relay"  # down, busy or silent: all mail of the lane waits


@dataclass(frozen=True, slots=True)
class Meaning:
    """What an event means for the mail, and whose trouble it is."""

    state: State
    trouble: Trouble = Trouble.NONE


TAKEN: Final = Meaning(State.ACCEPTED)
REFUSED: Final = Meaning(State.REFUSED, Trouble.MAIL)
UNCLEAR: Final = Meaning(State.UNCLEAR, Trouble.RELAY)
_DEFERRED_MAIL: Final = Meaning(State.DEFERRED, Trouble.MAIL)
_DEFERRED_ACCOUNT: Final = Meaning(State.DEFERRED, Trouble.ACCOUNT)
_DEFERRED_LOGIN: Final = Meaning(State.DEFERRED, Trouble.LOGIN)
_DEFERRED_RELAY: Final = Meaning(State.DEFERRED, Trouble.RELAY)

_BODY: Final = Phase.BODY
_MAIL_PHASES: Final = (Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.BODY)

#: Login needed or failed, mechanism too weak: RFC 4954 section 6.
_LOGIN_CODES: Final = (530, 534, 535)

#: Encryption needed; we say it too, of a relay that does not offer STARTTLS.
_ENCRYPTION_NEEDED: Final = 538

#: Said of a command, not of a mail: syntax, not implemented, bad sequence.
_PROTOCOL_CODES: Final = (500, 502, 503, 504)

#: The CA file of ``verify`` cannot be read.
_BAD_CA_FILE: Final = (FileNotFoundError, PermissionError, IsADirectoryError)

#: The CA file holds no certificate; TLS from the first byte on a port that expects none.
_BAD_TLS_SETTINGS: Final = ("NO_CERTIFICATE_OR_CRL_FOUND", "WRONG_VERSION_NUMBER")


def classify(
    phase: Phase, reply: Reply | None = None, error: BaseException | None = None
) -> Meaning:
    """Return what a reply, or its absence, means in a phase.

    `reply`: the relay's answer; None when the connection failed first.  `error`: what
    it failed with, if anything is known.
    """
    if reply is None:
        return _classify_silence(phase, error)
    code = reply.code
    if phase is _BODY and 200 <= code < 300:
        return TAKEN
    if code == _ENCRYPTION_NEEDED:
        return _DEFERRED_ACCOUNT
    if code in _LOGIN_CODES or (phase is Phase.AUTH and 500 <= code < 600):
        return _DEFERRED_LOGIN
    if code == 421 or phase not in _MAIL_PHASES:
        return _DEFERRED_RELAY  # RFC 5321 section 3.8: the session ends
    if 500 <= code < 600:
        if code == 552 and phase is Phase.RCPT:
            return _DEFERRED_MAIL  # RFC 5321 section 4.5.3.1.10: means 452
        if code in _PROTOCOL_CODES:
            return _DEFERRED_RELAY
        return REFUSED
    return _DEFERRED_MAIL


def _classify_silence(phase: Phase, error: BaseException | None) -> Meaning:
    if phase is Phase.BODY:
        return UNCLEAR
    if isinstance(error, ssl.SSLCertVerificationError | RelayNotAllowed):
        return _DEFERRED_ACCOUNT
    if phase is Phase.TLS and isinstance(error, _BAD_CA_FILE):
        return _DEFERRED_ACCOUNT
    if isinstance(error, ssl.SSLError) and getattr(error, "reason", "") in _BAD_TLS_SETTINGS:
        return _DEFERRED_ACCOUNT
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        return _DEFERRED_ACCOUNT
    return _DEFERRED_RELAY
