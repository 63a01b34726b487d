"""Print the figures of docs/reliability.rst: states after a power loss, and faults."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from unittest import mock

from disk import MODELS
from enumerator import Enumerator, all_sites, is_missed
from faults import ERRORS, PATHS, Fault, faults, play
from recorder import in_memory
from stories import NAMES

from cpsmailaccess_delivery.spool import durable


def main() -> int:
    logging.disable(logging.CRITICAL)
    with in_memory() as workplace:
        enumerator = Enumerator(workplace)
        wrong = print_states(enumerator)
        print_syncs(enumerator)
        return wrong + print_faults(workplace)


def print_states(enumerator: Enumerator) -> int:
    wrong = 0
    began, cpu = time.monotonic(), time.process_time()
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
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    print(f"{enumerator.states} starts in {seconds:.0f} s, {cpu:.0f} s of them CPU\n")
    return wrong


def print_syncs(enumerator: Enumerator) -> None:
    print("Missed when it does not happen, in the models " + ", ".join(MODELS[:1] + MODELS[2:]))
    for site in sorted(all_sites(enumerator)):
        missed = {m: bool(is_missed(enumerator, site, m)) for m in MODELS if m != "unordered"}
        print("  ".join("yes" if yes else "-  " for yes in missed.values()), "", site)


def print_faults(workplace: Path) -> int:
    errors = " ".join((*ERRORS, "EINTR"))
    print(f"\n{'path':28}{'calls':>7}{'faults':>8}{'bad ends':>10}   errors: {errors}")
    began = time.monotonic()
    sums = [0, 0, 0]
    for name in PATHS:
        calls = met = wrong = 0
        for syncfs in (False, True):
            with mock.patch.object(durable, "_quiet", return_value=syncfs):
                seen = play(name, workplace)[0]
                calls += seen
                for at, error, lasting in faults(seen, full=True):
                    fault = Fault(at, error, lasting=lasting)
                    wrong += bool(play(name, workplace, fault)[1])
                    met += bool(fault.hit)
        print(f"{name:28}{calls:7}{met:8}{wrong:10}")
        sums = [a + b for a, b in zip(sums, (calls, met, wrong), strict=True)]
    print(f"{'':28}{sums[0]:7}{sums[1]:8}{sums[2]:10}   in {time.monotonic() - began:.0f} s")
    return sums[2]


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
