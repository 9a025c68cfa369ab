"""``delayable`` says what ``patient`` meant: a worker may delay the batch for batch-mates."""

from django.db import migrations


class Migration(migrations.Migration):
    dependencies = [("futures", "0006_future_interruptions")]

    operations = [migrations.RenameField("future", "patient", "delayable")]
