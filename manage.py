#!/usr/bin/env python3
"""The command line of a checkout; ``python3 manage.py up`` installs and starts everything."""

import sys


def main():
    if sys.version_info < (3, 11):  # noqa: UP036 (for an older Python)
        sys.exit("Python 3.11 or later is needed; this is " + sys.version.split()[0])
    from tinkerapi.server.bootstrap import ensure_installed

    ensure_installed(sys.argv)
    from tinkerapi.cli import run

    run(sys.argv)


if __name__ == "__main__":
    main()
