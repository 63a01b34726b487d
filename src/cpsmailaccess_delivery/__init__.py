"""An outbox for applications whose mail leaves through many SMTP accounts.

A mail sent inside a transaction exists only if that transaction commits; from then on it
is delivered through its own mailbox's SMTP server, whatever crashes, hangs or refuses, and
its fate can always be looked up.  See README.rst.
"""

from .account import Account, Secret
from .errors import OutboxError
from .interfaces import Outcome, State
from .outbox import Outbox
from .processor import QueueProcessorThread
from .status import Status

__all__ = [
    "Account",
    "Outbox",
    "OutboxError",
    "Outcome",
    "QueueProcessorThread",
    "Secret",
    "State",
    "Status",
]
