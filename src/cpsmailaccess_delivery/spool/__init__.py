"""The durable store of mails: `Maildir` is the embedded default."""

from .maildir import Maildir
from .presence import Presence

__all__ = ["Maildir", "Presence"]
