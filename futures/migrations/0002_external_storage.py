"""Keep payloads and results out of line and as they are: they are zstd already, so Postgres's
own compression would cost time and save nothing (five to ten times slower writes, measured)."""

from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [("futures", "0001_initial")]

    operations = [
        migrations.RunSQL(
            "ALTER TABLE futures_future "
            "ALTER COLUMN payload SET STORAGE EXTERNAL, ALTER COLUMN result SET STORAGE EXTERNAL",
            migrations.RunSQL.noop,
        )
    ]
