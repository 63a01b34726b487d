"""Send one mail now, by the very session that the processor uses: for somebody who waits for it.

Nothing is tried twice here, and nothing is kept: what the results mean is the caller's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from ..account import Account, Secret
from ..dsn import Wish
from ..outcome import Phase
from .events import Failure, Mail, Result
from .session import Session


@dataclass(frozen=True, slots=True)
class Letter:
    """A `Mail`: an envelope and its message."""

    sender: str
    recipients: tuple[str, ...]
    message: bytes
    wish: Wish | None = None


class _OneMail:
    """A source that has one mail, once."""

    def __init__(self, letter: Letter) -> None:
        self._letter: Letter | None = letter
        self.results: Mapping[str, Result] | None = None
        self.error: Exception | None = None
        self.failure: Failure | None = None
        self.session: Session | None = None
        self.over = asyncio.Event()

    def next_mail(self) -> Mail | None:
        letter, self._letter = self._letter, None
        return letter

    def mail_done(self, mail: Mail, results: Mapping[str, Result]) -> None:
        self.results = results
        self._leave()

    def mail_unsent(self, mail: Mail) -> None:
        self._leave()

    def mail_broken(self, mail: Mail, error: Exception) -> None:
        self.error = error
        self._leave()

    def session_ready(self, session: Session) -> None:
        self.session = session

    def session_closed(self, session: Session, failure: Failure | None) -> None:
        self.failure = failure
        self.over.set()

    def _leave(self) -> None:
        if self.session is not None:
            self.session.quit()


def send_directly(
    account: Account,
    secret: Secret | None,
    letter: Letter,
    *,
    helo_name: str,
    deadline: float | None = None,
) -> Mapping[str, Result]:
    """Send a mail through an account; return the result of each recipient.

    `deadline`: seconds that all of it may take; None: as long as the account's time-outs let it.
    Never raises for what goes wrong.  Not in a thread whose event loop runs.
    """
    return asyncio.run(_send(account, secret, letter, helo_name, deadline))


async def _send(
    account: Account,
    secret: Secret | None,
    letter: Letter,
    helo_name: str,
    deadline: float | None,
) -> Mapping[str, Result]:
    source = _OneMail(letter)
    session = Session(account, secret, source, helo_name=helo_name, loop=asyncio.get_running_loop())
    session.connect()
    late: Result | None = None
    try:
        async with asyncio.timeout(deadline):
            await source.over.wait()
    except TimeoutError:
        late = Result(Phase.CONNECT, None, TimeoutError(f"not sent within {deadline:g} seconds"))
    finally:
        session.abort()
    if source.results is not None:
        return source.results
    why: Result | None = late or source.failure
    if source.error is not None:
        why = Result(Phase.MAIL, None, source.error)
    if why is None:
        why = Result(Phase.IDLE, None, ConnectionResetError("the relay closed the connection"))
    return dict.fromkeys(letter.recipients, why)
