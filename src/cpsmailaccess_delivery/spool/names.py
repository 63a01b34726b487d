"""Entry <-> file name: what a listing tells without opening a file.  Pure.

::

    new/  1732369200.M123456Ra1b2c3.0123456789abcdef,L=89abcdef01234567
          seconds    micros  chance  Message-Id          lane
    cur/  ... the same ...:1,deferred,1732369260.25,3
                           state      due           attempts
    new/  ... the same ...,L=89abcdef01234567,P=8:1,queued,1732369260.25,0
                           priority, unless normal   scheduled for later
    new/  ... the same ...,L=89abcdef01234567,E=1732455600
                           expires

The `id` is all before ``,L=``.  A file with a plain name that we did not give is its own
id and has no lane; in the spool it is queued like any other.  A name is *canonical* when
`file_name` of its entry gives it back: no other name is ever an entry, see
`listing.Listing.entry_of`.
"""

from __future__ import annotations

import re
from sys import intern
from typing import Final

from ..envelope import Envelope, digest, lane_key
from ..interfaces import NORMAL_PRIORITY, Entry, State

_ID: Final = r"\d{10}\.M\d{6}R[0-9a-f]{6}\.[0-9a-f]{16}"
_TIME: Final = r"(?:[1-9]\d{0,10}(?:\.\d{0,2}[1-9])?|0\.\d{0,2}[1-9])"
_DUE: Final = rf"(0|{_TIME})"
_ASKED: Final = rf"(?:,P=([0-46-9]))?(?:,E=({_TIME}))?"
_INFO: Final = rf":1,(queued|deferred|held|unclear|refused),{_DUE},(0|[1-9]\d{{0,5}})"
_BARE = re.compile(rf"({_ID}),L=([0-9a-f]{{16}})\Z", re.ASCII)
_OWN = re.compile(rf"({_ID}),L=([0-9a-f]{{16}}){_ASKED}(?:{_INFO})?\Z", re.ASCII)
_FOREIGN = re.compile(rf"([A-Za-z0-9_=+@-][A-Za-z0-9._,=+@-]{{0,179}})(?:{_INFO})?\Z", re.ASCII)
_STAGED = re.compile(
    rf"({_ID}),L=([0-9a-f]{{16}}){_ASKED}(?:,D={_DUE})?,S=(\d+),C=([0-9a-f]{{8}})"
    r",P=[0-9a-f]{16}\Z",
    re.ASCII,
)
_ARRIVING = re.compile(r"\.([0-9a-f]{16})\.(.*)\Z", re.ASCII | re.DOTALL)
_KEY = re.compile(rf"({_ID}),K=([0-9a-f]{{32}}),P=[0-9a-f]{{16}}\Z", re.ASCII)
_FREED = re.compile(rf"({_ID}),X=([0-9a-f]{{32}}),P=[0-9a-f]{{16}}\Z", re.ASCII)
_SCRAP = re.compile(r".*,P=([0-9a-f]{16})\Z", re.ASCII | re.DOTALL)

_QUEUED: Final = State.QUEUED
_LAST_DUE: Final = 99_999_999_999  # seconds: eleven digits
_LAST_ATTEMPT: Final = 999_999


def new_id(now: float, chance: str, message_id: str) -> str:
    """Return an id.  `now`: seconds since the epoch; `chance`: 6 hexadecimal digits."""
    micros = min(max(int(now * 1_000_000), 0), 9_999_999_999_999_999)
    seconds, rest = divmod(micros, 1_000_000)
    return f"{seconds:010d}.M{rest:06d}R{chance}.{digest(message_id)}"


def first_entry(entry_id: str, envelope: Envelope) -> Entry:
    """Return the entry of a mail that is not committed yet."""
    return normal(
        Entry(
            entry_id,
            lane_key(envelope.route),
            due=envelope.not_before,
            priority=envelope.priority,
            expires=envelope.expires,
        )
    )


def file_name(entry: Entry) -> str:
    """Return the name of an entry in its `folder`."""
    name = _base(entry) if entry.lane else entry.id
    if entry.state is _QUEUED and not entry.due and not entry.attempts:
        return name
    return f"{name}:1,{entry.state.value},{_number(entry.due)},{entry.attempts}"


def folder(state: State) -> str:
    """Return where mails of a state live: new/ holds those that a processor may take now."""
    return "new" if state is _QUEUED else "cur"


