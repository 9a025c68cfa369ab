from django.db import migrations, models


def note_lifetimes(apps, schema_editor):
    keys = apps.get_model("tinkerapi", "ApiKey").objects.using(schema_editor.connection.alias)
    keys.filter(expires_at__isnull=False).update(
        lifetime=models.F("expires_at") - models.F("created_at")
    )


class Migration(migrations.Migration):
    dependencies = [("tinkerapi", "0002_failed_logins")]

    operations = [
        migrations.AddField(
            model_name="apikey",
            name="lifetime",
            field=models.DurationField(blank=True, null=True),
        ),
        migrations.RunPython(note_lifetimes, migrations.RunPython.noop, elidable=True),
    ]
