"""docs/running.rst names the metrics that there are."""

from __future__ import annotations

import re
from pathlib import Path

from cpsmailaccess_delivery import metrics

DOCS = (Path(__file__).parent.parent / "docs" / "running.rst").read_text(encoding="utf-8")


def test_metrics_are_those_that_there_are() -> None:
    code = Path(metrics.__file__).read_text(encoding="utf-8")
    made = set(re.findall(r'"(cpsmail_[a-z_]+)"', code))
    documented = set(re.findall(r"cpsmail_[a-z_]+", DOCS))
    assert {name.removesuffix("_total") for name in documented} == made
