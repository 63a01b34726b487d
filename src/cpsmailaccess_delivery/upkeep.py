"""What a processor does about the work of processes that died."""

from __future__ import annotations

import logging
from typing import Any

from .errors import OutboxError

log = logging.getLogger(__name__)


def sweep(spool: Any, accounts: Any) -> None:
    """Tidy what dead processes left, and log what became of it.  Never raises."""
    try:
        report = spool.sweep()
        changed = accounts.sweep()
    except (OutboxError, OSError):
        log.exception("cannot sweep %s", spool.location)
        return
    if report.removed or report.held:
        log.warning(
            "a process died here: %d uncommitted mails removed, %d in doubt and held",
            len(report.removed),
            len(report.held),
        )
    for mailbox in changed:
        log.warning("account %s: its change was not committed: put it again", mailbox)
