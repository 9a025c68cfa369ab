#!/usr/bin/env python
"""Django's command line; ``python manage.py up`` starts everything."""

import os
import sys


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tinkerapi.settings")
    import psycopg
    from django.core.exceptions import ImproperlyConfigured
    from django.core.management import execute_from_command_line
    from django.db import OperationalError

    try:
        execute_from_command_line(sys.argv)
    except ImproperlyConfigured as error:  # a setting that makes no sense
        sys.exit(str(error))
    except (OperationalError, psycopg.OperationalError) as error:
        from tinkerapi.schema import database_down_reason

        # Without ``up`` nobody runs the embedded Postgres: a sentence, not a traceback.
        reason = database_down_reason(error)
        if reason is None:
            raise
        sys.exit(reason)


if __name__ == "__main__":
    main()
