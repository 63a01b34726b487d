"""The processor of this process: found, started, stopped, replaced.

It is the utility of ``mail:queueProcessor``.  A thread starts once, so one that has ended is
replaced under its name.
"""

from __future__ import annotations

import threading
from typing import Any, Final

from zope.component import getGlobalSiteManager, getUtilitiesFor

from ..errors import InvalidSettings
from ..interfaces import IQueueProcessor

#: Seconds that a thread of Zope waits for a processor to stop; then its connections are dropped.
STOP_TIMEOUT: Final = 10.0

_lock: Final = threading.Lock()


def find(outbox: Any) -> tuple[str, Any] | None:
    """Return name and processor of an outbox as configured here; None: none is."""
    made = outbox.processors
    for name, processor in sorted(getUtilitiesFor(IQueueProcessor)):
        if any(processor is each for each in made):
            return name, processor
    return None


def start(outbox: Any) -> bool:
    """Start the processor; return False when it runs already.  Raises `InvalidSettings`."""
    with _lock:
        return _start(outbox)


def stop(outbox: Any) -> bool:
    """Stop the processor; return whether it has ended.  Raises `InvalidSettings`."""
    with _lock:
        return _stop(outbox)


def restart(outbox: Any) -> bool:
    """Stop the processor and start another; return False when it has not ended."""
    with _lock:
        return _stop(outbox) and _start(outbox)


def _start(outbox: Any) -> bool:
    name, processor = _configured(outbox)
    if processor.is_alive():
        return False
    if processor.ident is not None:
        processor = outbox.processor(unclear=processor.schedule.unclear)
        getGlobalSiteManager().registerUtility(processor, IQueueProcessor, name)
    processor.start()
    return True


def _stop(outbox: Any) -> bool:
    _, processor = _configured(outbox)
    return not processor.is_alive() or bool(processor.stop(timeout=STOP_TIMEOUT))


def _configured(outbox: Any) -> tuple[str, Any]:
    found = find(outbox)
    if found is None:
        raise InvalidSettings(
            f"no processor of {outbox.location} is configured in this process: mail:queueProcessor"
            " in ZCML does that; or cpsmail run delivers in a process of its own"
        )
    return found
