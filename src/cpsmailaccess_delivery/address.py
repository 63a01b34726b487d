"""Addresses and host names: what may stand in an envelope (RFC 5321, RFC 6531, RFC 5890)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from email.utils import getaddresses
from functools import lru_cache
from typing import Final

import idna

from .errors import InvalidAddress, NoRecipients

#: Octets in a path, RFC 5321 section 4.5.3.1.3, less its angle brackets.
MAX_ADDRESS: Final = 254

#: Characters that are looked at: an address, its display name and some comments.
_MAX_TEXT: Final = 2000

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\-\u00a0-\U0010ffff]+"
_DOT_STRING = re.compile(rf"{_ATOM}(?:\.{_ATOM})*\Z")
_QUOTED_STRING = re.compile(r'"(?:[ !#-\[\]-~\u00a0-\U0010ffff]|\\[ -~])*"\Z')
_QUOTED_PAIR = re.compile(r"\\(.)")
_TO_BE_QUOTED = re.compile(r'["\\]')
_ZONE = re.compile(r"[A-Za-z0-9._-]+\Z")  # of an IPv6 address (RFC 4007 section 11)
_LABELS = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\Z")


def check_address(address: object) -> str:
    """Return a bare address (``local@domain``) as it may stand in an envelope.

    Accepts what callers of zope.sendmail and MailHost hand over: ``str``, ASCII or
    UTF-8 ``bytes``, ``Name <address>`` or an `email.header.Header`; the display name
    is dropped.  Raises `InvalidAddress`.
    """
    if isinstance(address, bytes):
        try:
            address = address.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidAddress(f"address {address!r}: is not UTF-8") from None
    return _check_text(str(address) if address is not None else "")


@lru_cache(4096)  # the same people write and are written to
def _check_text(text: str) -> str:
    if len(text) > _MAX_TEXT:
        raise InvalidAddress(f"address {text[:40]!r}...: is longer than {MAX_ADDRESS} octets")
    if _CONTROL.search(text):
        raise InvalidAddress(
            f"address {text!r}: CR, LF, NUL and control characters are not allowed in an"
            " address; take them out"
        )
    text = text.strip()
    bare = text if _is_bare(text) else _one_address(text)
    if not bare:
        raise InvalidAddress(
            f"address {text!r}: is empty, malformed or more than one; write local@domain"
        )
    local, at, domain = bare.rpartition("@")
    if not at or not local or not domain:
        raise InvalidAddress(f"address {text!r}: has no domain; write local@domain")
    if (not _DOT_STRING.match(local) or _has_space(local)) and not _QUOTED_STRING.match(local):
        raise InvalidAddress(
            f"address {text!r}: the part before the @ is not allowed (RFC 5321 section 4.1.2)"
        )
    _check_domain(text, domain)
    if len(bare.encode()) > MAX_ADDRESS:
        raise InvalidAddress(f"address {text[:40]!r}...: is longer than {MAX_ADDRESS} octets")
    return bare


def check_recipients(addresses: object) -> tuple[str, ...]:
    """Return the recipients, checked, in order, each once.

    A single ``str`` or ``bytes`` is one recipient, as in smtplib.  Raises
    `InvalidAddress` and `NoRecipients`.
    """
    if isinstance(addresses, str | bytes):
        addresses = (addresses,)
    if not isinstance(addresses, Iterable):
        raise InvalidAddress(f"recipients {addresses!r}: are a sequence of addresses")
    recipients = tuple(dict.fromkeys(check_address(address) for address in addresses))
    if not recipients:
        raise NoRecipients("the mail has no recipients; give at least one address")
    return recipients


def without_quotes(local: str) -> str:
    """Return the part before the @ as it is written with the fewest quotes and backslashes.

    ``"alice"`` and ``"al\\ice"`` are nobody but ``alice``: RFC 5321 section 4.1.2.
    """
    if not local.startswith('"'):
        return local
    text = _QUOTED_PAIR.sub(r"\1", local[1:-1])
    if _DOT_STRING.match(text) and not _has_space(text):
        return text
    return '"' + _TO_BE_QUOTED.sub(r"\\\g<0>", text) + '"'


def ascii_host(host: object) -> str:
    """Return a host name in lower-case ASCII (IDNA 2008, RFC 5891), or an IP address.

    Raises `InvalidAddress`.
    """
    if not isinstance(host, str):
        raise InvalidAddress(f"host {host!r}: is no host name and no IP address")
    return _ascii_host(host)


@lru_cache(4096)  # to look for an IP address costs more than all other checks of an address
def _ascii_host(host: str) -> str:
    text = host.strip().removesuffix(".")
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    _, percent, zone = bare.partition("%")
    if not percent or _ZONE.match(zone):  # ipaddress takes anything for a zone
        try:
            return str(ipaddress.ip_address(bare))
        except ValueError:
            pass
    if not text.isascii():
        try:
            text = idna.encode(text, uts46=True).decode("ascii")
        except idna.IDNAError as error:
            raise InvalidAddress(f"host {host!r}: is no host name: {error}") from None
    if not _LABELS.match(text) or len(text) > 253:
        raise InvalidAddress(f"host {host!r}: is no host name and no IP address")
    return text.lower()


def relay_name(host: str, port: int) -> str:
    """Return a relay as people write it: ``host:port``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_ip_address(host: str) -> bool:
    """Tell whether the host is an address, so that there is nothing to look up."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Tell whether the host, by its text alone, is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")  # RFC 6761 section 6.3


def _is_bare(text: str) -> bool:
    return not any(mark in text for mark in '<>(),:;" ') and text.count("@") == 1


def _has_space(text: str) -> bool:
    """Tell whether there is white space of any script: \u00a0, \u3000 and their like.

    Control characters are none: they were refused before.
    """
    return " " in text if text.isascii() else any(character.isspace() for character in text)


def _one_address(text: str) -> str:
    try:
        found = [address for _, address in getaddresses([text]) if address]
    except RecursionError:  # comments in comments in comments
        return ""
    return found[0] if len(found) == 1 else ""


def _check_domain(text: str, domain: str) -> None:
    if domain.startswith("[") and domain.endswith("]"):
        literal = domain[1:-1]
        try:
            if "%" in literal:  # a zone, which may be any text: "1%> NOTIFY=NEVER"
                raise ValueError
            ipaddress.ip_address(literal[5:] if literal[:5].lower() == "ipv6:" else literal)
        except ValueError:
            raise InvalidAddress(f"address {text!r}: [{literal}] is no IP address") from None
        return
    if ":" in domain:  # which `ascii_host` takes
        raise InvalidAddress(f"address {text!r}: an IPv6 address stands in brackets: [IPv6:::1]")
    if domain.endswith(".") or _has_space(domain):  # `ascii_host` forgives both
        raise InvalidAddress(f"address {text!r}: the domain has white space or a dot at its end")
    try:
        ascii_host(domain)
    except InvalidAddress as error:
        raise InvalidAddress(f"address {text!r}: {error}") from None
