"""Every fault of a relay, whatever it offers: the state of each recipient is what the relay did."""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import transaction

from cpsmailaccess_delivery import Account, Outbox, State
from cpsmailaccess_delivery.retry import Schedule
from cpsmailaccess_delivery.testing import ServerThread, SMTPServer

DEADLINE = 30.0
MAILS = 6  # to each of the relays

#: Short, and never over: no mail may expire, however slow the machine is.
SOON = Schedule(first=0.01, factor=1.5, longest=0.1)

OFFERS = {
    "serial": ("8BITMIME",),
    "pipelining": ("8BITMIME", "PIPELINING", "SIZE"),
    "chunking": ("8BITMIME", "PIPELINING", "CHUNKING", "ENHANCEDSTATUSCODES"),
    "serial-chunking": ("8BITMIME", "CHUNKING", "DSN"),
}


def on(phase: str, **rule: Any) -> dict[str, Any]:
    """Return a rule of `SMTPServer.on`."""
    return {"phase": phase, **rule}


#: Who is called "refused" is; the others get their mail in the end.
FAULTS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "421 at the greeting": [on("GREETING", reply="421 4.3.2 busy", drop=True, times=2)],
    "421 at EHLO": [on("EHLO", reply="421 4.3.2 busy", drop=True, times=2)],
    "454 at the login": [on("AUTH", reply="454 4.7.0 too many logins", times=2)],
    "421 at MAIL": [on("MAIL", reply="421 4.3.2 enough", drop=True, after=2, times=2)],
    "451 at MAIL": [on("MAIL", reply="451 4.3.0 later", times=3)],
    "452 at MAIL": [on("MAIL", reply="452 4.3.1 too much", after=1, times=1)],
    "354 at MAIL": [on("MAIL", reply=b"354 what\r\n", drop=True, after=1, times=1)],
    "a drop at MAIL": [on("MAIL", drop=True, after=3, times=2)],
    "450 for some": [on("RCPT", reply="450 4.2.1 greylisted", match="bob", times=9)],
    "452 for some": [on("RCPT", reply="452 4.5.3 too many", match="bob", times=9)],
    "552 for some": [on("RCPT", reply="552 5.5.3 too many", match="bob", times=9)],
    "421 for some": [on("RCPT", reply="421 4.3.2 bye", match="bob", drop=True, times=3)],
    "a drop at RCPT": [on("RCPT", drop=True, after=2, times=3)],
    "silence at RCPT": [on("RCPT", silence=True, after=2, times=1)],
    "garbage at RCPT": [on("RCPT", reply=b"\0\xff?\r\n", drop=True, after=1, times=2)],
    "451 at DATA": [on(p, reply="451 4.3.0 later", times=1) for p in ("DATA", "BDAT")],
    "421 at DATA": [on(p, reply="421 4.3.2 bye", drop=True, times=1) for p in ("DATA", "BDAT")],
    "250 at DATA": [on("DATA", reply=b"250 what\r\n", drop=True, times=1)],
    "a drop within the message": [on("CONTENT", drop=True, after=1, times=1)],
    "421 at the end of data": [on("BODY", reply="421 4.3.2 bye", drop=True, times=2)],
    "451 at the end of data": [on("BODY", reply="451 4.3.0 later", after=1, times=3)],
    "452 at the end of data": [on("BODY", reply="452 4.3.1 full", after=2, times=2)],
    "a drop at the end of data, not taken": [on("BODY", drop=True, after=2, times=1)],
    "a drop at the end of data, taken": [on("TAKEN", drop=True, after=2, times=1)],
    "half a reply": [on("TAKEN", reply=b"25", drop=True, after=2, times=1)],
    "500 at RSET": [on("RSET", reply="500 5.5.2 what", drop=True, times=2)],
    "long replies": [
        on(phase, reply="\n".join([f"250-{'y' * 900}"] * 3 + ["250 ok"]), times=40)
        for phase in ("MAIL", "RCPT", "TAKEN")
    ],
    "8-bit replies": [on("RCPT", reply=b"450 4.2.1 sp\xe4ter \x1b[31m\r\n", match="bob", times=9)],
    "several": [
        on("AUTH", reply="454 4.7.0 later", times=1),
        on("RCPT", reply="450 4.2.1 greylisted", match="bob", times=5),
        on("BODY", reply="451 4.3.0 later", after=1, times=2),
        on("MAIL", reply="421 4.3.2 enough", drop=True, after=4, times=1),
        on("TAKEN", drop=True, after=6, times=1),
    ],
}

