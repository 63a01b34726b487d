"""The engine: pgqueuer says which mail is next for whom, and when.  Nothing else knows it.

A mail that a processor may take has a job: entrypoint its lane, payload and dedupe key its id,
execute_after its due time.  Of pgqueuer: the table, `enqueue`, `dequeue`, `update_heartbeat`,
`upgrade`.  Not its `QueueManager`: it buffers acknowledgements, and does not fence them.  A job
ends in the statement that settles its mail, so that one cannot outlive the other.
"""

from __future__ import annotations

import uuid
from collections.abc import Coroutine, Sequence
from datetime import timedelta
from typing import Any, Final, TypeVar

from pgqueuer.adapters.persistence.qb import (
    QueryBuilderEnvironment,
    QueryQueueBuilder,
    QuerySchedulerBuilder,
)
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.domain.settings import DBSettings, Durability
from pgqueuer.domain.types import Channel, JobId, QueueManagerId
from psycopg import RawCursor
from psycopg.rows import dict_row

from .connections import Connection

#: The schema of all our tables, and of the engine's.
SCHEMA: Final = "cpsmail"

#: The engine's log and statistics may be lost in a crash: our journal says what happened.
SETTINGS: Final = DBSettings(
    prefix="",
    db_schema=SCHEMA,
    durability=Durability.balanced,
    channel=Channel("cpsmail_engine"),
    function="fn_pgqueuer_changed",
    statistics_table="pgqueuer_statistics",
    queue_status_type="pgqueuer_status",
    queue_table="pgqueuer",
    queue_table_log="pgqueuer_log",
    trigger="tg_pgqueuer_changed",
    schedules_table="pgqueuer_schedules",
)

JOBS: Final = SETTINGS.qualified.queue_table
LOG: Final = SETTINGS.qualified.queue_table_log

#: The claim's cost grows with lanes and batch: see docs/scaling.rst.
MOST_AT_ONCE: Final = 50

_T = TypeVar("_T")


class _Driver:
    """What `Queries` asks of a driver, on a connection without asyncio."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def fetch(self, query: str, *args: object) -> list[dict[str, object]]:
        cursor = RawCursor(self._connection, row_factory=dict_row)
        return cursor.execute(query, args or None).fetchall()

    async def execute(self, query: str, *args: object) -> str:
        cursor = RawCursor(self._connection)
        return cursor.execute(query, args or None).statusmessage or ""


def _queries(connection: Connection) -> Queries:
    driver: Any = _Driver(connection)
    return Queries(
        driver,
        qbe=QueryBuilderEnvironment(SETTINGS),
        qbq=_BUILDER,
        qbs=QuerySchedulerBuilder(SETTINGS),
    )


_BUILDER: Final = QueryQueueBuilder(SETTINGS)

#: How the engine takes jobs: its own statement, for a function on the server.  Priorities, lanes,
#: payloads, seconds until they are due, dedupe keys, headers; returns positions and jobs.
ENQUEUE: Final = _BUILDER.build_enqueue_query()

#: How it says what is next, the same way.  How many jobs at most, lanes, worker, and the silence
#: after which another worker's job is taken; returns rows of its table.
DEQUEUE: Final = _BUILDER.build_dequeue_query(
    batch_size=1,
    entrypoints=[],
    concurrency_limits=[],
    queue_manager_id=QueueManagerId(uuid.UUID(int=0)),
    global_concurrency_limit=None,
    heartbeat_timeout=timedelta(0),
).sql.rstrip(";")


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run what never waits, since its driver does not."""
    try:
        work.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    raise RuntimeError("the engine waits for something that is not its driver")


def upgrade(connection: Connection) -> None:
    """Make the engine's tables, or bring older ones up to date; safe to repeat.

    Its trigger is off: each NOTIFY makes commits wait for each other, and we send our own.
    """
    queries = _queries(connection)
    if _run(queries.schema_is_installed()):
        _run(queries.apply_upgrade())
    else:
        _run(queries.install(create_schema=False))
    # Only where it is on: who changes a table waits for all transactions with mails in them, and
    # all others wait for him.
    query = (
        "SELECT 1 FROM pg_trigger WHERE tgrelid = %s::regclass AND tgname = %s AND tgenabled <> 'D'"
    )
    if connection.execute(query, [JOBS, SETTINGS.trigger]).fetchone():
        connection.execute(f"ALTER TABLE {JOBS} DISABLE TRIGGER {SETTINGS.trigger}")


def beat(connection: Connection, jobs: Sequence[int]) -> None:
    """Say that the mails of these jobs are being delivered."""
    if jobs:
        _run(_queries(connection).update_heartbeat([JobId(job) for job in jobs]))


#: For statements that settle a mail, see `mails`.  A job goes with its mail, or is free again.
DELETE_JOB: Final = f"DELETE FROM {JOBS} WHERE id IN (SELECT job FROM mail)"  # noqa: S608
FREE_JOB: Final = (
    f"UPDATE {JOBS} SET status = 'queued', queue_manager_id = NULL, slot = NULL,"  # noqa: S608
    " updated = now(), execute_after = greatest(now(), to_timestamp(%(due)s))"
    " WHERE id IN (SELECT job FROM mail)"
)
