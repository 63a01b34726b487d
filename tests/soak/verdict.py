"""What must be true at the end, whoever was killed when.

* committed = delivered + in the spool (held, waiting) + cancelled: nothing is lost;
* what was not committed was never delivered;
* a mail came twice only where an attempt had no recorded reply: the relay did not answer, or the
  processor was killed after the relay took the mail, and the mail was still in the spool then; or
  the database died around that time, and the mail was in it when it came again;
* of what was delivered and is gone the journal of a directory says so, whoever was killed;
* a key was committed once;
* a cancelled mail was not delivered, but by such an attempt, or when its cancelling
  process was killed in that very commit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from cpsmailaccess_delivery.interfaces import State

from .relay import Delivery, Relay
from .truth import lines

#: Seconds before the death of a database from which on what was recorded may be lost with it (a
#: removal waits for its disk with the next `sync`: a moment, on a busy machine a long one), and
#: after its return until which what its workers then had on its way is sent.
_BEFORE, _AFTER = 2.0, 2.0


@dataclass
class Kill:
    """``name``: begins with p for processors, c for who commits, s for the database."""

    name: str
    at: float  # seconds since the epoch; it was dead some time later
    spooled: frozenset[str] = frozenset()  # mails in the spool when it was dead
    until: float = 0.0  # seconds since the epoch; of a database: it was back


@dataclass
class Verdict:
    """Numbers and, where something is wrong, which mails."""

    numbers: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not any(self.wrong.values())

    def __str__(self) -> str:
        table = [f"{name:<58} {number:>7,}" for name, number in self.numbers.items()]
        for name, mails in self.wrong.items():
            table.append(f"{name:<58} {len(mails):>7,}")
            table += [f"    {mail}" for mail in mails[:10]]
        return "\n".join(table)


def judge(
    root: Path,
    relay: Relay,
    kills: list[Kill],
    spool: dict[str, State],
    accepted: Collection[str] | None = None,
) -> Verdict:
    """`spool`: the mails that are left, by Message-Id.

    `accepted`: those that the journal calls so; None: it may lack some.
    """
    planned = {mail for _, line in lines(root / "plans") for mail in line["mails"]}
    truth = list(lines(root / "truth"))
    committed = {mail for _, line in truth for mail in line["sent"]}
    cancelled = {mail for _, line in truth for mail in line["cancelled"]}
    last = dict(truth)
    killed = {kill.name for kill in kills}
    in_doubt = {m for name, line in last.items() if name in killed for m in line["cancelled"]}
    keys = Counter(line["key"] for _, line in truth if line["key"])
    deliveries: dict[str, list[Delivery]] = defaultdict(list)
    for delivery in relay.deliveries:
        deliveries[delivery.mail].append(delivery)
    why = _Explainer(relay, kills)
    silent = recordless = forgotten = 0
    unexplained, cancelled_sent = [], []
    for mail, made in deliveries.items():
        made.sort(key=lambda each: each.at)
        for delivery in made[:-1]:
            if not delivery.replied:
                silent += 1
            elif why.unrecorded(delivery):
                recordless += 1
            elif why.forgotten(delivery):
                forgotten += 1
            else:
                unexplained.append(f"{mail}: {why.tell(delivery)}")
        if mail in cancelled - in_doubt and not all(
            not each.replied or why.unrecorded(each) or why.forgotten(each) for each in made
        ):
            cancelled_sent.append(f"{mail}: {'; '.join(map(why.tell, made))}")
    open_ = committed - set(deliveries) - cancelled
    waiting = {m for m in open_ if spool.get(m) in (State.QUEUED, State.DEFERRED)}
    held = {m for m in open_ if m in spool} - waiting
    victims = Counter(kill.name[0] for kill in kills)
    return Verdict(
        numbers={
            "kills": len(kills),
            "  of processors": victims["p"],
            "  of committing processes": victims["c"],
            "  of the database": victims["s"],
            "mails committed": len(committed),
            "  delivered": len(committed & set(deliveries)),
            "  held or unclear, for a person": len(held),
            "  waiting": len(waiting),
            "  cancelled, and not delivered": len(cancelled - set(deliveries)),
            "mails aborted, rolled back or not begun": len(planned - committed),
            "  held: in doubt, and without a witness": len(set(spool) - committed),
            "keys committed": len(keys),
            "duplicates": silent + recordless + forgotten + len(unexplained),
            "  the relay had not replied": silent,
            "  the processor was killed before it had recorded the reply": recordless,
            "  the database died before it had that on its disk": forgotten,
        },
        wrong={
            "  not explained": unexplained,
            "mails lost": sorted(committed - set(deliveries) - set(spool) - cancelled),
            "mails delivered that were not committed": sorted(set(deliveries) - committed),
            "cancelled mails delivered all the same": cancelled_sent,
            "mails delivered of which the journal does not say so": sorted(
                (committed & set(deliveries)) - set(spool) - cancelled - set(accepted)
                if accepted is not None
                else ()
            ),
            "keys committed twice": sorted(key for key, n in keys.items() if n > 1),
        },
    )


class _Explainer:
    def __init__(self, relay: Relay, kills: list[Kill]) -> None:
        self._clients = relay.clients()
        self._kills = {kill.name: kill for kill in kills}

    def unrecorded(self, delivery: Delivery) -> bool:
        """Tell whether the processor died with the mail unsettled after this delivery.

        Or before it: the relay reads on what a dead client has written.
        """
        kill = self._kills.get(self._clients.get(delivery.session, ""))
        return kill is not None and (delivery.mail in kill.spooled or delivery.at > kill.at)

    def forgotten(self, delivery: Delivery) -> bool:
        """Tell whether the database died, and nothing of this delivery was in it afterwards."""
        return any(
            kill.at - _BEFORE <= delivery.at <= kill.until + _AFTER
            and delivery.mail in kill.spooled
            for kill in self._kills.values()
            if kill.until
        )

    def tell(self, delivery: Delivery) -> str:
        client = self._clients.get(delivery.session, "?")
        kill = self._kills.get(client)
        killed = f"killed at {kill.at:.3f}" if kill else "never killed"
        replied = "replied" if delivery.replied else "no reply"
        return f"taken at {delivery.at:.3f} from {client}, which was {killed}; {replied}"
