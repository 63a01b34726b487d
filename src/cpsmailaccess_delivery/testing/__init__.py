"""What a test of an application needs: a scriptable SMTP server, certificates, a spool.

::

    from cpsmailaccess_delivery.testing import SMTPServer
"""

from .certificates import Authority
from .script import Rule
from .server import EXTENSIONS, Command, Login, ReceivedMail, ServerThread, SMTPServer

__all__ = [
    "EXTENSIONS",
    "Authority",
    "Command",
    "Login",
    "MemorySpool",
    "ReceivedMail",
    "Rule",
    "SMTPServer",
    "ServerThread",
]


def __getattr__(name: str) -> object:
    # Lazily: the server is useful without the package's core, and starts faster.
    if name == "MemorySpool":
        from .spool import MemorySpool

        return MemorySpool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
