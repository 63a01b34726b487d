"""How long a processor that was killed with a full queue takes to its first delivery.

Measured from the start of the process, the interpreter and its imports included, as a
supervisor would start it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transaction

from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.testing import SMTPServer

from .processes import KEY, process
from .run import ready_context

_MAILBOXES = 50
_PER_COMMIT = 500
_TAKEN = 50  # mails after which one is killed
_DEADLINE = 60.0  # seconds


@dataclass(frozen=True)
class Recovery:
    """Seconds from the start of a process to its first delivery.

    ``command``: of ``cpsmail run``, the interpreter and its imports included.  ``processor``: of a
    process that is forked with everything imported, as a supervisor's or an application
    server's is.
    """

    waiting: int
    command: float
    processor: float

    def __str__(self) -> str:
        forked = "  of a process that had everything imported (s)"
        command = "  of `cpsmail run`, the start of the interpreter included (s)"
        return (
            f"killed with {self.waiting:,} mails waiting, and some in flight; time to a delivery\n"
            f"{forked:<58} {self.processor:>7.2f}\n{command:<58} {self.command:>7.2f}"
        )


def measure(root: Path, waiting: int) -> Recovery:
    """Kill processors that have begun with so many mails, and time the next ones."""
    root.mkdir(parents=True)
    (root / "truth").mkdir()
    key = root / "outbox.key"
    context = ready_context()
    times = {}
    with SMTPServer(keep=False) as relay:
        with Outbox(root / "outbox", key=KEY) as outbox:
            _fill(outbox, relay, waiting)
        key.write_bytes(KEY)
        key.chmod(0o600)

        def command() -> subprocess.Popen[bytes]:
            module = [sys.executable, "-m", "cpsmailaccess_delivery"]
            arguments = ["--outbox", f"{root}/outbox", "run"]
            nowhere = subprocess.DEVNULL
            return subprocess.Popen([*module, *arguments], stdout=nowhere, stderr=nowhere)

        def processor() -> Any:
            child = context.Process(
                target=process, args=(root, str(root / "outbox"), "p"), daemon=True
            )
            child.start()
            return child

        for name, start in (("first", command), ("command", command), ("processor", processor)):
            taken = len(relay.mails)
            begun = time.monotonic()
            child = start()
            try:
                relay.wait_for(taken + 1, _DEADLINE)
                times[name] = time.monotonic() - begun
                relay.wait_for(taken + _TAKEN, _DEADLINE)
            finally:
                child.kill()  # -9
                child.wait() if isinstance(child, subprocess.Popen) else child.join()
            relay.wait_until(lambda: not relay.open_sessions, _DEADLINE)
    return Recovery(waiting - len(relay.mails), times["command"], times["processor"])


def _fill(outbox: Outbox, relay: SMTPServer, waiting: int) -> None:
    mailboxes = [f"m{n}@soak.test" for n in range(_MAILBOXES)]
    with transaction.manager:
        for mailbox in mailboxes:
            outbox.accounts.put(
                Account(mailbox=mailbox, host="127.0.0.1", port=relay.port, security="plain")
            )
    for start in range(0, waiting, _PER_COMMIT):
        with transaction.manager:
            for n in range(start, min(start + _PER_COMMIT, waiting)):
                outbox.delivery.send(mailboxes[n % _MAILBOXES], ["r@example.net"], "\n\ntext\n")
