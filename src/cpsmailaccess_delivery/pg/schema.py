"""The tables, and how an older schema becomes the present one.

Each version adds what the one before can live with: two releases work side by side while hosts
are upgraded one by one.  What would not (a column that must be filled, one that goes) takes two
versions, and ``oldest`` says which release may still work with it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import psycopg
from psycopg.rows import tuple_row

from ..errors import SpoolError
from . import engine
from .connections import PATIENT, Connection, Connections
from .engine import SCHEMA
from .functions import FUNCTIONS

#: What this release makes and reads.
VERSION: Final = 2

#: The oldest schema with which this release works.
READS: Final = 2

_PLACE: Final = f"""
SELECT (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database()),
    '{SCHEMA}.version'::pg_catalog.regclass::oid,
    (SELECT extract(epoch FROM min(at)) FROM {SCHEMA}.version)"""  # noqa: S608

_LOCK: Final = 0x63707361  # "cpsa": of two upgrades at once, one waits

_FIRST: Final = f"""
CREATE TABLE {SCHEMA}.mails (
    id text COLLATE "C" PRIMARY KEY,
    lane text COLLATE "C" NOT NULL,
    state text COLLATE "C" NOT NULL,      -- staged, aborted, arriving, or one of `State`
    due double precision NOT NULL,        -- seconds since the epoch
    attempts integer NOT NULL,
    priority smallint NOT NULL,
    expires double precision NOT NULL,    -- seconds since the epoch; 0: no limit
    digest text COLLATE "C" NOT NULL,     -- of the Message-Id
    block bytea NOT NULL,                 -- the envelope, as `envelope` writes it
    message bytea NOT NULL,
    size integer NOT NULL,                -- bytes of the message
    side text,                            -- what earlier attempts left, as in outcomes/
    doubt boolean NOT NULL,               -- nobody saw the end of what sends or cancels it
    witnessed boolean NOT NULL DEFAULT false,   -- and a witness knows whether it has
    staged_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    settled_at timestamptz,
    next_state text COLLATE "C",          -- of one that arrives from another outbox, and which
    origin text COLLATE "C",
    job bigint,
    lease uuid,
    leased_until timestamptz
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0);
-- What is sent is compressed rarely, and is read once.
ALTER TABLE {SCHEMA}.mails ALTER message SET STORAGE EXTERNAL;
CREATE INDEX mails_digest ON {SCHEMA}.mails (digest);
CREATE INDEX mails_expires ON {SCHEMA}.mails (lane, expires) WHERE expires > 0;
CREATE INDEX mails_doubt ON {SCHEMA}.mails (staged_at) WHERE doubt;
CREATE INDEX mails_arriving ON {SCHEMA}.mails (id) WHERE state = 'arriving';
CREATE INDEX mails_refused ON {SCHEMA}.mails (settled_at) WHERE state = 'refused';

CREATE TABLE {SCHEMA}.keys (
    digest text COLLATE "C" PRIMARY KEY,
    mail text COLLATE "C" NOT NULL,
    message_id bytea NOT NULL,
    until timestamptz                     -- NULL: its transaction has not ended
);
CREATE INDEX keys_mail ON {SCHEMA}.keys (mail);
CREATE INDEX keys_until ON {SCHEMA}.keys (until);

CREATE TABLE {SCHEMA}.lanes (
    lane text COLLATE "C" PRIMARY KEY,
    note text,                            -- why it waits, as in lanes/
    worker uuid,                          -- who delivers its mails
    until timestamptz
);
CREATE TABLE {SCHEMA}.workers (
    id uuid PRIMARY KEY,
    host text NOT NULL,
    pid integer NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    until timestamptz NOT NULL
);

