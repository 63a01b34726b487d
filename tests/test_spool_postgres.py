"""The spool on PostgreSQL keeps the contract, on a real server."""

from __future__ import annotations

import pytest

pytest.importorskip("psycopg", reason="needs the extra [postgres]")

from cpsmailaccess_delivery.pg.connections import Connections
from cpsmailaccess_delivery.spool.postgres import PostgresSpool
from spool_contract import DoubtContract, SpoolContract

NOW = 1_700_000_000.0


class TestPostgresSpool(SpoolContract, DoubtContract):
    @pytest.fixture
    def now(self):
        return NOW

    @pytest.fixture
    def spool(self, database, now):
        spool = PostgresSpool(Connections(database), clock=lambda: now)
        yield spool
        spool.close()
