"""What the server does in one call: a commit waits for two of its answers, a claim for one.

Made anew by every `cpsmail schema upgrade`, since the engine's own statement is in one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .connections import Connection, Executor
from .engine import DELETE_JOB, DEQUEUE, ENQUEUE, JOBS, SCHEMA

#: Ids in one notification, which takes 8,000 bytes.
_PER_NOTE: Final = 180

#: Seconds that a mail waits at most: the engine adds them to a date.
_FARTHEST: Final = 1e11

#: Of a mail: nobody has it; and a processor may.
FREE: Final = "(leased_until IS NULL OR leased_until < clock_timestamp())"
TAKEABLE: Final = "(state = 'queued' OR (state IN ('deferred', 'unclear') AND due > 0))"

#: That `doubt` is in `coalesce` keeps the planner from the index of mails in doubt: until it is
#: vacuumed it holds every mail that came since.
FUNCTIONS: Final = f"""
CREATE OR REPLACE FUNCTION {SCHEMA}.enqueue(int[], text[], bytea[], interval[], text[], jsonb[])
RETURNS TABLE (ord bigint, id bigint) LANGUAGE plpgsql AS $function$
#variable_conflict use_column
BEGIN
    RETURN QUERY {ENQUEUE};
END $function$;

-- The jobs of new mails, in their order.
CREATE OR REPLACE FUNCTION {SCHEMA}.new_jobs(
    ids text[], lanes text[], priorities int[], dues float8[]
) RETURNS bigint[] LANGUAGE plpgsql AS $function$
BEGIN
    RETURN ARRAY(SELECT queued.id FROM {SCHEMA}.enqueue(
        priorities, lanes, ARRAY(SELECT convert_to(each, 'UTF8') FROM unnest(ids) each),
        ARRAY(SELECT make_interval(secs => least(greatest(each - extract(epoch FROM now()), 0),
            {_FARTHEST})) FROM unnest(dues) each),
        ids, array_fill('null'::jsonb, ARRAY[cardinality(ids)])) queued ORDER BY ord);
END $function$;

-- Let the engine name these mails when they are due.
CREATE OR REPLACE FUNCTION {SCHEMA}.give_jobs(mail_ids text[]) RETURNS void
LANGUAGE sql AS $function$
    WITH mail AS (
        SELECT array_agg(id) ids, array_agg(lane) lanes, array_agg(priority::int) priorities,
            array_agg(due) dues
        FROM {SCHEMA}.mails WHERE id = ANY(mail_ids)
    ) UPDATE {SCHEMA}.mails SET job = each.job
    FROM mail, unnest(ids, {SCHEMA}.new_jobs(ids, lanes, priorities, dues)) each (id, job)
    WHERE mails.id = each.id;
$function$;

-- Tell every watch of these mails, when the transaction commits.
CREATE OR REPLACE FUNCTION {SCHEMA}.tell(mail_ids text[]) RETURNS void
LANGUAGE plpgsql AS $function$
BEGIN
    PERFORM pg_notify('cpsmail', array_to_string(mail_ids[start : start + {_PER_NOTE - 1}], ','))
    FROM generate_series(1, cardinality(mail_ids), {_PER_NOTE}) start;
END $function$;

-- The end of a commit; returns those that were still there to be published.  What has had a job was
-- published: when it is in doubt now, then because somebody cancels it.
CREATE OR REPLACE FUNCTION {SCHEMA}.publish(mail_ids text[], mail_dues float8[])
RETURNS SETOF text LANGUAGE plpgsql AS $function$
DECLARE
    ids text[];
    lanes text[];
    priorities int[];
    dues float8[];