CREATE TABLE {SCHEMA}.accounts (
    name text COLLATE "C" PRIMARY KEY,
    data bytea NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE {SCHEMA}.registers (
    key text COLLATE "C" PRIMARY KEY,     -- its id
    data bytea NOT NULL                   -- which row of each account is the last, sealed
);
CREATE TABLE {SCHEMA}.account_changes (
    token text COLLATE "C" PRIMARY KEY,
    data bytea NOT NULL,
    transaction text COLLATE "C" NOT NULL,
    witnessed boolean NOT NULL,
    staged_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE {SCHEMA}.events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at double precision NOT NULL, kind text NOT NULL, entry text NOT NULL,
    message_id text NOT NULL, mailbox text NOT NULL, sender text NOT NULL,
    recipient text NOT NULL, attempt integer NOT NULL, reply text NOT NULL, relay text NOT NULL
);
CREATE INDEX events_at ON {SCHEMA}.events USING brin (at);
CREATE INDEX events_message_id ON {SCHEMA}.events (message_id);
CREATE INDEX events_sender ON {SCHEMA}.events (lower(sender), at);
CREATE INDEX events_recipient ON {SCHEMA}.events (lower(recipient), at);
"""

_SECOND: Final = f"""
ALTER TABLE {SCHEMA}.lanes ADD COLUMN spent double precision;  -- see `limits.Pace`
{FUNCTIONS}"""

#: By the version that they lead to: what is executed, and the oldest release that works then.
_STEPS: Final[dict[int, tuple[str, int]]] = {1: (_FIRST, 1), 2: (_SECOND, 1)}


class Upgrade(NamedTuple):
    """``before``: the version that was found; 0: none."""

    before: int
    after: int


def upgrade(connections: Connections) -> Upgrade:
    """Bring the schema to the version of this release; one that is newer stays.

    Safe to repeat, and beside living processes of this release and the one before.  Where there
    is nothing to do, nothing is locked.  Raises `SpoolError`, also where this release cannot work
    with one that is newer.
    """
    with connections.use("upgrade the schema") as connection:
        with connection.transaction():
            connection.execute(PATIENT)
            connection.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
        try:
            return _upgrade(connection, connections.location)
        finally:
            connection.execute("SELECT pg_advisory_unlock(%s)", [_LOCK])


def _upgrade(connection: Connection, where: str) -> Upgrade:
    with connection.transaction():
        connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS {SCHEMA}.version (version integer NOT NULL,"
            " oldest integer NOT NULL, at timestamptz NOT NULL DEFAULT now())"
        )
    before = found(connection)[0]
    if before > VERSION:
        check(connection, where)
        return Upgrade(before, before)
    engine.upgrade(connection)
    if before:  # with the statements of the engine as it is now
        connection.execute(FUNCTIONS.encode())
    for version in range(before + 1, VERSION + 1):
        statements, oldest = _STEPS[version]
        with connection.transaction():
            connection.execute(statements.encode())
            connection.execute(
                f"INSERT INTO {SCHEMA}.version (version, oldest) VALUES (%s, %s)",  # noqa: S608
                [version, oldest],
            )
    return Upgrade(before, VERSION)


def found(connection: Connection) -> tuple[int, int]:
    """Return the version of the schema, and the oldest release that works with it."""
    query = f"SELECT version, oldest FROM {SCHEMA}.version ORDER BY version DESC LIMIT 1"  # noqa: S608
    row = connection.execute(query).fetchone()
    return (int(row[0]), int(row[1])) if row else (0, 0)


def place_of(connection: Connection) -> tuple[object, ...]:
    """Return what tells the outbox that a connection leads to from all others.

    By whatever host, port and user it is reached: which database, and when its tables were made;
    a standby that was promoted is the same.  Raises what the database does.
    """
    cursor = psycopg.Cursor(connection, row_factory=tuple_row)
    return tuple(cursor.execute(_PLACE).fetchone() or ())


def check(connection: Connection, location: str) -> None:
    """Raises `SpoolError` when this release cannot work with the schema that is there."""
    try:
        version, oldest = found(connection)
    except psycopg.errors.InsufficientPrivilege:
        raise SpoolError(
            f"{location}: this user may not use the schema {SCHEMA}: grant it, or connect as the"
            " user that ran `cpsmail schema upgrade`"
        ) from None
    if version < READS:
        raise SpoolError(
            f"{location}: has schema {version}, this release needs {READS}: run"
            " `cpsmail schema upgrade`"
        )
    if oldest > VERSION:
        raise SpoolError(
            f"{location}: has schema {version}, which needs a release that knows"
            f" {oldest}; this one knows {VERSION}: upgrade the package"
        )