def parse(name: str, where: str) -> Entry | None:
    """Return the entry of a file in `where` (new or cur), or None: not canonical."""
    if where == "new" and (bare := _BARE.match(name)):  # most of a large spool
        return Entry(bare[1], intern(bare[2]))
    match = _OWN.match(name)
    if match:
        entry_id, lane, digit, end, state, due, attempts = match.groups()
        lane, priority, expires = intern(lane), _priority(digit), float(end or 0)
    else:
        match = _FOREIGN.match(name)
        if not match:
            return None
        entry_id, state, due, attempts = match.groups()
        lane, priority, expires = "", NORMAL_PRIORITY, 0.0
    if state is None:
        if where != "new":
            return None
        return Entry(entry_id, lane, priority=priority, expires=expires)
    entry = Entry(entry_id, lane, State(state), float(due), int(attempts), priority, expires)
    if folder(entry.state) != where or (due == attempts == "0" and where == "new"):
        return None
    return entry


def normal(entry: Entry) -> Entry:
    """Return the entry as its name can say it: due in whole milliseconds, never early."""
    if not (entry.due or entry.attempts or entry.expires):
        return entry
    wanted = min(max(entry.due, 0.0), _LAST_DUE)
    due = float(_number(wanted))
    if due < wanted:
        due = float(_number(wanted + 0.001))
    attempts = min(max(entry.attempts, 0), _LAST_ATTEMPT)
    expires = float(_number(min(max(entry.expires, 0.0), _LAST_DUE)))
    return entry._replace(due=due, attempts=attempts, expires=expires)


def held(entry: Entry) -> Entry:
    """Return the entry as it is when it is set aside."""
    return entry._replace(state=State.HELD, due=0.0)


def usable_id(name: str) -> Entry | None:
    """Return a queued entry for what stands before a ":" in a name; None: nothing usable."""
    return parse(name.partition(":")[0], "new")


def digest_of(entry_id: str) -> str:
    """Return the digest of the Message-Id for which we gave an id; "": we did not."""
    return entry_id[-16:] if len(entry_id) == 42 else ""


def staged_name(entry: Entry, *, size: int, check: int, presence: str) -> str:
    """Return the name in tmp/: with what tells a torn file from a whole one."""
    due = f",D={_number(entry.due)}" if entry.due else ""
    return f"{_base(entry)}{due},S={size},C={check:08x},P={presence}"


def arriving_name(entry: Entry, origin: str) -> str:
    """Return the name in cur/ of a mail that arrives; with a dot, so that it is no mail yet."""
    return f".{origin}.{file_name(entry)}"


def parse_arriving(name: str) -> tuple[str, Entry] | None:
    """Return (origin, entry) of a mail that arrives, or None: another file."""
    match = _ARRIVING.match(name)
    entry = match and (parse(match[2], "new") or parse(match[2], "cur"))
    return (match[1], entry) if match and entry and entry.lane else None


def scrap_name(entry_id: str, *, chance: str, presence: str) -> str:
    """Return the name in tmp/ of a file that means nothing until it is renamed."""
    return f"{entry_id},O={chance},P={presence}"


def key_name(entry_id: str, *, digest: str, presence: str) -> str:
    """Return the name in tmp/ of a key that a mail takes in a transaction."""
    return f"{entry_id},K={digest},P={presence}"


def key_of(name: str) -> tuple[str, str]:
    """Return (entry id, digest) of a `key_name`; ("", "") of any other name."""
    match = _KEY.match(name)
    return (match[1], match[2]) if match else ("", "")


def freed_name(entry_id: str, *, digest: str, presence: str) -> str:
    """Return the name in tmp/ of a mail that was cancelled, until its key is free."""
    return f"{entry_id},X={digest},P={presence}"


def freed_of(name: str) -> tuple[str, str]:
    """Return (entry id, digest) of a `freed_name`; ("", "") of any other name."""
    match = _FREED.match(name)
    return (match[1], match[2]) if match else ("", "")


def parse_staged(name: str) -> tuple[Entry, int, int] | None:
    """Return (entry, size, check) of a staged mail, or None: another file."""
    match = _STAGED.match(name)
    if not match:
        return None
    entry_id, lane, digit, end, due, size, check = match.groups()
    entry = Entry(
        entry_id,
        intern(lane),
        due=float(due or 0),
        priority=_priority(digit),
        expires=float(end or 0),
    )
    return entry, int(size), int(check, 16)


def presence_of(name: str) -> str | None:
    """Return the token of the process that a file in tmp/ belongs to; None: not ours."""
    match = _SCRAP.match(name)
    return match[1] if match else None


def _base(entry: Entry) -> str:
    priority = f",P={entry.priority}" if entry.priority != NORMAL_PRIORITY else ""
    expires = f",E={_number(entry.expires)}" if entry.expires else ""
    return f"{entry.id},L={entry.lane}{priority}{expires}"


def _priority(digit: str | None) -> int:
    return NORMAL_PRIORITY if digit is None else int(digit)


def _number(due: float) -> str:
    return f"{due:.3f}".rstrip("0").rstrip(".") if due else "0"
