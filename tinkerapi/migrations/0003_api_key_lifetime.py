from django.db import migrations, models

NOTE_LIFETIMES = """
UPDATE tinkerapi_apikey SET lifetime = expires_at - created_at WHERE expires_at IS NOT NULL
"""


class Migration(migrations.Migration):
    dependencies = [("tinkerapi", "0002_failed_logins")]

    operations = [
        migrations.AddField(
            model_name="apikey",
            name="lifetime",
            field=models.DurationField(blank=True, null=True),
        ),
        migrations.RunSQL(NOTE_LIFETIMES, migrations.RunSQL.noop, elidable=True),
    ]
