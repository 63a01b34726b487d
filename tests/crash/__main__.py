"""Print the figures of docs/reliability.rst: states after a power loss, and faults."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from disk import MODELS
from enumerator import Enumerator, all_sites, is_missed
from stories import NAMES


def main() -> int:
    logging.disable(logging.CRITICAL)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as workplace:
        enumerator = Enumerator(Path(workplace))
        return print_states(enumerator) + print_syncs(enumerator)


def print_states(enumerator: Enumerator) -> int:
    wrong = 0
    began = time.monotonic()
    print(f"{'model':12}{'stories':>8}{'moments':>9}{'states':>9}{'cases':>9}{'violations':>12}")
    for model in MODELS:
        moments = cases = violations = 0
        states: set[object] = set()
        for name in NAMES:
            for syncfs in (False, True):
                count = enumerator.run(name, model, syncfs=syncfs, states=states)
                moments += count.moments
                cases += count.cases
                violations += len(count.violations)
        print(f"{model:12}{len(NAMES):8}{moments:9}{len(states):9}{cases:9}{violations:12}")
        if model != "unordered":  # what it breaks is in the document
            wrong += violations
    print(f"{enumerator.states} starts in {time.monotonic() - began:.0f} s\n")
    return wrong


def print_syncs(enumerator: Enumerator) -> int:
    print("Missed when it does not happen, in the models " + ", ".join(MODELS[:1] + MODELS[2:]))
    unnoticed = 0
    for site in sorted(all_sites(enumerator)):
        missed = {m: bool(is_missed(enumerator, site, m)) for m in MODELS if m != "unordered"}
        print("  ".join("yes" if yes else "-  " for yes in missed.values()), "", site)
        unnoticed += not missed["posix"]
    return unnoticed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
