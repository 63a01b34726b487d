"""Three relays on loopback, and the three accounts that use them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpsmailaccess_delivery import Account
from cpsmailaccess_delivery.account import candidates
from cpsmailaccess_delivery.testing import (
    EXTENSIONS,
    Authority,
    ReceivedMail,
    ServerThread,
    SMTPServer,
)

# So that every way to hand over a mail is gone once.
_NO_CHUNKING = EXTENSIONS - {"CHUNKING"}
_NO_PIPELINING = EXTENSIONS - {"CHUNKING", "PIPELINING"}


@dataclass
class Relay:
    """An SMTP server and the account whose mails it should get."""

    server: SMTPServer
    account: Account

    def __str__(self) -> str:
        return f"{self.server.security} :{self.server.port}"

    def troubles(self, mail: ReceivedMail) -> list[str]:
        """Return what is wrong with the session that a mail came in."""
        found = []
        if mail.username != self.account.username:
            found.append(f"arrived as user {mail.username}, not as {self.account.username}")
        if mail.tls is (self.server.security == "plain"):
            found.append(f"arrived {'with' if mail.tls else 'without'} TLS")
        return found


@contextmanager
def three_relays(directory: Path, senders: Sequence[str]) -> Iterator[list[Relay]]:
    """Run them.

    The first sender's mailbox has the one with TLS, the domain of another the one with
    STARTTLS, everybody else the plain one.
    """
    mailbox = senders[0]
    domain = next((s for s in senders if s != mailbox), mailbox).rpartition("@")[2]
    authority = Authority(directory)
    verify = str(authority.ca_file)
    context = authority.server_context()
    with (
        ServerThread() as thread,
        SMTPServer(
            security="tls", context=context, users={"alice": "s3cret of one"}, thread=thread
        ) as tls,
        SMTPServer(
            security="starttls",
            context=context,
            users={"team": "s3cret of many"},
            extensions=_NO_CHUNKING,
            thread=thread,
        ) as starttls,
        SMTPServer(extensions=_NO_PIPELINING, thread=thread) as plain,
    ):
        yield [
            Relay(server, _account(server, mailbox=key, verify=verify))
            for server, key in ((tls, mailbox), (starttls, f"@{domain}"), (plain, "*"))
        ]


def _account(server: SMTPServer, *, mailbox: str, verify: str) -> Account:
    username, password = next(iter(server.users.items()), (None, None))
    return Account(
        mailbox=mailbox,
        host=server.host,
        port=server.port,
        security=server.security,
        username=username,
        password=password,
        verify=verify,
    )


def relay_of(relays: Sequence[Relay], sender: str) -> Relay:
    """Return the relay that should get the mails of a sender."""
    by_mailbox = {relay.account.mailbox: relay for relay in relays}
    return next(by_mailbox[key] for key in candidates(sender) if key in by_mailbox)