BEGIN
    SELECT array_agg(id), array_agg(lane), array_agg(priority::int), array_agg(due)
    INTO ids, lanes, priorities, dues
    FROM (SELECT mails.id, lane, priority, each.due
        FROM unnest(mail_ids, mail_dues) each (id, due) JOIN {SCHEMA}.mails USING (id)
        WHERE coalesce(doubt, true) AND job IS NULL FOR UPDATE OF mails) mail;
    IF ids IS NOT NULL THEN
        UPDATE {SCHEMA}.mails
        SET state = 'queued', due = each.due, side = NULL, doubt = false, job = each.job
        FROM unnest(ids, dues, {SCHEMA}.new_jobs(ids, lanes, priorities, dues)) each (id, due, job)
        WHERE mails.id = each.id;
        PERFORM {SCHEMA}.tell(ids);
    END IF;
    RETURN QUERY SELECT unnest(ids);
END $function$;

CREATE OR REPLACE FUNCTION {SCHEMA}.dequeue(int, text[], uuid, interval)
RETURNS SETOF {JOBS} LANGUAGE plpgsql AS $function$
BEGIN
    RETURN QUERY {DEQUEUE};
END $function$;

-- Lease the next mails of some lanes: those that the engine names, a processor may take and nobody
-- has; `named`: how many it has named.  Both are timed alike: neither claim ends before the other.
-- What somebody has locked is not waited for: he may wait for its job, which we have by now.
-- Jobs of mails that are gone, or a person's, go: the engine must not name them again.
-- Nothing waits for the disk.  A server that dies forgets both claims or none; then the mails are
-- next again, and what their worker says of them is not taken, since its token is not there.
CREATE OR REPLACE FUNCTION {SCHEMA}.claim(
    most int, of_lanes text[], worker uuid, seconds float8, token uuid, inline_size int
) RETURNS TABLE (
    id text, lane text, state text, due float8, attempts int, priority smallint, expires float8,
    block bytea, message bytea, side text, job bigint, named int
) LANGUAGE plpgsql AS $function$
#variable_conflict use_column
DECLARE
    ids text[];
    jobs bigint[];
    found int;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    SELECT array_agg(encode(each.payload, 'escape')), array_agg(each.id) INTO ids, jobs
    FROM {SCHEMA}.dequeue(most, of_lanes, worker, make_interval(secs => seconds)) each;
    IF ids IS NULL THEN
        RETURN;
    END IF;
    RETURN QUERY
        UPDATE {SCHEMA}.mails
        SET lease = token, leased_until = now() + make_interval(secs => seconds)
        FROM (
            SELECT id, each.job FROM unnest(ids, jobs) each (id, job) JOIN {SCHEMA}.mails USING (id)
            WHERE {FREE} AND {TAKEABLE} FOR UPDATE OF mails SKIP LOCKED
        ) next
        WHERE mails.id = next.id
        RETURNING mails.id, lane, state, due, attempts, priority, expires, block,
            CASE WHEN size <= inline_size THEN message END, side, next.job, cardinality(ids);
    GET DIAGNOSTICS found = ROW_COUNT;
    IF found < cardinality(ids) THEN
        WITH mail AS (
            SELECT each.job FROM unnest(ids, jobs) each (id, job)
            LEFT JOIN {SCHEMA}.mails ON mails.id = each.id
            WHERE mails.id IS NULL OR mails.state IN ('held', 'refused')
                OR (mails.state IN ('deferred', 'unclear') AND mails.due = 0)
        ) {DELETE_JOB};
    END IF;
END $function$;
"""  # noqa: S608


def give_jobs(executor: Executor, ids: Sequence[str]) -> None:
    """Let the engine name these mails when they are due."""
    if ids:
        executor.execute(f"SELECT {SCHEMA}.give_jobs(%s::text[])", [list(ids)])


def tell(executor: Executor, ids: Sequence[str]) -> None:
    """Tell every watch of these mails, when the transaction commits."""
    if ids:
        executor.execute(f"SELECT {SCHEMA}.tell(%s::text[])", [list(ids)])


def publish(connection: Connection, ids: Sequence[str], dues: Sequence[float]) -> set[str]:
    """Let mails in doubt be seen; return those that there still were.

    `dues`: seconds since the epoch, 0: at once.
    """
    query = f"SELECT {SCHEMA}.publish(%s::text[], %s::float8[])"
    return {row[0] for row in connection.execute(query, [list(ids), list(dues)])}
