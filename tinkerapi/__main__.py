"""``python -m tinkerapi``: the ``tinkerapi`` command."""

from tinkerapi.cli import main

main()
