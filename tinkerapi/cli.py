"""The command lines: ``tinkerapi`` has our commands, ``manage.py`` Django's too."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import metadata

GROUPS = {
    "Run": {
        "up": "start and supervise everything",
        "doctor": "check each part and print a line for each",
        "preparemodel": "make the folder of a base model",
        "worker": "start workers on this machine for a server on another one",
        "engineworker": "serve one base model; `up` and `worker` start these",
        "webhook": "send events to a receiver; `up` starts it where one is set",
    },
    "People": {"createapikey": "make a key for a user, and print it once"},
    "Requests and runs": {
        "watch": "show runs, or one run's curves, until it ends",
        "replayfuture": "submit requests again, as new futures",
        "replayrun": "rebuild a run from its log, and compare",
        "crashdrill": "kill a server's parts, and compare with an undisturbed run",
    },
    "Data": {
        "importpeft": "make a checkpoint of an adapter that peft has trained",
        "backup": "write database and files to a new folder",
        "restore": "fill a new data folder from a backup",
        "prunefutures": "delete old payloads and results",
        "sweepfiles": "list or delete folders that no row refers to",
    },
}
"""Our commands with descriptions for ``tinkerapi help``, which does not load Django."""

_DO_NOT_SAY_IT = ("up", "preparemodel", "engineworker", "webhook", "crashdrill")
"""Commands that do not print the data folder: ``up`` prints it among its lines and starts the next
three; the last makes its own folder."""

SHELLS = {
    "bash": 'complete -W "{words}" tinkerapi',
    "zsh": "compctl -k '({words})' tinkerapi",
    "fish": "complete -c tinkerapi -n __fish_use_subcommand -f -a '{words}'",
}
"""The shell code that completes the names of our commands."""


def main() -> None:
    """The ``tinkerapi`` command: our commands only."""
    arguments = sys.argv[1:]
    name = arguments[0] if arguments else "help"
    names = [name for group in GROUPS.values() for name in group]
    if name in ("--version", "version"):
        print(f"tinkerapi {metadata.version('tinkerapi')}")  # noqa: T201
    elif name in ("-h", "--help", "help") and len(arguments) < 2:
        print(_help())  # noqa: T201
    elif name == "completion":
        print(_completion(arguments[1:], names))  # noqa: T201
    elif name in names:
        run(["tinkerapi", *arguments])
    elif name == "help":
        run(["tinkerapi", arguments[1], "--help"])
    else:
        near = get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; `tinkerapi help` lists the commands"
        sys.exit(f"there is no command {name!r}{hint}")


def run(arguments: Sequence[str]) -> None:
    """Run one command of Django's command line, ours or Django's own.

    Args:
        arguments: As ``sys.argv``: the program's name first.

    Raises:
        SystemExit: A setting is invalid, or Postgres does not answer; with a message.
    """
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tinkerapi.settings")
    arguments = _take_config(arguments)
    import psycopg
    from django.core.exceptions import ImproperlyConfigured
    from django.core.management import execute_from_command_line
    from django.db import OperationalError

    try:
        _say_data_folder(arguments)
        execute_from_command_line(arguments)
    except ImproperlyConfigured as error:  # an invalid setting
        sys.exit(str(error))
    except (OperationalError, psycopg.OperationalError) as error:
        from tinkerapi.server.upgrade import database_down_reason

        # Without ``up`` the embedded Postgres does not run: print a message, not a traceback.
        reason = database_down_reason(error)
        if reason is None:
            raise
        sys.exit(reason)


def _say_data_folder(arguments: Sequence[str]) -> None:
    """Print the data folder of one of our commands, on standard error."""
    from django.conf import settings

    name = arguments[1] if len(arguments) > 1 else ""
    works_on_it = any(name in group for group in GROUPS.values()) and name not in _DO_NOT_SAY_IT
    if works_on_it and not {"-h", "--help"} & set(arguments):
        sys.stderr.write(f"data folder {settings.DATA_DIR}\n")


def _take_config(arguments: Sequence[str]) -> list[str]:
    """Turn ``--config FILE`` of any command into TINKERAPI_CONFIG, since settings are read before
    the command parses its arguments."""
    rest: list[str] = []
    values = iter(arguments)
    for argument in values:
        option, is_assigned, file = argument.partition("=")
        if option != "--config":
            rest.append(argument)
            continue
        file = file if is_assigned else next(values, "")
        if not file:
            sys.exit("--config: expected a file")
        os.environ["TINKERAPI_CONFIG"] = file
    return rest


def _help() -> str:
    lines = ["A self-hosted training API for LoRA fine-tuning.", ""]
    for group, commands in GROUPS.items():
        lines += [group, *(f"  {name:14} {does}" for name, does in commands.items()), ""]
    lines += [
        "tinkerapi COMMAND --help has details. Each takes --config FILE: base models, as TOML.",
        "tinkerapi completion SHELL prints shell code that completes these names.",
    ]
    return "\n".join(lines)


def _completion(arguments: Sequence[str], names: Sequence[str]) -> str:
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        sys.exit(f"completion: expected one of {', '.join(SHELLS)}")
    return SHELLS[arguments[0]].format(words=" ".join(names))
