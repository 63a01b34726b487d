"""zope.sendmail: one queue, one processor thread, a connection per mail.

It knows one relay per queue.  For many, the mailer here picks the relay by the sender, as
the 2005 ancestor of this project did.
"""

from __future__ import annotations

import logging
import random
import time
from pathlib import Path
from typing import Any

from .child import Child, Parent, call
from .mails import message, password_of, recipient_of, sender_of

NAME = "zope.sendmail"


class Contender:
    """See `ours.Contender`."""

    def __init__(
        self, place: Path, *, ports: list[int], size: int = 4096, ca_file: str = "", **_: Any
    ) -> None:
        self.place = place
        self._base = {"place": str(place / "queue"), "size": size}
        self._relays = {"ports": ports, "tls": bool(ca_file)}

    def fill(self, mails: list[tuple[int, int]]) -> None:
        call("zope_sendmail", "fill", mails=mails, **self._base)

    def start(self) -> float:
        self._child = Child("zope_sendmail", "process", **self._base, **self._relays)
        self._child.line()
        return self._child.started

    def commit_slowly(self, count: int, gap: float) -> dict[int, list[float]]:
        times = call("zope_sendmail", "commit_slowly", count=count, gap=gap, **self._base)
        return {int(number): pair for number, pair in times.items()}

    def finish(self) -> dict[str, Any]:
        usage = self._child.finish()
        names = [path.name for path in (self.place / "queue" / "new").iterdir()]
        usage["left"] = sum(not name.startswith(".sending-") for name in names)
        return usage


def _send(delivery: Any, number: int, lane: int, size: int) -> None:
    # It sends line ends as they are, and relays refuse bare LF.
    data = message(number, lane, size).replace(b"\n", b"\r\n")
    delivery.send(sender_of(lane), [recipient_of(number)], data)


def fill(parent: Parent, place: str, size: int, mails: list[Any]) -> None:
    import transaction
    from zope.sendmail.delivery import QueuedMailDelivery
    from zope.sendmail.maildir import Maildir

    Maildir(place, True)
    delivery = QueuedMailDelivery(place)
    for start in range(0, len(mails), 128):
        with transaction.manager:
            for number, lane in mails[start : start + 128]:
                _send(delivery, number, lane, size)


def process(parent: Parent, place: str, size: int, ports: list[int], tls: bool) -> dict[str, Any]:
    from zope.sendmail.mailer import SMTPMailer
    from zope.sendmail.queue import QueueProcessorThread

    class BySender:
        def __init__(self) -> None:
            self._mailers = {
                sender_of(lane): SMTPMailer(
                    hostname="127.0.0.1",
                    port=port,
                    username=f"user{lane}" if tls else None,
                    password=password_of(lane) if tls else None,
                    implicit_tls=tls,
                )
                for lane, port in enumerate(ports)
            }

        def send(self, fromaddr: str, toaddrs: Any, message: bytes) -> None:
            self._mailers[fromaddr].send(fromaddr, toaddrs, message)

    logging.getLogger("QueueProcessorThread").addHandler(logging.NullHandler())
    thread = QueueProcessorThread()
    thread.setMailer(BySender())
    thread.setQueuePath(place)
    parent.ready()
    thread.start()
    parent.wait()
    usage = parent.usage()
    thread.stop()
    thread.join(12)
    return usage


def commit_slowly(parent: Parent, place: str, size: int, count: int, gap: float) -> dict[int, Any]:
    import transaction
    from zope.sendmail.delivery import QueuedMailDelivery

    delivery = QueuedMailDelivery(place)
    times = {}
    chance = random.Random(1)
    for number in range(count):
        time.sleep(gap * (0.5 + chance.random()))
        transaction.begin()
        _send(delivery, number, 0, size)
        begun = time.monotonic()
        transaction.commit()
        times[number] = [begun, time.monotonic()]
    return times
