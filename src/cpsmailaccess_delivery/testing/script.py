"""Rules that make the test server misbehave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

#: Where a rule may step in: a verb, or a moment between verbs.  CONTENT: the first byte
#: after DATA's 354.  BODY: the end of data, before the mail is recorded.  TAKEN: after
#: that, before its reply.  TLS: before the handshake, of either kind.
PHASES: Final = frozenset(
    (
        *("GREETING", "TLS", "EHLO", "HELO", "STARTTLS", "AUTH", "RSET", "NOOP", "VRFY", "QUIT"),
        *("MAIL", "RCPT", "DATA", "CONTENT", "BDAT", "BODY", "TAKEN"),
    )
)


@dataclass(slots=True, eq=False)
class Rule:
    """One change of the server's behaviour, see `SMTPServer.on`."""

    phase: str
    reply: bytes | None = None
    drop: bool = False
    silence: bool = False
    delay: float = 0.0
    match: bytes = b""
    after: int = 0
    times: int | None = None
    hits: int = 0

    def applies(self, phase: str, subject: bytes, taken: int) -> bool:
        """Tell whether the rule steps in now.  `taken`: mails that the server has."""
        return (
            phase == self.phase
            and taken >= self.after
            and (self.times is None or self.hits < self.times)
            and self.match in subject
        )


def make_rule(
    phase: str,
    *,
    reply: str | bytes | None,
    drop: bool,
    silence: bool,
    delay: float,
    match: str,
    after: int,
    times: int | None,
) -> Rule:
    """Return a rule.  Raises ValueError for a phase that there is not."""
    if phase not in PHASES:
        raise ValueError(f"phase {phase!r}: is one of {', '.join(sorted(PHASES))}")
    if isinstance(reply, str):
        if not reply[:3].isdecimal() or reply[3:4] not in ("", " ", "-"):
            raise ValueError(f"reply {reply!r}: begins with three digits; garbage goes in bytes")
        reply = "\r\n".join([*reply.splitlines(), ""]).encode()
    return Rule(phase, reply, drop, silence, delay, match.encode(), after, times)
