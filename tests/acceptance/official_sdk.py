"""Runs the official tinker SDK in a separate process, like a user's script.

Warnings are errors in our own process and the SDK's code is not ours; and a script that ends is
the only way to see that the SDK lets its process end.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tests.server import Server

SCRIPT_SECONDS = 300

_PROLOGUE = """
import json, os, time, warnings
warnings.simplefilter("ignore")  # the SDK's own deprecations
import tinker
from tinker import types

BASE_MODEL = os.environ["BASE_MODEL"]

def report(**facts):
    print("REPORT " + json.dumps(facts), flush=True)

def datum(tokens, weights=None):
    targets = tokens[1:]
    weights = [1.0] * len(targets) if weights is None else weights
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )

def failure(future):
    try:
        future.result()
    except tinker.RequestFailedError as error:
        return [str(error), str(error.category)]
    return None

service = tinker.ServiceClient()

def new_model(**more):
    return service.create_lora_training_client(base_model=BASE_MODEL, rank=8, **more).result()
"""
"""The beginning of every script."""

_EPILOGUE = """
service.close("success").result()
print("END", flush=True)
"""
"""How it ends; a process that ends with requests under way may be aborted by its libraries."""

_ENDED = (0, -signal.SIGABRT)
"""How a process may end that has said END: a thread of the SDK or of torch that still runs while
Python takes itself apart can abort it (seen once in some hundred scripts)."""


def api_key(server: Server) -> str:
    """The first key, which ``up`` has shown once."""
    found = re.search(r"tml-\S+", server.log())
    assert found is not None, server.log()
    return found.group()


def environment(server: Server, **more: str) -> dict[str, str]:
    """A user's, with the server's address and a key."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(server.data_dir),  # so that no credentials of a person are read
        "TINKER_BASE_URL": server.url,
        "TINKER_API_KEY": api_key(server),
        "BASE_MODEL": Path(server.environment["TINKERAPI_BASE_MODEL"]).name,
        "OMP_NUM_THREADS": "1",
        **more,
    }


def start_script(server: Server, script: str, **more: str) -> subprocess.Popen[str]:
    """Start a script; it answers by ``report(name=value)``."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROLOGUE + textwrap.dedent(script) + _EPILOGUE],
        env=environment(server, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish_script(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The script's report, after it has ended successfully."""
    output, _ = process.communicate(timeout=SCRIPT_SECONDS)
    assert process.returncode in _ENDED, output
    assert "END" in output.splitlines(), output
    facts: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("REPORT "):
            facts |= json.loads(line.removeprefix("REPORT "))
    return facts


def run_script(server: Server, script: str, **more: str) -> dict[str, Any]:
    """Run a script to its end and return what it reported."""
    return finish_script(start_script(server, script, **more))


def run_cli(server: Server, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The ``tinker`` command.

    Its HTTP library may abort the process at its exit, after the whole answer and without a word
    (seen with 0.38.0 on a busy machine); that counts as success.
    """
    done = subprocess.run(
        [str(Path(sys.executable).with_name("tinker")), *arguments],
        env=environment(server, **more),
        capture_output=True,
        text=True,
        timeout=SCRIPT_SECONDS,
    )
    if done.returncode == -signal.SIGABRT and done.stdout and not done.stderr:
        done.returncode = 0
    return done
