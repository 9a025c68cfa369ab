"""The database's tables: this version's, an older one's, or a foreign one's."""

from __future__ import annotations

import psycopg
import pytest
from django.db import OperationalError, connection
from django.db.migrations.recorder import MigrationRecorder
from pytest_django import Settings

from tinkerapi.server.upgrade import (
    SchemaError,
    database_down_reason,
    schema_migrate,
    unapplied_migrations,
)


@pytest.mark.django_db
def test_tables_of_this_version_need_nothing() -> None:
    assert unapplied_migrations() == 0
    assert schema_migrate() == 0


@pytest.mark.django_db
def test_tables_of_a_newer_version_are_refused_by_name() -> None:
    MigrationRecorder(connection).record_applied("training", "9999_from_the_future")

    with pytest.raises(SchemaError, match=r"newer version \(it has training.9999_from_the_future"):
        schema_migrate()


@pytest.mark.django_db
def test_a_broken_history_is_refused() -> None:
    MigrationRecorder(connection).record_unapplied("auth", "0001_initial")

    with pytest.raises(SchemaError, match="are inconsistent"):
        schema_migrate()


@pytest.mark.django_db
def test_tables_that_do_not_fit_their_history_are_refused() -> None:
    recorder = MigrationRecorder(connection)
    for app, name in recorder.applied_migrations():
        if app == "tinkerapi":
            recorder.record_unapplied(app, name)
    assert unapplied_migrations() >= 1

    with pytest.raises(SchemaError, match=r"do not fit this version: .*already exists"):
        schema_migrate()


@pytest.mark.django_db
def test_tables_of_other_programs_in_the_same_database_do_not_matter() -> None:
    MigrationRecorder(connection).record_applied("somebody_else", "0001_initial")

    assert unapplied_migrations() == 0


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "start it with `python manage.py up`"),
        ("postgresql://db/x", "DATABASE_URL does not answer: connection failed"),
    ],
)
def test_a_database_that_does_not_answer_gets_a_sentence(
    settings: Settings, url: str, sentence: str
) -> None:
    settings.DATABASE_URL = url
    error = OperationalError("connection failed\nmore")
    error.__cause__ = psycopg.OperationalError("connection failed")

    assert str(database_down_reason(error)).endswith(sentence)


def test_an_error_of_a_database_that_answers_is_not_taken_for_its_absence() -> None:
    error = OperationalError("deadlock detected")
    error.__cause__ = psycopg.errors.DeadlockDetected("deadlock detected")

    assert database_down_reason(error) is None
