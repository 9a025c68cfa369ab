"""The first minutes: the examples and the front page's code run as they are, on a tiny model.

Its weights are random, so the learning rate is larger than the examples' own.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from tests.acceptance.official_sdk import api_key
from tests.environment import clean_environment
from tests.server import ROOT, Server

pytestmark = pytest.mark.acceptance

EXAMPLES = ROOT / "tinkerapi" / "docs" / "examples"
TESTED = {"sft_requests.py", "sft_sdk.py", "rl.py", "first_steps.ipynb"}
MONITORING = {"grafana.json"}
"""Tested in ``tests/platform/test_prometheus.py``."""


def run_example(server: Server, code: Path | str, **environment: str) -> str:
    """The output of a program that a user starts beside the base model's folder."""
    folder = Path(server.environment["TINKERAPI_BASE_MODEL"])
    arguments = [str(code)] if isinstance(code, Path) else ["-c", code]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={
            **clean_environment(),
            "TINKER_BASE_URL": server.url,
            "TINKER_API_KEY": api_key(server),
            **environment,
        },
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, -6), done.stdout + done.stderr
    return done.stdout


def numbers(output: str, name: str) -> list[float]:
    return [float(number) for number in re.findall(rf"{name} +([\d.]+)", output)]


def test_every_example_is_tested_and_listed() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == (TESTED | MONITORING)
    listed = (EXAMPLES.parent / "examples.md").read_text()
    assert all(f"(examples/{name})" in listed for name in TESTED)


@pytest.mark.parametrize("name", ["sft_requests.py", "sft_sdk.py"])
def test_fine_tuning_lowers_the_loss(sdk_server: Server, name: str) -> None:
    output = run_example(sdk_server, EXAMPLES / name, STEPS="10", LEARNING_RATE="2e-2")

    losses = numbers(output, "loss")
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    assert "What is the secret word? -> " in output


def test_reinforcement_learning_raises_the_reward(sdk_server: Server) -> None:
    output = run_example(
        sdk_server, EXAMPLES / "rl.py", STEPS="14", GROUP="16", LEARNING_RATE="5e-2"
    )

    rewards = numbers(output, "reward")
    assert len(rewards) == 14
    assert sum(rewards[-3:]) > 3 * sum(rewards[:3])


def test_the_notebook_runs(sdk_server: Server) -> None:
    cells = json.loads((EXAMPLES / "first_steps.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    report = "print('LOSS', losses[0], losses[-1]); print('PATH', saved['path'])"

    output = run_example(sdk_server, "\n".join([*code, report]), LEARNING_RATE="2e-2")

    first, last = map(float, re.findall(r"^LOSS (\S+) (\S+)$", output, flags=re.MULTILINE)[0])
    assert last < first
    assert "PATH tinker://notebook/" in output


def test_the_front_pages_code_runs_as_it_is_shown(sdk_server: Server) -> None:
    page = requests.get(f"{sdk_server.url}/", headers={"Accept": "text/html"}, timeout=60)
    assert "script-src 'self'" in page.headers["Content-Security-Policy"]
    curl, python, sdk = map(
        html.unescape, re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", page.text, flags=re.DOTALL)
    )

    answer = subprocess.run(
        ["/bin/sh", "-c", curl], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(answer)["loss"] > 0
    losses = [
        float(line.split()[1]) for line in run_example(sdk_server, python).strip().splitlines()
    ]
    assert losses[-1] < losses[0]
    ask = "\nprint(client.get_info().model_id)\nservice.close('success').result()"
    sdk = sdk.replace("tml-...", api_key(sdk_server))
    assert ":train:0" in run_example(sdk_server, sdk + ask)
