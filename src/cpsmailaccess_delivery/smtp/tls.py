"""TLS for sessions: one context per setting and process, for each costs 30 ms to make."""

from __future__ import annotations

import os
import ssl
import threading

_lock = threading.Lock()
_contexts: dict[bool | str, tuple[object, ssl.SSLContext]] = {}


def client_context(verify: bool | str) -> ssl.SSLContext:
    """Return the context for an account's ``verify``; TLS 1.2 is the least (RFC 8997).

    A CA file that has changed on disk is read again.  Raises `OSError` (`ssl.SSLError`
    is one) when it cannot be read.
    """
    version = _version(verify)
    with _lock:
        known = _contexts.get(verify)
        if known is None or known[0] != version:
            known = _contexts[verify] = (version, _make(verify))
        return known[1]


def _version(verify: bool | str) -> object:
    if isinstance(verify, bool):
        return None
    stat = os.stat(verify)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _make(verify: bool | str) -> ssl.SSLContext:
    if isinstance(verify, str):
        context = ssl.create_default_context(cafile=verify)
    else:
        context = ssl.create_default_context()
    if verify is False:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
