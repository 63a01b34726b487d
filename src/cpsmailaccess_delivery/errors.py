"""Every exception of this package, with one root.

What is raised from `send` is also an `smtplib.SMTPException`, because callers of
MailHost and zope.sendmail catch that; it is raised before anything is queued.
The text of an error names the value, the rule and the way out.  It never contains
a secret or the body of a mail.
"""

from smtplib import SMTPException

from transaction.interfaces import TransientError


class OutboxError(Exception):
    """Root of all exceptions of this package."""


# Raised from `send`: nothing has been written, or what was written is removed.


class SendError(OutboxError, SMTPException):
    """A mail was not taken.  Nothing of it is left in the spool."""


class InvalidAddress(SendError, ValueError):
    """An address that is empty, malformed, or carries CR, LF, NUL or a control character."""


class NoRecipients(SendError, ValueError):
    """A mail without a single recipient."""


class UnknownMailbox(SendError, LookupError):
    """No account serves this sender: neither its mailbox, nor its domain, nor ``*``."""


class InvalidMessage(SendError, ValueError):
    """The message is not an Internet message (RFC 5322)."""


class InvalidOption(SendError, ValueError):
    """A wish of the sender (time, priority, key) that cannot be understood or met."""


class MessageTooLarge(SendError, ValueError):
    """The message is larger than the outbox takes."""


# Values and settings


class InvalidAccount(OutboxError, ValueError):
    """An account whose settings contradict each other or a rule."""


class InvalidSettings(OutboxError, ValueError):
    """A setting (TOML, environment, option, ZCML) that cannot be used."""


class RelayNotAllowed(OutboxError):
    """A relay whose address is in none of the networks that its account may reach."""


# Spool


class SpoolError(OutboxError):
    """The spool cannot do what was asked: disk full, permissions, not a spool."""


class InvalidEnvelope(SpoolError, ValueError):
    """A spool file whose private block does not follow the rules of `envelope`."""


class NotQueued(SendError, SpoolError):
    """The mail is right, but could not be taken: disk full, permissions, a damaged account."""


class OutboxClosed(SpoolError):
    """The outbox was closed; open a new one."""


class NoSuchEntry(SpoolError, LookupError):
    """No mail with this id or Message-Id is in the spool."""


class KeyTaken(SpoolError, TransientError):
    """Another transaction commits a mail with this idempotency key: begin again."""


class NotUnclear(OutboxError, ValueError):
    """A person wants to settle a recipient that is not unclear."""


class NotHeld(OutboxError, ValueError):
    """A person wants to release a mail that was not set aside."""


class EntryBusy(SpoolError):
    """A processor is delivering this mail right now."""


# Vault


class VaultError(OutboxError):
    """The account store cannot be read or written."""


class VaultUnreachable(VaultError):
    """The database that has the accounts cannot be asked now: it is no account's own trouble."""


class NoSuchAccount(VaultError, LookupError):
    """No account has this mailbox."""


class WrongKey(VaultError):
    """The key does not open what the vault holds, or the key is lost."""


class BrokenSeal(VaultError):
    """An account file that was edited, swapped or damaged: its seal does not hold."""


class SecretUnavailable(VaultError):
    """``password_from`` names an environment variable or file that is not there."""