#: Of `SMTPServer` itself.
MANNERS: dict[str, dict[str, Any]] = {
    "two mails a session": {"mails_per_session": 2},
    "one session at a time": {"max_sessions": 1},
    "single bytes": {"split_replies": True},
}


@pytest.fixture(scope="module")
def thread() -> Iterator[ServerThread]:
    with ServerThread() as thread:
        yield thread


@pytest.mark.parametrize("fault", [*FAULTS, *MANNERS])
def test_the_state_is_what_the_relays_did(tmp_path: Path, thread: ServerThread, fault: str) -> None:
    """Through relays that recover, one for each of `OFFERS`."""
    chance = random.Random(fault)
    with ExitStack() as stack:
        outbox = stack.enter_context(
            Outbox(tmp_path / "outbox", schedule=SOON, helo_name="me.example.org")
        )
        servers = {}
        for offer, extensions in OFFERS.items():
            server = SMTPServer(
                users={offer: "pw"}, extensions=extensions, thread=thread, **MANNERS.get(fault, {})
            )
            servers[offer] = stack.enter_context(server)
            server.on("RCPT", reply="550 5.1.1 no such user", match="refused")
            for rule in FAULTS.get(fault, ()):
                server.on(**rule)
            put(outbox, server, offer, connections=chance.choice([1, 2, 5]))
        processor = outbox.processor()
        processor.start()
        sent: dict[str, dict[str, tuple[list[str], bytes]]] = {offer: {} for offer in OFFERS}
        for number in range(MAILS):
            with transaction.manager:
                for offer in OFFERS:
                    people = [f"{name}{number}@{offer}.net" for name in ("bob", "eve", "refused")]
                    people = people[: chance.choice([1, 2, 2, 3])]
                    message = b"Subject: %d\nX-Zope-To: mallory@x\n\n" % number
                    message += chance.choice(
                        [b"", b".\n..\r\n.x", b"bare\rCR\n", b"\xe4\n" * 40000]
                    )
                    message_id = outbox.delivery.send(f"{offer}@example.org", people, message)
                    sent[offer][message_id] = (people, message)
        wait_for_the_end(outbox)
        assert processor.stop(timeout=DEADLINE)
        for offer, server in servers.items():
            compare(outbox, server, offer, sent[offer])


def put(outbox: Outbox, server: SMTPServer, name: str, *, connections: int) -> None:
    with transaction.manager:
        outbox.accounts.put(
            Account(
                mailbox=f"{name}@example.org",
                host=server.host,
                port=server.port,
                security="plain",
                username=name,
                password="pw",
                connections=connections,
                command_timeout=1.0,  # for the silent one; elsewhere a time-out only defers
                data_timeout=DEADLINE,
            )
        )


def wait_for_the_end(outbox: Outbox) -> None:
    deadline = time.monotonic() + DEADLINE
    while waiting := [e for e in outbox.spool.scan() if e.state is not State.REFUSED]:
        assert time.monotonic() < deadline, waiting
        threading.Event().wait(0.01)


def compare(
    outbox: Outbox, server: SMTPServer, login: str, sent: dict[str, tuple[list[str], bytes]]
) -> None:
    copies: Counter[str] = Counter()
    for mail in server.mails:
        assert mail.username == login
        if mail.sender:
            copies.update(mail.recipients)
            assert mail.private == ("X-Zope-To",)  # the sender's own: no header of ours
            assert mail.data.endswith(on_the_wire(sent[mail.message_id][1]))
    found = {  # by its Message-Id: a notice may be unclear, too
        (mail.message_id, person)
        for mail in server.mails
        if not mail.sender
        for person in re.findall(rb"Final-Recipient: rfc822; ?(\S+)", mail.data)
    }
    notices = Counter(person for _, person in found)
    unclear = set()
    for message_id, (people, _) in sent.items():
        status = outbox.status(message_id)
        events = outbox.journal.events(message_id=message_id)
        unclear.update(event.recipient for event in events if event.kind == State.UNCLEAR)
        for person in people:
            refused = person.startswith("refused")
            outcome = status.recipients[person]
            assert outcome.state == ("refused" if refused else "accepted"), person
            assert outcome.reply.startswith("550" if refused else "250")
            most = 0 if refused else 2 if person in unclear else 1
            assert min(most, 1) <= copies.pop(person, 0) <= most, person
            assert notices.pop(person.encode(), 0) == refused, person
    assert not copies
    assert not notices


def on_the_wire(message: bytes) -> bytes:
    lines = message.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    return lines if lines.endswith(b"\r\n") else lines + b"\r\n"
