"""``cpsmail schema``: the tables of an outbox on PostgreSQL."""

from __future__ import annotations

import click

from ..errors import InvalidSettings
from ..parts import is_url
from .app import App, json_option, pass_app
from .output import emit, say


@click.group()
def schema() -> None:
    """Make the tables of an outbox on PostgreSQL, and bring them up to date."""


@schema.command()
@json_option
@pass_app
def upgrade(app: App, as_json: bool) -> int:
    """Bring the schema to the version of this release.

    Safe to repeat, and while this release and the one before are at work: upgrade the schema,
    then the hosts, one by one.  A schema that is newer stays as it is.
    """
    settings = app.settings()
    if not is_url(settings.outbox):
        raise InvalidSettings(
            f"outbox {settings.outbox}: is a directory, which has no schema: name postgresql://..."
        )
    # Here, not above: what it needs is an extra.
    try:
        from ..pg.connections import Connections
        from ..pg.schema import VERSION
        from ..pg.schema import upgrade as upgrade_schema
    except ModuleNotFoundError as error:
        raise InvalidSettings(
            f"outbox {settings.location}: needs {error.name}, which is not installed:"
            " pip install 'cpsmailaccess_delivery[postgres]'"
        ) from None
    connections = Connections(str(settings.outbox))
    try:
        done = upgrade_schema(connections)
    finally:
        connections.close()
    if as_json:
        emit({"before": done.before, "after": done.after})
    elif done.after > VERSION:
        say(
            f"{connections.location}: schema {done.after} is of a newer release and stays;"
            f" this one makes {VERSION}"
        )
    elif done.before == done.after:
        say(f"{connections.location}: schema {done.after} already")
    else:
        say(f"{connections.location}: schema {done.after}, before {done.before or 'none'}")
    return 0
