"""A sample that is being sampled may be cancelled; what changes anything may not."""

from django.conf import settings
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("futures", "0004_future_patient"),
        migrations.swappable_dependency(settings.AUTH_USER_MODEL),
    ]

    operations = [
        migrations.AddField(
            model_name="future",
            name="interruptible",
            field=models.BooleanField(default=False),
        ),
        migrations.AddConstraint(
            model_name="future",
            constraint=models.CheckConstraint(
                condition=models.Q(
                    models.Q(("state", "cancelled"), _negated=True),
                    ("worker__isnull", True),
                    ("interruptible", True),
                    _connector="OR",
                ),
                name="future_interrupted_if_it_may_be",
            ),
        ),
    ]
