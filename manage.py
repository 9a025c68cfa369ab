#!/usr/bin/env python
"""The command line of a checkout; ``python manage.py up`` starts everything."""

import sys

from tinkerapi.cli import run

if __name__ == "__main__":
    run(sys.argv)
