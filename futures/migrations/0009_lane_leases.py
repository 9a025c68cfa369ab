"""Lanes are leased to workers, so a queue may have several.

A worker of the former version may still run. Its epoch ends here, so it can commit nothing any more
and leaves; the next worker that starts gives back what it held (``futures.lost_workers``).
"""

import django.db.models.deletion
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("futures", "0008_failed_futures")]

    operations = [
        migrations.RunSQL(
            "UPDATE futures_worker SET state = 'lost', stopped_at = statement_timestamp() "
            "WHERE state IN ('starting', 'live')",
            migrations.RunSQL.noop,
        ),
        migrations.RemoveConstraint(model_name="worker", name="worker_one_live_per_queue"),
        migrations.AddField(
            model_name="lane",
            name="worker",
            field=models.ForeignKey(
                blank=True,
                db_index=False,
                null=True,
                on_delete=django.db.models.deletion.PROTECT,
                related_name="+",
                to="futures.worker",
            ),
        ),
        migrations.AddIndex(
            model_name="lane",
            index=models.Index(
                condition=models.Q(("worker__isnull", False)), fields=["worker"], name="lane_leased"
            ),
        ),
        migrations.AddIndex(
            model_name="worker",
            index=models.Index(
                condition=models.Q(("state__in", ["starting", "live"])),
                fields=["queue"],
                name="worker_open",
            ),
        ),
        migrations.AddConstraint(
            model_name="lane",
            constraint=models.CheckConstraint(
                condition=models.Q(("worker__isnull", True), ("ordered", True), _connector="OR"),
                name="lane_leased_if_ordered",
            ),
        ),
    ]
