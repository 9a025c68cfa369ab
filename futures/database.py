"""The two ways in which this app uses Postgres without the ORM.

Hot statements go through psycopg with server-side parameters: payloads then travel as binary
instead of as escaped text. They run on Django's own connection, so they are part of the
caller's transaction. Connections that outlive a request (for an advisory lock or LISTEN in an
event loop) are separate, with the same parameters.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import psycopg
from django.db import IntegrityError, connections
from django.db.models import Model
from django_q.conf import Conf

M = TypeVar("M", bound=Model)


def alias() -> str:
    """The database of django-q2's queue, which all of this app uses."""
    return str(Conf.ORM)


def psycopg_connection() -> psycopg.Connection[Any]:
    """This thread's Django connection as a psycopg connection, opened if necessary."""
    connection = connections[alias()]
    connection.close_if_health_check_failed()
    connection.ensure_connection()
    raw: psycopg.Connection[Any] = connection.connection
    return raw


def execute(sql: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Run one statement in the caller's transaction and return its rows, if it has any.

    ``%(name)b`` sends a parameter as binary. Raises Django's database errors.
    """
    connection = connections[alias()]
    raw = psycopg_connection()
    with connection.wrap_database_errors, psycopg.Cursor(raw) as cursor:
        cursor.execute(sql.encode(), parameters)
        # Not cursor.description, which makes an object for each column: 80 us for a run's.
        has_rows = cursor.pgresult is not None and cursor.pgresult.nfields > 0
        return cursor.fetchall() if has_rows else []


def rows_get(model: type[M], condition: str, parameters: Mapping[str, Any]) -> list[M]:
    """The rows that match a SQL condition on a key, as the ORM would return them.

    For the few lookups that every request makes: the ORM needs five times as long to compose the
    query as a prepared statement needs in all (0.6 against 0.1 ms for a run).
    """
    columns, converters = _row_shape(model)
    names = ", ".join(columns)
    sql = f"SELECT {names} FROM {model._meta.db_table} WHERE {condition}"  # noqa: S608
    found = []
    for row in execute(sql, parameters):
        values = list(row)
        for index, convert in converters:
            values[index] = convert(values[index], None, connections[alias()])
        found.append(model.from_db(alias(), columns, values))
    return found


def row_get(model: type[M], condition: str, parameters: Mapping[str, Any]) -> M | None:
    """The one row of ``rows_get``, or None."""
    rows = rows_get(model, condition, parameters)
    return rows[0] if rows else None


def violated_constraint(error: IntegrityError) -> str | None:
    """The name of the violated constraint, if Postgres gave one."""
    cause = error.__cause__
    return cause.diag.constraint_name if isinstance(cause, psycopg.Error) else None


@cache
def _row_shape(
    model: type[Model],
) -> tuple[tuple[str, ...], list[tuple[int, Callable[[Any, Any, Any], Any]]]]:
    """Columns in the order of the fields, and the converters of those that need one."""
    fields = model._meta.concrete_fields
    converters = [
        (index, convert)
        for index, field in enumerate(fields)
        for convert in field.get_db_converters(connections[alias()])
    ]
    return tuple(field.attname for field in fields), converters


def is_lost(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Whether an idle connection's server is gone, as far as this machine knows.

    An idle server sends nothing, except to announce its end; so a socket with nothing to read
    is alive. The check costs no round trip and notices every server that ended.
    """
    if connection.closed:
        return True
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def dedicated_parameters() -> dict[str, Any]:
    """Arguments for ``psycopg.connect``: same database, no Django adapters.

    Keep-alives find a dead peer within a minute; such a connection may be silent for hours.
    """
    parameters = dict(connections[alias()].get_connection_params())
    for name in ("context", "cursor_factory", "prepare_threshold"):
        parameters.pop(name, None)
    return {
        "keepalives_idle": 30,  # seconds
        "keepalives_interval": 10,  # seconds
        "keepalives_count": 3,
        **parameters,
        "autocommit": True,
    }
