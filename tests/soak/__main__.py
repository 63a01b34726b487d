"""``python -m soak``: the long form, with a table."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .recovery import measure
from .run import SETTINGS, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--back-end", choices=["directory", "postgresql"], default="directory")
    parser.add_argument("--waiting", type=int, default=10_000, help="mails of the recovery")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as directory,
        _server(options.back_end) as server,
    ):
        begun = time.monotonic()
        verdict = soak(
            Path(directory, "soak"), kills=options.kills, seed=options.seed, server=server
        )
        seconds = time.monotonic() - begun
        print(f"kill -9 soak, {options.back_end}, seed {options.seed}, {seconds:.0f} s")
        print(verdict)
        if server is None:
            print(measure(Path(directory, "recovery"), options.waiting))
    return 0 if verdict.good else 1


@contextmanager
def _server(back_end: str) -> Iterator[Any]:
    if back_end == "directory":
        yield None
        return
    from postgres_server import FOR_TESTS, Server

    server = Server({**FOR_TESTS, **SETTINGS})
    try:
        yield server
    finally:
        server.remove()


if __name__ == "__main__":
    sys.exit(main())
