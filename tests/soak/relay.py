"""The relay: it misbehaves by chance, and writes down what it took and whether it said so."""

from __future__ import annotations

import random
from dataclasses import dataclass

from cpsmailaccess_delivery.testing import SMTPServer
from cpsmailaccess_delivery.testing.received import ReceivedMail
from cpsmailaccess_delivery.testing.script import Rule, make_rule

_NOTHING = {"reply": None, "drop": False, "silence": False, "delay": 0.0}
#: Phase, share of the cases, what happens.
_MISCHIEF = (
    ("GREETING", 0.02, {"reply": "421 4.3.2 later", "drop": True}),
    ("MAIL", 0.004, {"reply": "421 4.3.2 restarting", "drop": True}),
    ("RCPT", 0.02, {"reply": "450 4.2.0 greylisted"}),
    ("CONTENT", 0.004, {"drop": True}),
    ("BODY", 0.02, {"reply": "451 4.3.0 try again"}),
    ("BODY", 0.004, {"drop": True}),
    ("BODY", 0.03, {"delay": 0.1}),
    ("TAKEN", 0.01, {"drop": True}),
    ("TAKEN", 0.02, {"delay": 0.2}),
)


@dataclass(slots=True)
class Delivery:
    mail: str
    session: int
    at: float  # seconds since the epoch
    replied: bool = True  # it said, or is about to say, that it took the mail


class Relay(SMTPServer):
    """`chance`: what decides on mischief.  ``behaves``: there is none any more."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.behaves = False
        self.deliveries: list[Delivery] = []
        self._chance = chance
        self._mischief = [
            (phase, share, make_rule(phase, **{**_NOTHING, **what}, match="", after=0, times=None))
            for phase, share, what in _MISCHIEF
        ]

    def find_rule(self, phase: str, subject: bytes) -> Rule | None:
        if self.behaves:
            return None
        for wanted, share, rule in self._mischief:
            if wanted == phase and self._chance.random() < share:
                if phase == "TAKEN" and rule.drop:
                    self.deliveries[-1].replied = False
                return rule
        return None

    def take(self, mail: ReceivedMail) -> None:
        super().take(mail)
        self.deliveries.append(Delivery(mail.message_id, mail.session, mail.at))

    def clients(self) -> dict[int, str]:
        """Return the name that each session's client gave in EHLO."""
        return {
            command.session: command.line.split()[1].partition(".")[0]
            for command in list(self.commands)
            if command.line.upper().startswith("EHLO ")
        }
