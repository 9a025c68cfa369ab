"""A path means one checkpoint of its owner's, whatever runs have had the name in turn.

Where several runs of one name have saved the same name, one checkpoint keeps the path: that of
the live run or the one that was removed last, which the path meant until now. The others, which
no path led to, get the path below their run's id; so do those of a run that was named like
another one's id, for that name is the other's in paths.
"""

import django.db.models.deletion
from django.conf import settings
from django.db import migrations, models

GIVE_PATHS = """
UPDATE training_checkpoint AS checkpoint
SET owner_id = placed.owner_id,
    path_run = CASE WHEN placed.place = 1 THEN placed.known_as ELSE placed.run_id END
FROM (
    SELECT checkpoint.id, run.owner_id, run.id AS run_id, known_as,
        row_number() OVER (
            PARTITION BY run.owner_id, known_as, checkpoint.kind, checkpoint.name
            ORDER BY run.deleted_at DESC NULLS FIRST, checkpoint.id DESC
        ) AS place
    FROM training_checkpoint AS checkpoint JOIN training_run AS run ON run.id = checkpoint.run_id
    CROSS JOIN LATERAL (
        SELECT CASE WHEN EXISTS (
            SELECT FROM training_run AS other WHERE other.id = run.name AND other.id <> run.id
        ) THEN run.id ELSE run.name END AS known_as
    ) AS names
) AS placed
WHERE checkpoint.id = placed.id
"""


class Migration(migrations.Migration):
    dependencies = [
        ("training", "0003_audit_events"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.AddField(
            model_name="checkpoint",
            name="owner",
            field=models.ForeignKey(
                null=True,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="+",
                to=settings.AUTH_USER_MODEL,
            ),
        ),
        migrations.AddField(
            model_name="checkpoint",
            name="path_run",
            field=models.CharField(max_length=200, null=True),
        ),
        migrations.RunSQL(GIVE_PATHS, migrations.RunSQL.noop),
        migrations.AlterField(
            model_name="checkpoint",
            name="owner",
            field=models.ForeignKey(
                on_delete=django.db.models.deletion.PROTECT,
                related_name="+",
                to=settings.AUTH_USER_MODEL,
            ),
        ),
        migrations.AlterField(
            model_name="checkpoint",
            name="path_run",
            field=models.CharField(max_length=200),
        ),
        migrations.AddConstraint(
            model_name="checkpoint",
            constraint=models.UniqueConstraint(
                condition=models.Q(("ephemeral", False)),
                fields=("owner", "path_run", "kind", "name"),
                name="checkpoint_path_means_one",
            ),
        ),
    ]
