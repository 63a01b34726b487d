"""Which mails are meant: by state and lane, from names alone where that can be."""

from __future__ import annotations

from collections.abc import Callable, Collection

from .account import normalise_mailbox
from .address import ascii_host, relay_name
from .envelope import digest
from .errors import InvalidAccount, InvalidAddress, InvalidEnvelope, NoSuchEntry
from .interfaces import Entry
from .queue import Queue


def selector(
    queue: Queue, states: Collection[str], lane: str | None
) -> Callable[[Entry, Entry], bool]:
    """Return what tells whether a mail is meant, given its entry and how it is seen.

    `states`: none: any.  `lane`: its key (see `lane_of`), or None: any.
    """

    def wanted(entry: Entry, seen: Entry) -> bool:
        if states and seen.state not in states:
            return False
        return lane is None or _lane(queue, entry) == lane

    return wanted


def lane_of(name: str) -> str:
    """Return the key of a lane that is named by key, mailbox or relay (``host:port``)."""
    if len(name) == 16 and all(digit in "0123456789abcdef" for digit in name):
        return name
    try:
        return digest(normalise_mailbox(name))
    except InvalidAccount:
        return digest(_relay(name))


def _lane(queue: Queue, entry: Entry) -> str:
    if entry.lane:
        return entry.lane
    try:  # a file that zope.sendmail, or somebody by hand, put there
        return lane_of(str(queue.find(entry)[0].envelope.route))
    except (NoSuchEntry, InvalidEnvelope):
        return ""


def _relay(name: str) -> str:
    """Return a relay in the spelling of routes: see `relay_name`."""
    host, _, port = name.rpartition(":")
    try:
        return relay_name(ascii_host(host), int(port))
    except (InvalidAddress, ValueError):
        return name
