"""From replies and failures to outcomes: unknown means temporary."""

from __future__ import annotations

import socket
import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpsmailaccess_delivery.interfaces import State
from cpsmailaccess_delivery.outcome import Phase, Trouble, classify
from cpsmailaccess_delivery.smtp.reply import Reply

MAIL_PHASES = [Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.BODY]
SESSION_PHASES = [phase for phase in Phase if phase not in MAIL_PHASES]


def judged(phase: Phase, code: int) -> tuple[str, str]:
    meaning = classify(phase, Reply(code, "text"))
    return str(meaning.state), str(meaning.trouble)


@pytest.mark.parametrize("code", [200, 250, 252, 299])
def test_accepted_is_said_after_the_end_of_data_only(code):
    assert judged(Phase.BODY, code) == ("accepted", "")
    for phase in Phase:
        if phase is not Phase.BODY:
            assert judged(phase, code)[0] == "deferred"


@pytest.mark.parametrize("phase", MAIL_PHASES)
@pytest.mark.parametrize("code", [501, 521, 550, 551, 553, 554, 555, 556, 571, 599])
def test_refused(phase, code):
    assert judged(phase, code) == ("refused", "mail")


@pytest.mark.parametrize(
    ("phase", "code", "state", "trouble"),
    [
        (Phase.RCPT, 450, "deferred", "mail"),  # greylisting
        (Phase.RCPT, 451, "deferred", "mail"),
        (Phase.RCPT, 452, "deferred", "mail"),
        (Phase.RCPT, 552, "deferred", "mail"),  # too many recipients, RFC 5321 4.5.3.1.10
        (Phase.MAIL, 552, "refused", "mail"),  # too large
        (Phase.BODY, 552, "refused", "mail"),
        (Phase.BODY, 451, "deferred", "mail"),
        (Phase.BODY, 421, "deferred", "relay"),
        (Phase.RCPT, 421, "deferred", "relay"),
        (Phase.MAIL, 530, "deferred", "login"),
        (Phase.RCPT, 535, "deferred", "login"),
        (Phase.AUTH, 535, "deferred", "login"),
        (Phase.AUTH, 550, "deferred", "login"),
        (Phase.AUTH, 504, "deferred", "login"),
        (Phase.AUTH, 454, "deferred", "relay"),  # Gmail: too many login attempts
        (Phase.AUTH, 421, "deferred", "relay"),
        (Phase.MAIL, 500, "deferred", "relay"),
        (Phase.MAIL, 502, "deferred", "relay"),
        (Phase.MAIL, 503, "deferred", "relay"),  # nested MAIL: the session's fault
        (Phase.RCPT, 503, "deferred", "relay"),
        (Phase.DATA, 354, "deferred", "mail"),
        (Phase.BODY, 354, "deferred", "mail"),
        (Phase.GREETING, 554, "deferred", "relay"),
        (Phase.GREETING, 521, "deferred", "relay"),
        (Phase.HELLO, 550, "deferred", "relay"),
        (Phase.TLS, 454, "deferred", "relay"),
        (Phase.IDLE, 500, "deferred", "relay"),
    ],
)
def test_table(phase, code, state, trouble):
    assert judged(phase, code) == (state, trouble)


@given(st.sampled_from(SESSION_PHASES), st.integers(0, 999))
def test_a_session_that_does_not_come_about_refuses_no_mail(phase, code):
    assert judged(phase, code)[0] == "deferred"


@given(st.sampled_from(list(Phase)), st.integers(0, 999))
def test_unknown_is_temporary(phase, code):
    state, trouble = judged(phase, code)
    assert state in ("accepted", "refused", "deferred")
    if not 500 <= code < 600:
        assert state != "refused"
    assert (trouble == "") == (state == "accepted")


CERTIFICATE = ssl.SSLCertVerificationError(1, "certificate verify failed")


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (None, Trouble.RELAY),
        (TimeoutError(), Trouble.RELAY),
        (ConnectionResetError(), Trouble.RELAY),
        (ConnectionRefusedError(), Trouble.RELAY),
        (OSError(113, "No route to host"), Trouble.RELAY),
        (ssl.SSLError(1, "wrong version number"), Trouble.RELAY),
        (CERTIFICATE, Trouble.ACCOUNT),
        (socket.gaierror(socket.EAI_AGAIN, "try again"), Trouble.RELAY),
        (socket.gaierror(socket.EAI_NONAME, "no such name"), Trouble.ACCOUNT),
        (RuntimeError("a bug of ours"), Trouble.RELAY),
        (KeyboardInterrupt(), Trouble.RELAY),
    ],
)
@pytest.mark.parametrize("phase", list(Phase))
def test_silence(phase, error, trouble):
    meaning = classify(phase, error=error)
    if phase is Phase.BODY:
        assert meaning.state is State.UNCLEAR
    else:
        assert meaning.state is State.DEFERRED
        assert meaning.trouble is trouble
