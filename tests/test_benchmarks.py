"""The harness of ``make bench`` runs, and its relays see what is wrong with mails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.sink import Sink

    with Sink(lanes=2) as started:
        yield started


def deliver(port: int, number: int, lane: int, extra: str = "", typo: bytes = b"tempor") -> None:
    from benchmarks.mails import message, recipient_of, sender_of

    data = message(number, lane, 4096).replace(b"Bcc: secret@example.net\n", b"")
    data = extra.encode() + data.replace(b"tempor", typo, 1)
    data = data.replace(b"\n", b"\r\n").replace(b"\r\n.", b"\r\n..")
    envelope = f"MAIL FROM:<{sender_of(lane)}>\r\nRCPT TO:<{recipient_of(number)}>\r\nDATA\r\n"
    with (
        socket.create_connection(("127.0.0.1", port), 10) as connection,
        connection.makefile("rb") as replies,
    ):
        connection.sendall(envelope.encode())
        assert [replies.readline()[:3] for _ in range(4)] == [b"220", b"250", b"250", b"354"]
        connection.sendall(data + b".\r\n")
        assert replies.readline().startswith(b"250")


FAULTS = ("duplicate", "misrouted", "leaked", "damaged")


@pytest.mark.parametrize("number", [1, 16])  # the latter begins with dots
def test_good_mail(sink: Any, number: int) -> None:
    deliver(sink.ports[1], number, 1)
    report = sink.report()
    assert report["unique"] == 1
    assert [report[fault] for fault in FAULTS] == [0, 0, 0, 0]


def test_missing_mail(sink: Any) -> None:
    deliver(sink.ports[0], 2, 0)
    assert not sink.wait(2, 0.1)
    assert sink.report()["unique"] == 1


def test_duplicate(sink: Any) -> None:
    deliver(sink.ports[0], 2, 0)
    deliver(sink.ports[0], 2, 0)
    report = sink.report()
    assert [report[fault] for fault in FAULTS] == [1, 0, 0, 0]
    assert report["unique"] == 1


def test_misrouted_mail(sink: Any) -> None:
    deliver(sink.ports[1], 2, 0)
    report = sink.report()
    assert [report[fault] for fault in FAULTS] == [0, 1, 0, 0]


@pytest.mark.parametrize("field", ["Bcc: eve@example.net\n", "X-Zope-Mailbox: alice@example.org\n"])
def test_leaked_header(sink: Any, field: str) -> None:
    deliver(sink.ports[0], 2, 0, extra=field)
    report = sink.report()
    assert [report[fault] for fault in FAULTS] == [0, 0, 1, 0]


def test_damaged_mail(sink: Any) -> None:
    deliver(sink.ports[0], 2, 0, typo=b"temper")
    report = sink.report()
    assert [report[fault] for fault in FAULTS] == [0, 0, 0, 1]


def test_harness(tmp_path: Path) -> None:
    output = tmp_path / "out"
    subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "--rounds", "1", "--scale", "0.001"),
            *("--only", "ours", "--directory", tmp_path, "--output", output),
            *("plain", "chunking", "commit"),
        ],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "150"},
        check=True,
        capture_output=True,
        timeout=120,
    )
    results = json.loads((output / "results.json").read_text())
    turns = results["turns"]
    assert set(turns) == {"plain", "chunking", "commit"}
    (plain,) = turns["plain"]["ours"]
    assert plain["unique"] == 20
    assert [plain[fault] for fault in ("missing", "left", *FAULTS)] == [0] * 6
    assert plain["value"] > 0
    assert turns["commit"]["ours"][0]["missing"] == 0
    assert "drain 5,000" in (output / "table.txt").read_text()
    assert results["machine"]["cores"] >= 1
