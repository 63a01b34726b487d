"""What a sender asks for at `send`, checked, and as the envelope keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from . import dsn
from .errors import InvalidOption
from .interfaces import NORMAL_PRIORITY

#: Priorities that have a name.
PRIORITIES: Final = {"low": 2, "normal": NORMAL_PRIORITY, "high": 8}

_LAST: Final = 99_999_999_999.0  # seconds since the epoch: the year 5138
_LONGEST_KEY: Final = 200
_UNFIT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Options:
    """Fields of an `envelope.Envelope`; see there."""

    not_before: float = 0.0
    expires: float = 0.0
    priority: int = NORMAL_PRIORITY
    key: str = ""
    notify: str = ""
    ret: str = ""


def check_options(
    *,
    now: float,
    not_before: Any = None,
    undo: Any = None,
    expires: Any = None,
    priority: Any = None,
    key: Any = None,
    notify: Any = None,
    ret: Any = None,
) -> Options:
    """Return what is asked for.  `now`: seconds since the epoch.  Raises `InvalidOption`."""
    start = 0.0 if not_before is None else _time("not_before", not_before)
    if undo is not None:
        if not _is_number(undo) or not 0 <= undo <= _LAST - now:
            raise InvalidOption(f"undo={undo!r}: is a number of seconds from now, 0 or more")
        start = max(start, _milliseconds(now + undo) if undo else 0.0)
    end = 0.0 if expires is None else _time("expires", expires)
    if expires is not None and end <= max(now, start):
        raise InvalidOption(
            f"expires={expires!r}: is over before the mail may be sent; give a later time"
        )
    return Options(
        not_before=start if start > now else 0.0,
        expires=end,
        priority=NORMAL_PRIORITY if priority is None else _priority(priority),
        key="" if key is None else _key(key),
        notify="" if notify is None else _notify(notify),
        ret="" if ret is None else _ret(ret),
    )


def _time(name: str, value: Any) -> float:
    """Return seconds since the epoch, in whole milliseconds."""
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise InvalidOption(f"{name}={value!r}: has no time zone; give an aware datetime")
        value = value.timestamp()
    if not _is_number(value) or not 0 <= value <= _LAST:
        raise InvalidOption(
            f"{name}={value!r}: is a number of seconds since the epoch, or an aware datetime"
        )
    return _milliseconds(float(value))


def _milliseconds(seconds: float) -> float:
    """Round up: never early."""
    rounded = round(seconds, 3)
    return rounded if rounded >= seconds else round(rounded + 0.001, 3)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _priority(value: Any) -> int:
    if isinstance(value, str):
        found = PRIORITIES.get(value)
        if found is not None:
            return found
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 9:
        return int(value)
    raise InvalidOption(f"priority={value!r}: is 'low', 'normal', 'high', or a number from 0 to 9")


def _key(value: Any) -> str:
    fits = isinstance(value, str) and 0 < len(value) <= _LONGEST_KEY
    if not fits or _UNFIT.search(value) or value != value.strip():
        raise InvalidOption(
            f"idempotency_key={value!r}: is a text of 1 to {_LONGEST_KEY} characters, without"
            " control characters or outer space"
        )
    return str(value)


def _notify(value: Any) -> str:
    """Return one of `dsn.NOTIFIES`: each event once, in their order."""
    words = value.split(",") if isinstance(value, str) else value
    if isinstance(words, Iterable) and not isinstance(words, bytes):
        wanted = {word.strip().lower() if isinstance(word, str) else None for word in words}
        if wanted == {dsn.NEVER}:
            return dsn.NEVER
        if wanted and wanted.issubset(dsn.EVENTS):
            return ",".join(event for event in dsn.EVENTS if event in wanted)
    raise InvalidOption(
        f"notify={value!r}: is 'never', or some of 'success', 'failure' and 'delay', as a sequence"
        " or with commas between them"
    )


def _ret(value: Any) -> str:
    if isinstance(value, str) and value.lower() in dsn.RETURNS:
        return value.lower()
    raise InvalidOption(f"ret={value!r}: is 'full' or 'headers'")
