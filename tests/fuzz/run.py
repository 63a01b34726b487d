"""The full run: ``python -m fuzz.run [--inputs N] [--jobs N] [TARGET ...]``, with atheris.

Each target in a process of its own; an input that takes over 10 seconds or 1 GiB is a finding.
Findings stay in ``fuzz-findings/``; put them into the corpus with the fix.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_FINDINGS = Path("fuzz-findings")
_TRACEBACK = re.compile(r".*?(=== Uncaught .*?)==\d+==.*", re.DOTALL)
_DONE = re.compile(r"Done (\d+) runs|#(\d+)\t", re.ASCII)


def fuzz(name: str, arguments: list[str]) -> None:
    """Never returns: the process is libFuzzer's from here on."""
    import atheris

    with atheris.instrument_imports(include=["cpsmailaccess_delivery"]):
        from fuzz.targets import TARGETS

    atheris.Setup([sys.argv[0], *arguments], TARGETS[name][0])
    atheris.Fuzz()


def start(name: str, inputs: int, longest: int) -> tuple[str, int, float, str]:
    """Return (target, inputs, seconds, "" or what was found)."""
    from fuzz.targets import CORPUS

    _FINDINGS.mkdir(exist_ok=True)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as scratch:
        found = Path(scratch, "found")  # what atheris adds to the corpus; first, so it goes there
        found.mkdir()
        command = [
            *(sys.executable, "-m", "fuzz.run", "--target", name, "--"),
            *(f"-runs={inputs}", f"-max_total_time={longest}", "-timeout=10", "-rss_limit_mb=1024"),
            *("-max_len=4096", "-print_final_stats=1", f"-artifact_prefix={_FINDINGS}/{name}-"),
            *(str(found), str(CORPUS / name)),
        ]
        begun = time.monotonic()
        done = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": scratch},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        seconds = time.monotonic() - begun
    log = done.stdout + done.stderr
    counts = [int(match[1] or match[2]) for match in _DONE.finditer(log)]
    problem = "" if not done.returncode else _TRACEBACK.sub(r"\1", log)[:3000]
    return name, max(counts, default=0), seconds, problem


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=2_000_000, help="over all targets")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--longest", type=int, default=900, help="seconds for one target")
    parser.add_argument("--target")
    parser.add_argument("targets", nargs="*")
    options = parser.parse_args()
    if options.target:
        fuzz(options.target, options.targets)
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed: there are wheels for Linux on x86_64, see setup.py")
        return 2
    from fuzz.targets import TARGETS

    chosen = options.targets or list(TARGETS)
    shares = sum(TARGETS[name][1] for name in chosen)
    failed = 0
    total, begun = 0, time.monotonic()
    print(f"{'target':12} {'inputs':>10} {'seconds':>8} {'per second':>10}  unexpected", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        work = [
            pool.submit(
                start, name, round(options.inputs * TARGETS[name][1] / shares), options.longest
            )
            for name in chosen
        ]
        for job in work:
            name, inputs, seconds, problem = job.result()
            total += inputs
            failed += bool(problem)
            rate = inputs / max(seconds, 0.001)
            row = f"{name:12} {inputs:10,} {seconds:8.0f} {rate:10,.0f}  {int(bool(problem))}"
            print(row + ("\n" + problem if problem else ""), flush=True)
    seconds = time.monotonic() - begun
    print(f"{'all':12} {total:10,} {seconds:8.0f} {total / seconds:10,.0f}  {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
