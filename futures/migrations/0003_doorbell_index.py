"""django-q2's queue table has no index, so each claim would read all tasks of all queues."""

from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [
        ("futures", "0002_external_storage"),
        ("django_q", "0018_task_success_index"),
    ]

    operations = [
        migrations.RunSQL(
            "CREATE INDEX futures_doorbell ON django_q_ormq (key, id)",
            "DROP INDEX futures_doorbell",
        )
    ]
