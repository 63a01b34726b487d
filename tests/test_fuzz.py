"""Hostile input, the short form: the corpus, and edits of it.  ``make fuzz`` is the full run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.targets import CORPUS, TARGETS

FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())

#: What parsers look for, and what breaks them.
TOKENS = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b".",
        b"\r\n.\r\n",
        b"\n.\n",
        b"\x1b",
        b"\xff",
        b"\xed\xa0\x80",
    ),
    *(b'"', b"<", b">", b",", b":", b": ", b" ", b"=", b"--b", b"[", b"]", b"{", b"}", b"Infinity"),
    *(b"9" * 400, b"[" * 2000, b"(" * 500, b"\0h", b"\0m", b"\0w", b"250 ok\r\n", b"354 \r\n"),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_corpus(path: Path) -> None:
    TARGETS[path.parent.name][0](path.read_bytes())


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in FILES} == set(TARGETS)


def edited(name: str) -> st.SearchStrategy[bytes]:
    """Return inputs: a file of the corpus, some bytes cut out, some put in their place."""
    files = [path.read_bytes() for path in FILES if path.parent.name == name]
    edits = st.tuples(
        st.integers(0, 4096), st.integers(0, 12), st.sampled_from(TOKENS) | st.binary(max_size=6)
    )

    def apply(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
        for at, length, new in changes:
            start = at % (len(data) + 1)
            data = data[:start] + new + data[start + length :]
        return data

    return st.builds(apply, st.sampled_from(files), st.lists(edits, max_size=5))


@pytest.mark.parametrize("name", TARGETS)
def test_edits_of_the_corpus(name: str) -> None:
    target, share = TARGETS[name]

    @settings(
        max_examples=100 if share >= 1 else 25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(edited(name))
    def attack(data: bytes) -> None:
        target(data)

    attack()
