"""Processes of the contenders: ``python -m benchmarks.child MODULE FUNCTION JSON``.

The function gets what the JSON says and a `Parent`; what it returns is the last line it
writes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent


class Parent:
    """What a function in a child knows of its parent."""

    def ready(self) -> None:
        """Say that the measurement may begin; take CPU from here on."""
        self._began = time.process_time()
        print(json.dumps({"ready": time.monotonic()}), flush=True)

    def wait(self) -> None:
        """Return when the parent has seen enough."""
        sys.stdin.readline()

    def usage(self) -> dict[str, Any]:
        return {"cpu": time.process_time() - self._began, "rss": _peak()}


class Child:
    """A process, seen from the harness."""

    def __init__(self, module: str, function: str, **arguments: Any) -> None:
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.child"),
                *(module, function, json.dumps(arguments)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def line(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args[3:5]} died: {self._process.wait()}")
        return json.loads(line)

    def finish(self) -> Any:
        """Tell it to end; return its result."""
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self.result()

    def result(self) -> Any:
        try:
            return self.line()
        finally:
            self.end()

    def kill(self) -> None:
        """Kill it, as the kernel would."""
        self._process.kill()
        self.end()

    def end(self) -> None:
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def call(module: str, function: str, **arguments: Any) -> Any:
    """Run a function in a process of its own; return its result."""
    return Child(module, function, **arguments).result()


def _peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split(None, 1)[0]) * 1024


if __name__ == "__main__":
    _, module, function, arguments = sys.argv
    result = getattr(import_module(f"benchmarks.{module}"), function)(
        Parent(), **json.loads(arguments)
    )
    print(json.dumps(result), flush=True)
