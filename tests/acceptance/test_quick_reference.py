"""The quick reference, word for word: its code is read from the page and run.

Only the address changes: ``localhost:8000`` becomes the port of the server under test.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
from typing import Any

import pytest

from tests.server import ROOT, Server

pytestmark = pytest.mark.acceptance

PAGE = (ROOT / "tinkerapi" / "docs" / "quick-reference.md").read_text()


def code_blocks(language: str, server: Server) -> list[str]:
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)
    return [block.replace("localhost:8000", f"localhost:{server.port}") for block in blocks]


def curl_commands(server: Server) -> list[str]:
    [block] = code_blocks("bash", server)
    joined = block.replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.startswith("curl")]


def run_curl(command: str) -> tuple[int, Any]:
    """Status and JSON of one of the page's curl lines."""
    arguments = [*shlex.split(command), "-s", "-w", "\n%{http_code}"]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    body, _, status = output.rpartition("\n")
    return int(status), json.loads(body)


def test_the_three_templates_run(server: Server) -> None:
    sync, asynchronous, batched = code_blocks("python", server)
    names: dict[str, Any] = {}
    exec(sync, names)  # noqa: S102  the page's own code
    sync_loss = names["loss"]
    assert math.isfinite(sync_loss)
    exec(asynchronous, names)  # noqa: S102
    assert names["loss"] == pytest.approx(sync_loss, rel=1e-6)
    names["batches"] = [
        [
            [
                {"role": "user", "content": f"What is {i} + {i}?"},
                {"role": "assistant", "content": "?"},
            ]
        ]
        for i in range(3)
    ]
    exec(batched, names)  # noqa: S102
    assert len(names["results"]) == 3
    assert all(math.isfinite(result["loss"]) for result in names["results"])


def test_the_curl_commands_run(server: Server) -> None:
    endpoints, submit, retrieve = curl_commands(server)
    status, front = run_curl(endpoints)
    assert status == 200
    assert "/api/v1/forward_backward_async" in json.dumps(front)
    status, future = run_curl(submit)
    assert status == 200
    assert future["model_id"] == "test"
    assert re.fullmatch(r"future_[0-9a-f]{32}", future["request_id"])
    status, unknown = run_curl(retrieve)
    assert status == 404
    assert "future_abc123" in unknown["detail"]
    assert server.retrieve(future["request_id"]).json()["num_samples"] == 1
    status, result = run_curl(retrieve.replace("future_abc123", future["request_id"]))
    assert status == 200
    assert math.isfinite(result["loss"])


@pytest.mark.parametrize("line", re.findall(r"^POST (\S+)", PAGE, flags=re.MULTILINE))
def test_every_endpoint_of_the_cheat_sheet_exists(server: Server, line: str) -> None:
    answer = server.post(line)
    # An empty body is refused by a route that exists; 404 or 405 would mean that none does.
    assert answer.status_code in (200, 400)
    assert "detail" in answer.json() or answer.status_code == 200


def test_training_lowers_the_loss_and_the_model_says_what_it_learned(server: Server) -> None:
    conversation = [
        {"role": "user", "content": "What is the secret word?"},
        {"role": "assistant", "content": "The secret word is pineapple."},
    ]
    losses = []
    for _ in range(8):
        step = server.post(
            "/api/v1/forward_backward",
            model_id="learner",
            data=[conversation],
            loss_fn="cross_entropy",
        )
        losses.append(step.json()["loss"])
        done = server.post(
            "/api/v1/optim_step", model_id="learner", adam_params={"learning_rate": 1e-3}
        )
        assert done.status_code == 200, done.text
    assert losses[-1] < losses[0] / 4
    sample = server.post(
        "/api/v1/sample",
        model_id="learner",
        messages=conversation[:1],
        sampling_params={"max_tokens": 12, "temperature": 0},
    ).json()
    assert "pineapple" in sample["generated_text"]
    assert sample["sequences"][0]["stop_reason"] == "stop"
