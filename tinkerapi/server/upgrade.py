"""Migrates the database's tables to this version, or reports why that is impossible."""

from __future__ import annotations

import psycopg
from django.conf import settings
from django.core.management import call_command
from django.db import DatabaseError, OperationalError, connection
from django.db.migrations.exceptions import InconsistentMigrationHistory
from django.db.migrations.executor import MigrationExecutor
from django.db.migrations.loader import MigrationLoader

MIGRATION_LOCK = 0x74696E6B  # pg_advisory_lock key: one process migrates, others wait


class SchemaError(Exception):
    """The database was not made by this version or an older one; the message has details."""


def unapplied_migrations() -> int:
    """The number of missing migrations; 0 if the database fits this version.

    Raises:
        SchemaError: It has migrations that this version does not know, or in another order.
    """
    executor = MigrationExecutor(connection)
    _check_history(executor.loader)
    return len(executor.migration_plan(executor.loader.graph.leaf_nodes()))


def schema_migrate() -> int:
    """Apply the missing migrations and return their number.

    Servers that share a database may call this at the same time. Each migration is its own
    transaction, so the next call completes an interrupted one.

    Raises:
        SchemaError: The database was made by another version; nothing was changed.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", [MIGRATION_LOCK])
        try:
            count = unapplied_migrations()
            if count:
                try:
                    call_command("migrate", verbosity=0, interactive=False)
                except DatabaseError as error:
                    first_line = str(error).splitlines()[0]
                    raise SchemaError(
                        f"the tables in the database do not fit this version: {first_line}"
                    ) from error
        finally:
            cursor.execute("SELECT pg_advisory_unlock(%s)", [MIGRATION_LOCK])
    return count


def _check_history(loader: MigrationLoader) -> None:
    unknown = [
        f"{app}.{name}"
        for app, name in sorted(loader.applied_migrations)
        if app in loader.migrated_apps and (app, name) not in loader.disk_migrations
    ]
    if unknown:
        raise SchemaError(
            f"the database was made by a newer version (it has {', '.join(unknown)}); "
            "install that version, or set another TINKERAPI_DATA_DIR"
        )
    try:
        loader.check_consistent_history(connection)
    except InconsistentMigrationHistory as error:
        raise SchemaError(f"the database's migrations are inconsistent: {error}") from error


def database_down_reason(error: OperationalError | psycopg.OperationalError) -> str | None:
    """A message if the error means that no database answers; None for all others."""
    cause = error if isinstance(error, psycopg.OperationalError) else error.__cause__
    # The server's own errors have a code; a failed connection has none.
    if not isinstance(cause, psycopg.OperationalError) or cause.sqlstate is not None:
        return None
    if settings.DATABASE_URL:
        return f"the database of DATABASE_URL does not answer: {str(error).splitlines()[0]}"
    return f"no server runs on {settings.DATA_DIR}: start it with `python manage.py up`"
