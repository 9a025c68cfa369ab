"""The two ways this app talks to Postgres beside the ORM.

Hot statements go through psycopg with server-side parameters: payloads then travel as binary
instead of as escaped text. They run on Django's own connection, so they are part of the
caller's transaction. And what must outlive a request (an advisory lock, a LISTEN in an event
loop) gets a connection of its own, with the same parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg
from django.db import connections
from django_q.conf import Conf


def alias() -> str:
    """The database of django-q2's queue, and so of everything here."""
    return str(Conf.ORM)


def psycopg_connection() -> psycopg.Connection[Any]:
    """This thread's Django connection as psycopg sees it, opened if need be."""
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
        return cursor.fetchall() if cursor.description else []


def dedicated_parameters() -> dict[str, Any]:
    """Arguments for ``psycopg.connect``: same database, no Django adapters, no pool.

    Keep-alives find a dead peer within a minute; such a connection is silent for hours.
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
