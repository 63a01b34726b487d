"""``python -m soak``: the long form, with a table."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .recovery import measure
from .run import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--waiting", type=int, default=10_000, help="mails of the recovery")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        begun = time.monotonic()
        verdict = soak(Path(directory, "soak"), kills=options.kills, seed=options.seed)
        print(f"kill -9 soak, seed {options.seed}, {time.monotonic() - begun:.0f} s")
        print(verdict)
        recovery = measure(Path(directory, "recovery"), options.waiting)
        print(recovery)
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
