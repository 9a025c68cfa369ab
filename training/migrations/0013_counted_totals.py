from django.db import migrations, models

ADD_UP = """
UPDATE training_countedhour AS c SET totals = added.totals
FROM (
    SELECT hour, jsonb_object_agg(state, number) AS totals
    FROM (
        SELECT o.hour, of_state.key AS state, sum(of_state.value::bigint)::bigint AS number
        FROM training_countedhour AS o, jsonb_each(o.counts) AS of_owner,
            jsonb_each_text(of_owner.value) AS of_state
        GROUP BY o.hour, of_state.key
    ) AS of_states
    GROUP BY hour
) AS added
WHERE c.hour = added.hour
"""


class Migration(migrations.Migration):
    dependencies = [("training", "0012_counted_hours")]

    operations = [
        migrations.AddField(
            model_name="countedhour",
            name="totals",
            field=models.JSONField(default=dict),
            preserve_default=False,
        ),
        migrations.RunSQL(ADD_UP, migrations.RunSQL.noop, elidable=True),
    ]
