"""Changes no table: from here on rows may have results that earlier versions cannot read.

An earlier version refuses a database with a migration that it does not know. Without this one it
would start, and answer with results of the new form as if they were its own.
"""

from typing import ClassVar

from django.db import migrations
from django.db.migrations.operations.base import Operation


class Migration(migrations.Migration):
    dependencies = [
        ("training", "0010_rendered_data"),
    ]

    operations: ClassVar[list[Operation]] = []
