from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("training", "0014_daily_usage")]

    operations = [
        migrations.CreateModel(
            name="Installation",
            fields=[
                (
                    "id",
                    models.SmallIntegerField(default=1, primary_key=True, serialize=False),
                ),
                ("storage_id", models.CharField(max_length=64)),
            ],
            options={
                "constraints": [
                    models.CheckConstraint(
                        condition=models.Q(("id", 1)), name="installation_is_one"
                    )
                ],
            },
        ),
    ]
