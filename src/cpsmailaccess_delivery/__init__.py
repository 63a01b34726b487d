"""An outbox for applications whose mail leaves through many SMTP accounts.

A mail sent inside a transaction exists only if that transaction commits; from then on it
is delivered through its own mailbox's SMTP server, whatever crashes, hangs or refuses, and
its fate can always be looked up.  See README.rst.
"""

from .account import HIDDEN, Account, Secret
from .errors import (
    EntryBusy,
    InvalidAccount,
    InvalidAddress,
    InvalidMessage,
    InvalidOption,
    KeyTaken,
    MessageTooLarge,
    NoRecipients,
    NoSuchAccount,
    NoSuchEntry,
    NotQueued,
    OutboxError,
    SendError,
    UnknownMailbox,
)
from .interfaces import Outcome, State
from .outbox import Outbox
from .processor import QueueProcessorThread
from .retry import Schedule
from .status import Status

__all__ = [
    "HIDDEN",
    "Account",
    "EntryBusy",
    "InvalidAccount",
    "InvalidAddress",
    "InvalidMessage",
    "InvalidOption",
    "KeyTaken",
    "MessageTooLarge",
    "NoRecipients",
    "NoSuchAccount",
    "NoSuchEntry",
    "NotQueued",
    "Outbox",
    "OutboxError",
    "Outcome",
    "QueueProcessorThread",
    "Schedule",
    "Secret",
    "SendError",
    "State",
    "Status",
    "UnknownMailbox",
]
