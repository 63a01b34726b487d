"""Processes of hosts that are cut off, for `test_postgres_partition`: started as scripts.

``relay HOST``: a relay; prints its port, then who delivered what: ``HELO-NAME MESSAGE-ID``.
``commit URL MOMENT``: sends one mail and, at that moment of its commit, says so and waits for a
line on standard input; then prints what became of the commit.
Both end with their standard input.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import transaction

from conftest import KEY
from cpsmailaccess_delivery import Outbox
from cpsmailaccess_delivery.testing import SMTPServer
from postgres_helpers import ALICE, BOB, MESSAGE


def relay(host: str) -> None:
    with SMTPServer(host=host, latency=0.02) as server:
        print(server.port, flush=True)
        threading.Thread(target=_tell, args=[server], daemon=True).start()
        sys.stdin.read()


def _tell(server: SMTPServer) -> None:
    told = 0
    while True:
        mails = server.wait_for(told + 1, timeout=3600)
        for mail in mails[told:]:
            (hello,) = {
                command.line.split()[1]
                for command in list(server.commands)
                if command.session == mail.session and command.line.startswith("EHLO")
            }
            print(hello, mail.message_id, flush=True)
        told = len(mails)


def commit(url: str, moment: str) -> None:
    outbox = Outbox(url, key=KEY)
    outbox.delivery.send(ALICE, [BOB], MESSAGE)
    spool: Any = outbox.spool.staging
    step = {"vote": "prepare", "finish": "publish"}[moment]
    real = getattr(spool, step)

    def stop(*arguments: Any, **more: Any) -> Any:
        print("at the", moment, flush=True)
        sys.stdin.readline()
        return real(*arguments, **more)

    setattr(spool, step, stop)
    try:
        transaction.commit()
    except Exception as error:
        print("failed:", type(error).__name__, flush=True)
        transaction.abort()
    else:
        print("committed", flush=True)
    sys.stdin.read()
    outbox.close()


if __name__ == "__main__":
    {"relay": relay, "commit": commit}[sys.argv[1]](*sys.argv[2:])
