"""Why a session failed, in plain words, and what to do about it.  Pure."""

from __future__ import annotations

import socket
import ssl

from ..account import Account
from ..errors import RelayNotAllowed
from ..outcome import Phase
from .events import Failure


def explain(account: Account, failure: Failure) -> str:
    """Return in plain words what is wrong, and what to do."""
    error, phase = failure.error, failure.phase
    relay = account.relay
    if failure.reply is not None:
        return _explain_reply(account, failure)
    if isinstance(error, RelayNotAllowed):
        return f"{error}: choose another relay, or ask the administrator to allow its network."
    if isinstance(error, ssl.SSLCertVerificationError):
        return _explain_certificate(account, error)
    if isinstance(error, ssl.SSLError):
        return _explain_tls(account, error)
    if isinstance(error, FileNotFoundError | PermissionError):
        return f"The CA file cannot be read ({error}): correct verify."
    if isinstance(error, socket.gaierror):
        if error.errno == socket.EAI_AGAIN:
            return f"The name {account.host} cannot be looked up now: check the network, try again."
        return f"There is no host {account.host}: check the spelling of the host."
    if isinstance(error, ConnectionRefusedError):
        return f"Nothing listens at {relay}: check host and port (usually 465, 587 or 25)."
    if phase is Phase.CONNECT and isinstance(error, TimeoutError):
        return (
            f"{relay} does not answer: check host and port; a firewall may block port"
            f" {account.port} (port 25 often is; try 465 or 587)."
        )
    if phase is Phase.GREETING and account.security != "tls":
        return (
            f"{relay} answers, but sends no SMTP greeting ({failure.text}): if the port expects"
            ' TLS from the first byte, as 465 does, use security="tls".'
        )
    if phase is Phase.TLS and isinstance(error, OSError) and not isinstance(error, TimeoutError):
        return _not_tls(account, failure.text)
    return f"{relay} failed at {phase}: {failure.text}."


def _explain_reply(account: Account, failure: Failure) -> str:
    said = failure.text
    reply, phase = failure.reply, failure.phase
    assert reply is not None  # noqa: S101 - for the type checker
    if phase is Phase.TLS and reply.code == 538:
        return f'{account.relay} does not offer STARTTLS: try security="tls" with port 465.'
    if phase is Phase.AUTH and reply.code == 504:
        return (
            f'{account.relay} does not let us log in ({said}): use security="tls" or'
            ' "starttls" and the port for submission (465 or 587), or remove the username.'
        )
    if phase is Phase.AUTH and reply.code == 535:
        return (
            f"The relay does not accept this username and password ({said}): correct them;"
            " some providers want an application password."
        )
    if phase is Phase.AUTH:
        return f"The login failed ({said})."
    if 400 <= reply.code < 500:
        return f"{account.relay} turned us away for now, at {phase} ({said}): try again later."
    return f"{account.relay} turned us away at {phase} ({said})."


def _explain_certificate(account: Account, error: ssl.SSLCertVerificationError) -> str:
    reason = error.verify_message
    code = error.verify_code
    if code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH
        return (
            f"The certificate is for another name than {account.host} ({reason}): use as host"
            " the name that the provider's documentation gives."
        )
    if code == 10:  # X509_V_ERR_CERT_HAS_EXPIRED
        return f"The relay's certificate has expired ({reason}): its operator must renew it."
    if code in (18, 19, 20, 21):  # self-signed, or issued by nobody we know
        return (
            f"The relay's certificate comes from an unknown authority ({reason}): if it is your"
            " own, give the account its CA file: --ca-file of `cpsmail accounts set`, or caFile in"
            " ZCML."
        )
    return f"The relay's certificate is not valid ({reason})."


def _explain_tls(account: Account, error: ssl.SSLError) -> str:
    reason = error.reason or str(error)
    if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_EOF_WHILE_READING"):
        return _not_tls(account, reason)
    if "PROTOCOL" in reason:
        return f"The relay speaks only TLS older than 1.2 ({reason}): its operator must update it."
    if "X509" in reason or "PEM" in reason or "NO_CERTIFICATE_OR_CRL" in reason:
        return f"The CA file holds no certificate ({reason}): correct verify."
    return f"TLS with {account.relay} failed ({reason})."


def _not_tls(account: Account, reason: str) -> str:
    text = f"{account.relay} does not speak TLS from the first byte ({reason})"
    if account.security == "tls":
        return f'{text}: try security="starttls", usually with port 587.'
    return f"TLS with {account.relay} failed ({reason})."
