"""What a sender wants to be told of his mail: the DSN extension of SMTP (RFC 3461).

The words here are ours, as `send` and the private block have them; `smtp.prepare` says them to a
relay that offers DSN, `notices` keeps to them itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

SUCCESS: Final = "success"
FAILURE: Final = "failure"
DELAY: Final = "delay"
NEVER: Final = "never"

FULL: Final = "full"
HEADERS: Final = "headers"

#: What may be wanted, in the order in which it is written.
EVENTS: Final = (SUCCESS, FAILURE, DELAY)

#: What is returned of a mail that failed (RFC 3461 section 4.3).
RETURNS: Final = (FULL, HEADERS)

#: Every value of ``Envelope.notify``, but "": nothing was said, which means failures and delays.
NOTIFIES: Final = (
    NEVER,
    *(
        ",".join(event for bit, event in enumerate(EVENTS) if number >> bit & 1)
        for number in range(1, 2 ** len(EVENTS))
    ),
)

_NOT_XTEXT = re.compile(rb"[^!-*,-<>-~]")
_MAX_ENVID: Final = 100  # characters: RFC 3461 section 4.4
_MAX_ORCPT: Final = 500  # and section 4.2


@dataclass(frozen=True, slots=True)
class Wish:
    """What one mail asks of a relay.  ``envelope_id``: comes back in notifications."""

    notify: str = ""
    ret: str = ""
    envelope_id: str = ""


def wants(notify: str, event: str) -> bool:
    """Tell whether a sender is to be told of an event; `notify`: see `NOTIFIES`."""
    return event in notify.split(",") if notify else event != SUCCESS


def xtext(text: str) -> str:
    """Return a text as a parameter of a command can carry it (RFC 3461 section 4)."""
    escaped = _NOT_XTEXT.sub(lambda match: b"+%02X" % match[0][0], text.encode("utf-8", "replace"))
    return escaped.decode("ascii")


def seven_bit_address(address: str) -> str:
    """Return an address beyond ASCII as utf-8-addr-xtext (RFC 6533 section 3)."""
    return "".join(
        c if "!" <= c <= "~" and c not in "\\+=" else f"\\x{{{ord(c):02X}}}" for c in address
    )


def mail_parameters(wish: Wish) -> bytes:
    """Return what MAIL says of a wish, with a space before each: RET and ENVID."""
    text = {"": "", FULL: " RET=FULL", HEADERS: " RET=HDRS"}[wish.ret]
    envelope_id = xtext(wish.envelope_id) if wish.envelope_id.isascii() else ""
    if 0 < len(envelope_id) <= _MAX_ENVID:
        text += f" ENVID={envelope_id}"
    return text.encode("ascii")


def recipient_parameters(wish: Wish, recipient: str) -> bytes:
    """Return what RCPT says of a wish: NOTIFY, and ORCPT, the address as the sender wrote it."""
    if recipient.isascii():
        original = f"rfc822;{xtext(recipient)}"
    else:
        original = f"utf-8;{seven_bit_address(recipient)}"
    text = f" NOTIFY={wish.notify.upper()}" if wish.notify else ""
    if len(original) <= _MAX_ORCPT:
        text += f" ORCPT={original}"
    return text.encode("ascii")
