"""What the tests of the console script share."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from cpsmailaccess_delivery import Account, Outbox
from cpsmailaccess_delivery.cli import cli
from cpsmailaccess_delivery.testing import SMTPServer

DEADLINE = 30.0  # seconds: for what takes milliseconds
MAIL = b"From: alice@example.org\nTo: bob@example.net\nSubject: Hi\n\nHello\n"
SECRET = "s3cret-of-alice"


class Site:
    """An outbox in a directory of its own, and ``cpsmail`` for it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "outbox"
        self.environ = {
            name: value for name, value in os.environ.items() if not name.startswith("CPSMAIL_")
        }
        self.environ["CPSMAIL_OUTBOX"] = str(self.path)

    def run(self, *args: str, input: bytes | str | None = None, code: int | None = 0) -> Result:
        """Run a command in this process, and expect an exit code."""
        result = CliRunner().invoke(cli, list(args), input=input, env=self.environ)
        assert code is None or result.exit_code == code, (result.output, result.exception)
        assert "-v" in args or "Traceback" not in result.output
        return result

    def json(self, *args: str, input: bytes | str | None = None, code: int = 0) -> Any:
        return json.loads(self.run(*args, "--json", input=input, code=code).stdout)

    def process_command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "cpsmailaccess_delivery", *args]

    def process(self, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command as a process of its own."""
        return subprocess.Popen(
            self.process_command(*args),
            env=self.environ,
            stdin=options.pop("stdin", subprocess.PIPE),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )

    def terminal(self, *args: str) -> bytes:
        """Run a command on a terminal of 80 columns; return what it showed."""
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "cpsmailaccess_delivery", *args]
        environ = self.environ | {"TERM": "xterm", "COLUMNS": "80"}
        with subprocess.Popen(
            command, env=environ, stdin=theirs, stdout=theirs, stderr=theirs
        ) as process:
            os.close(theirs)
            output = b""
            try:
                while chunk := os.read(ours, 4096):
                    output += chunk
            except OSError:  # Linux says so that the other end is closed
                pass
            os.close(ours)
            assert process.wait(DEADLINE) == 0, output
        return output

    def outbox(self) -> Outbox:
        return Outbox(self.path)

    def account(self, server: SMTPServer | None = None, mailbox: str = "*", **more: Any) -> None:
        """Add an account for a server; without one, for a port that nobody listens on."""
        import transaction

        port = server.port if server is not None else 1
        with self.outbox() as outbox, transaction.manager:
            outbox.accounts.put(
                Account(mailbox=mailbox, host="127.0.0.1", port=port, security="plain", **more)
            )

    def send(self, *recipients: str, message: bytes = MAIL) -> str:
        recipients = recipients or ("bob@example.net",)
        answer = self.json("send", "-i", "-f", "alice@example.org", *recipients, input=message)
        return str(answer["message_id"])
