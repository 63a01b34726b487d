"""The in-memory spool keeps the contract."""

import pytest

from cpsmailaccess_delivery.testing import MemorySpool
from spool_contract import SpoolContract

NOW = 1_700_000_000.0


class TestMemorySpool(SpoolContract):
    @pytest.fixture
    def now(self):
        return NOW

    @pytest.fixture
    def spool(self, now):
        spool = MemorySpool(clock=lambda: now)
        yield spool
        spool.close()
