"""Ends of workers from outside are counted apart from crashes, and make no suspects at first."""

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("futures", "0005_future_interruptible")]

    operations = [
        migrations.AddField(
            model_name="future",
            name="interruptions",
            field=models.SmallIntegerField(db_default=0, default=0),
        ),
    ]
