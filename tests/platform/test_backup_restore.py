"""A backup of a server at work, restored somewhere else: its runs continue with the same bits."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.server import Server, free_port
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS

pytestmark = pytest.mark.acceptance


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Settings of both servers: the same small model, and frequent snapshots."""
    return {
        "TINKERAPI_BASE_MODEL": str(make_tiny_model(tmp_path / "tiny")),
        "TINKERAPI_DTYPE": "float32",
        "TINKERAPI_NUM_THREADS": "1",
        "TINKERAPI_SNAPSHOT_SECONDS": "0",
    }


@pytest.fixture
def servers(tmp_path: Path, environment: dict[str, str]) -> Iterator[tuple[Server, Server]]:
    """Two places for a server; running ones are stopped at the end."""
    made = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        made.append(Server(tmp_path / name, free_port(), environment))
    yield made[0], made[1]
    for server in made:
        server.stop()


def submit(server: Server, steps: range) -> list[str]:
    """Steps of one run, with a checkpoint named after each tenth; the ids of the futures."""
    ids = []
    for step in steps:
        text = f"what is {step} times {step}?"
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": str(step**2)}]
        asked: list[tuple[str, dict[str, Any]]] = [
            ("/fwdbwd", {"data": [turns]}),
            ("/optim_step", {"adam_params": {"learning_rate": 1e-2}}),
        ]
        if step % 10 == 0:
            asked.append(("/save_weights", {"name": f"step-{step}"}))
        for path, fields in asked:
            answer = server.post(path, model_id="m", **fields)
            assert answer.status_code == 200, answer.text
            ids.append(answer.json()["request_id"])
    return ids


def results(server: Server, ids: list[str]) -> list[Any]:
    answers = [server.retrieve(request_id) for request_id in ids]
    assert [answer.status_code for answer in answers] == [200] * len(ids)
    return [answer.json() for answer in answers]


def saved(server: Server, name: str) -> dict[str, bytes]:
    """Save the run under a name; the files that were written, meta.json apart from its times."""
    before = set((server.data_dir / "checkpoints").iterdir())
    request_id = server.post("/save_weights", model_id="m", name=name).json()["request_id"]
    assert server.retrieve(request_id).status_code == 200
    [folder] = set((server.data_dir / "checkpoints").iterdir()) - before
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_backup_of_a_server_at_work_goes_on_elsewhere_to_the_bit(
    servers: tuple[Server, Server], tmp_path: Path
) -> None:
    here, there = servers
    here.start()
    before = submit(here, range(15))
    results(here, before[:20])
    worker = here.worker_pid()
    os.kill(worker, signal.SIGSTOP)  # so that some are surely open when the backup is made
    before += submit(here, range(15, 25))

    made = here.manage("backup", str(tmp_path / "backup"))

    assert made.returncode == 0, made.stderr
    os.kill(worker, signal.SIGCONT)
    after = submit(here, range(25, 30))
    unbroken = results(here, before + after)
    weights = saved(here, "end")
    here.stop()

    restored = there.manage("restore", str(tmp_path / "backup"))
    assert restored.returncode == 0, restored.stderr
    states = Counter(states_in(there))
    assert states["ready"] >= 20
    assert states["pending"] >= 20
    there.start()

    # The client repeats requests that the backup did not have yet.
    assert there.post("/retrieve_future", request_id=after[0]).status_code == 404
    assert results(there, before + submit(there, range(25, 30))) == unbroken
    assert saved(there, "end") == weights
    loading = {"model_id": "m", "path": "tinker://m/weights/step-0"}
    answer = requests.post(f"{there.url}/load_weights", json=loading, timeout=LONG_SECONDS)
    results(there, [answer.json()["request_id"]])


def states_in(server: Server) -> list[str]:
    """The states of all futures in a data folder whose server does not run."""
    script = (
        "import json;from django.conf import settings;"
        "from tinkerapi.server.postgres import EmbeddedPostgres;from futures.models import Future\n"
        "with EmbeddedPostgres(settings.DATA_DIR):"
        " print(json.dumps(list(Future.objects.values_list('state', flat=True))))"
    )
    answer = server.manage("shell", "--no-imports", "--command", script)
    states: list[str] = json.loads(answer.stdout)
    return states


def test_a_folder_in_use_is_not_restored_over(
    servers: tuple[Server, Server], tmp_path: Path
) -> None:
    here, _ = servers
    backup = tmp_path / "backup"
    backup.mkdir()
    refused = here.manage("restore", str(backup))
    assert refused.returncode == 1
    assert "is not a complete backup" in refused.stderr

    fields = {"made_at": "", "version": "", "base_models": [], "folders": 0, "size_bytes": 0}
    (backup / "backup.json").write_text(json.dumps(fields))
    (here.data_dir / "checkpoints").mkdir()
    refused = here.manage("restore", str(backup))
    assert refused.returncode == 1
    assert "is in use, it has checkpoints" in refused.stderr


def test_without_a_database_there_is_no_backup(
    servers: tuple[Server, Server], tmp_path: Path
) -> None:
    refused = servers[0].manage("backup", str(tmp_path / "backup"))
    assert refused.returncode == 1
    assert "start it with" in refused.stderr
    assert not (servers[0].data_dir / ".backup").exists()
