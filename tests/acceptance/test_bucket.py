"""Servers and workers that share a bucket and a database, and no folder."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.server import ROOT, Server, free_port
from tests.storage.faulty_proxy import FaultyProxy, faulty_proxy
from tests.storage.s3_server import KEYS, s3_server
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS, wait_for
from tinkerapi.drill.server import connect
from tinkerapi.server.postgres import embedded_database

pytestmark = pytest.mark.acceptance

STEPS = 2
RUNS = 4


@pytest.fixture(scope="module")
def line() -> Iterator[FaultyProxy]:
    with s3_server() as s3:
        s3.make_bucket("training")
        with faulty_proxy(s3.port) as proxy:
            yield proxy


@pytest.fixture(scope="module")
def server(start_server: Callable[..., Server], line: FaultyProxy, tmp_path_factory: Any) -> Server:
    return start_server(
        TINKERAPI_BASE_MODEL=str(make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")),
        TINKERAPI_NUM_THREADS="1",
        TINKERAPI_STORAGE="s3://training/of/tests",
        AWS_ENDPOINT_URL=line.url,
        **KEYS,
    )


def add_run(server: Server, model_id: str) -> None:
    server.post("/api/v1/add_lora", model_id=model_id, rank=4, seed=1)


def train(server: Server, model_id: str) -> list[Any]:
    """Train a run for some steps; its losses."""
    ids = server.submit_steps(model_id, STEPS, learning_rate=0.01)
    return [result["loss"] for result in server.results(ids)[::2]]


def train_all(server: Server, names: list[str]) -> list[list[Any]]:
    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(lambda name: train(server, name), names))


def live_workers(server: Server) -> int:
    answer = requests.get(f"{server.url}/readyz", timeout=LONG_SECONDS).json()
    return sum(answer["workers"].values())


def leased(server: Server) -> list[int]:
    """How many runs each worker has."""
    with connect(server.data_dir) as database:
        rows = database.execute(
            "SELECT count(*) FROM futures_lane WHERE worker_id IS NOT NULL GROUP BY worker_id"
        )
        return [number for (number,) in rows]


def elsewhere(server: Server, folder: Path, **changes: str) -> dict[str, str]:
    """The environment of another machine with an empty data folder."""
    database = embedded_database(server.data_dir)
    folder.mkdir(exist_ok=True)
    return {
        **server.full_environment(),
        "TINKERAPI_DATA_DIR": str(folder),
        "TINKERAPI_SECRET_KEY": (server.data_dir / "secret_key").read_text().strip(),
        "DATABASE_URL": f"postgresql://{database['USER']}@/{database['NAME']}"
        f"?host={database['HOST']}&port={database['PORT']}",
        **changes,
    }


def join(environment: dict[str, str], *arguments: str) -> list[str]:
    return [sys.executable, "manage.py", "worker", "--join", *arguments]


def test_runs_move_between_machines_that_share_only_the_bucket(
    server: Server, tmp_path: Path
) -> None:
    add_run(server, "reference")
    expected = [train(server, "reference"), train(server, "reference")]

    environment = elsewhere(server, tmp_path / "elsewhere")
    for changes, named in (
        (
            {"TINKERAPI_STORAGE": "s3://training/another"},
            "storage: s3://training/another here, s3://training/of/tests at the workers",
        ),
        ({"TINKERAPI_STORAGE": ""}, "storage: the data folder here, s3://training/of/tests at"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer"),
    ):
        refused = subprocess.run(
            join(environment, "--check"),
            cwd=ROOT,
            env={**environment, **changes},
            capture_output=True,
            text=True,
            check=False,
        )
        assert refused.returncode == os.EX_CONFIG
        assert named in refused.stderr

    names = [f"run-{number}" for number in range(RUNS)]
    with subprocess.Popen(join(environment), cwd=ROOT, env=environment) as joined:
        wait_for(lambda: live_workers(server) == 2)
        for name in names:
            add_run(server, name)
        assert train_all(server, names) == [expected[0]] * RUNS
        assert len(leased(server)) == 2
        joined.send_signal(signal.SIGTERM)
        assert joined.wait(LONG_SECONDS) == 0
    assert train_all(server, names) == [expected[1]] * RUNS
    assert not (server.data_dir / "snapshots").exists()
    assert not (server.data_dir / "checkpoints").exists()


def test_what_is_downloaded_is_what_was_saved_or_visibly_broken(
    server: Server, line: FaultyProxy
) -> None:
    add_run(server, "down")
    saved = server.post("/api/v1/save_weights_external", model_id="down", name="x").json()
    assert saved["path"] == "tinker://down/external_weights/x"
    export = f"{server.url}/api/v1/training_runs/down/checkpoints/external_weights/x"
    urls = requests.get(f"{export}/external_weights_urls", timeout=60).json()["urls"]
    files = {name: requests.get(url, timeout=60).content for name, url in urls.items()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    part = requests.get(
        urls["adapter_model.safetensors"], headers={"Range": "bytes=5-9"}, timeout=60
    )
    assert part.content == files["adapter_model.safetensors"][5:10]

    archive = requests.get(f"{export}/archive", timeout=60).json()["url"]
    with tarfile.open(fileobj=io.BytesIO(requests.get(archive, timeout=60).content)) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == files  # type: ignore[union-attr]

    line.cut("down", after_bytes=20_000)
    try:
        with pytest.raises(requests.RequestException):
            requests.get(archive, timeout=600)
    finally:
        line.recover()
    assert requests.get(archive, timeout=60).status_code == 200


def test_a_worker_killed_in_the_middle_of_an_upload_saves_again(
    server: Server, line: FaultyProxy
) -> None:
    add_run(server, "killed")
    expected = train(server, "killed")
    line.stall("up", after_bytes=5000)
    body = {"model_id": "killed", "name": "kept"}
    request_id = server.post("/api/v1/save_weights_async", **body).json()["request_id"]
    wait_for(lambda: line.faults)
    os.kill(server.worker_pid(), signal.SIGKILL)
    line.recover()
    assert server.retrieve(request_id).json()["path"] == "tinker://killed/weights/kept"

    other = f"run-{uuid.uuid4().hex}"
    add_run(server, other)
    path = {"path": "tinker://killed/weights/kept"}
    assert server.post("/api/v1/load_weights", model_id=other, **path).status_code == 200
    assert train(server, "killed") == train(server, other) != expected


def test_the_doctor_names_the_storage(server: Server) -> None:
    doctor = server.manage("doctor", "--no-color")
    assert "s3://training/of/tests, that of the workers" in doctor.stdout
    assert doctor.returncode == 0, doctor.stdout


def test_up_does_not_start_without_a_bucket_of_its_own(
    server: Server, line: FaultyProxy, tmp_path: Path
) -> None:
    model_id = f"run-{uuid.uuid4().hex}"
    add_run(server, model_id)
    saved = server.post("/api/v1/save_weights", model_id=model_id, name="kept")
    assert saved.status_code == 200, saved.text
    environment = {**server.full_environment(), "TINKERAPI_DATA_DIR": str(tmp_path / "new")}
    taken = requests.put(f"{line.url}/training/new/installation", b"of another server", timeout=60)
    assert taken.status_code == 200
    for url, sentence in (
        ("s3://nothing-here/x", "has no bucket 'nothing-here'; make it, or correct"),
        ("s3://training/new", "its object 'installation' has the id of another server, and this"),
        ("s3://training/of/tests", "give each server a prefix of its own"),
    ):
        refused = subprocess.run(
            [sys.executable, "manage.py", "up", "--port", str(free_port())],
            cwd=ROOT,
            env={**environment, "TINKERAPI_STORAGE": url},
            capture_output=True,
            text=True,
            check=False,
            timeout=LONG_SECONDS,
        )
        assert refused.returncode == 1
        assert "TINKERAPI_STORAGE: s3://" in refused.stderr
        assert sentence in refused.stderr
