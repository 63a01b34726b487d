"""What was committed, as a database would know it: one line in a file, written at once.

The kernel keeps what one `os.write` has given it, however the process dies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from zope.interface import implementer

from cpsmailaccess_delivery.datamanager import TOKEN_NAME
from cpsmailaccess_delivery.interfaces import ITransactionWitness, Verdict


class Appender:
    """Appends lines to a file."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, line: Mapping[str, Any]) -> None:
        os.write(self._fd, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        os.close(self._fd)


class Participant:
    """The data manager of that database: it commits `line` in its `tpc_finish`."""

    def __init__(self, txn: Any, witness: TruthWitness, appender: Appender) -> None:
        self.transaction_manager = None
        self.line: dict[str, Any] = {"sent": [], "cancelled": [], "key": None}
        self._witness = witness
        self._appender = appender
        txn.join(self)

    def sortKey(self) -> str:
        return "truth"

    def commit(self, txn: Any) -> None:
        self.line["token"] = txn.extension.get(TOKEN_NAME, "")
        txn.set_data(self._witness, True)

    def tpc_finish(self, txn: Any) -> None:
        self._appender.write(self.line)

    def tpc_begin(self, txn: Any) -> None:
        pass

    tpc_vote = tpc_abort = abort = tpc_begin

    def savepoint(self) -> Any:
        line = json.dumps(self.line)

        class Savepoint:
            def rollback(_: Any) -> None:
                self.line = json.loads(line)

        return Savepoint()


@implementer(ITransactionWitness)
class TruthWitness:
    """See `ITransactionWitness`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def mark(self, txn: Any) -> str:
        return ""

    def expects(self, txn: Any) -> bool:
        try:
            return bool(txn.data(self))
        except KeyError:
            return False

    def ask(self, tokens: Sequence[str]) -> Mapping[str, Verdict]:
        committed = {line["token"] for _, line in lines(self._directory)}
        return {t: Verdict.COMMITTED if t in committed else Verdict.ABORTED for t in tokens}


def lines(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name of the file, line) of all files in a directory."""
    for path in sorted(directory.iterdir()):
        for line in path.read_text().splitlines():
            yield path.name, json.loads(line)
