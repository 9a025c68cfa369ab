"""A run whose creation failed is gone: its name and its place are free.

A trigger on the futures does it, because a creation fails in several ways: the worker commits its
error, the next worker gives it up after crashes, its owner or somebody at the console cancels it.
Whichever it is, both rows change in one transaction.
"""

from django.db import migrations, models

FREE_NAMES = """
UPDATE training_run SET deleted_at = statement_timestamp() WHERE state = 'failed';

UPDATE training_run AS run
SET state = 'failed', deleted_at = statement_timestamp(),
    error = coalesce(nullif(creation.error, ''), 'its creation was cancelled')
FROM futures_future AS creation
WHERE run.state = 'creating' AND creation.lane_id = run.id AND creation.kind = 'create_run'
    AND creation.state IN ('failed', 'cancelled')
"""

TAKE_NAMES = """
UPDATE training_run SET state = 'deleted', error = '' WHERE state IN ('failed', 'deleted')
"""

ADD_TRIGGER = """
CREATE FUNCTION training_run_creation_failed() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE training_run
    SET state = CASE WHEN state = 'deleted' THEN 'deleted' ELSE 'failed' END,
        error = coalesce(nullif(NEW.error, ''), 'its creation was cancelled'),
        deleted_at = coalesce(deleted_at, statement_timestamp())
    WHERE id = NEW.lane_id AND state IN ('creating', 'deleted') AND NOT EXISTS (
        SELECT FROM futures_future
        WHERE lane_id = NEW.lane_id AND kind = 'create_run' AND state = 'ready'
    );
    RETURN NULL;
END $$;
CREATE TRIGGER training_run_creation_failed
AFTER UPDATE OF state ON futures_future FOR EACH ROW
WHEN (
    NEW.kind = 'create_run' AND NEW.state IN ('failed', 'cancelled') AND OLD.state <> NEW.state
)
EXECUTE FUNCTION training_run_creation_failed();
"""

DROP_TRIGGER = """
DROP TRIGGER training_run_creation_failed ON futures_future;
DROP FUNCTION training_run_creation_failed;
"""


class Migration(migrations.Migration):
    dependencies = [
        ("futures", "0001_initial"),
        ("training", "0004_checkpoint_path"),
    ]

    operations = [
        migrations.RemoveConstraint(model_name="run", name="run_deleted_iff_deleted_at"),
        migrations.RemoveConstraint(model_name="run", name="run_failed_iff_error"),
        migrations.RunSQL(FREE_NAMES, TAKE_NAMES),
        migrations.AddConstraint(
            model_name="run",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    models.Q(("deleted_at__isnull", False), ("state__in", ["failed", "deleted"])),
                    models.Q(("deleted_at__isnull", True), ("state__in", ["creating", "ready"])),
                    _connector="OR",
                ),
                name="run_gone_iff_deleted_at",
            ),
        ),
        migrations.AddConstraint(
            model_name="run",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    models.Q(("state", "failed"), models.Q(("error", ""), _negated=True)),
                    ("state", "deleted"),
                    models.Q(("error", ""), ("state__in", ["creating", "ready"])),
                    _connector="OR",
                ),
                name="run_failed_iff_error",
            ),
        ),
        migrations.RunSQL(ADD_TRIGGER, DROP_TRIGGER),
    ]
