"""Try an account: connect, TLS, EHLO, login, QUIT, by the very session that sends mails.

For people who enter settings: what went well, what did not, and what to do about it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..account import Account, Secret
from ..outcome import Phase
from .events import Failure, Mail, Result
from .explain import explain
from .hello import Capabilities
from .session import Session


@dataclass(frozen=True, slots=True)
class Report:
    """What came of the try.

    ``steps``: what went well, in order.  ``problem``: in plain words what did not, and
    what to do; "" when ``ok``.  ``failure``: the same for programs.
    """

    ok: bool
    steps: tuple[str, ...] = ()
    tls: str = ""  # version and cipher
    capabilities: Capabilities = field(default_factory=Capabilities)
    problem: str = ""
    failure: Failure | None = None


class _NoMails:
    """A source that only looks."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.tls = ""
        self.failure: Failure | None = None
        self.ready = False
        self.over = asyncio.Event()

    def next_mail(self) -> Mail | None:
        return None

    def mail_done(self, mail: Mail, results: Mapping[str, Result]) -> None:
        raise NotImplementedError("it has given no mail")

    def mail_unsent(self, mail: Mail) -> None:
        raise NotImplementedError("it has given no mail")

    def mail_broken(self, mail: Mail, error: Exception) -> None:
        raise NotImplementedError("it has given no mail")

    def session_ready(self, session: Session) -> None:
        self.ready = True
        session.quit()

    def session_closed(self, session: Session, failure: Failure | None) -> None:
        self.failure = failure
        account = session.account
        if session.peer:
            self.steps.append(f"connected to {session.peer} port {account.port}")
        if session.cipher:
            self.tls = " ".join(session.cipher)
            checked = "not checked" if account.verify is False else "valid"
            self.steps.append(f"encrypted: {self.tls}, certificate {checked}")
        if session.capabilities.keywords:
            self.steps.append("offers " + ", ".join(sorted(session.capabilities.keywords)))
        if session.login:
            self.steps.append(f"logged in as {account.username} by {session.login}")
        self.over.set()


async def check_async(
    account: Account, secret: Secret | None, *, helo_name: str, deadline: float | None = None
) -> Report:
    """See `check`; in a running event loop."""
    source = _NoMails()
    session = Session(account, secret, source, helo_name=helo_name, loop=asyncio.get_running_loop())
    session.connect()
    late = ""
    try:
        async with asyncio.timeout(deadline):
            await source.over.wait()
    except TimeoutError as error:
        source.failure = Failure(Phase.CONNECT, None, error)
        late = f"{account.relay} is too slow: not done within {deadline:g} seconds."
    finally:
        session.abort()
    ok = source.ready and not late
    failure = source.failure or Failure(Phase.CONNECT, None, ConnectionResetError("interrupted"))
    return Report(
        ok=ok,
        steps=tuple(source.steps),
        tls=source.tls,
        capabilities=session.capabilities,
        problem="" if ok else late or explain(account, failure),
        failure=None if ok else failure,
    )


def check(
    account: Account, secret: Secret | None, *, helo_name: str, deadline: float | None = None
) -> Report:
    """Try to log in as this account; no mail is sent.  Never raises for what goes wrong.

    `deadline`: seconds that all of it may take; None: as long as the account's time-outs let it.
    """
    return asyncio.run(check_async(account, secret, helo_name=helo_name, deadline=deadline))
