"""``manage.py up`` as a whole: it answers, it recovers, and it leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.acceptance.official_sdk import api_key
from tests.platform.processes import is_running
from tests.server import Server, free_port
from tests.tiny_model import make_tiny_model
from tests.waiting import LONG_SECONDS, wait_for

pytestmark = pytest.mark.acceptance

Start = Callable[[], Server]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def start(start_server: Callable[..., Server], tiny_model: Path) -> Start:
    """A new server on the tiny model; its worker is ready once torch is loaded."""
    return lambda: start_server(TINKERAPI_BASE_MODEL=str(tiny_model))


def children(pid: int) -> set[int]:
    """The processes that ``pid`` has started and that live."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended while we looked
            continue
        if int(parent) == pid and state != "Z":
            found.add(int(stat.parent.name))
    return found


def family(pid: int) -> set[int]:
    """``pid`` and everything below it."""
    return {pid}.union(*(family(child) for child in children(pid)))


def started_at(pid: int) -> int:
    """In clock ticks since the machine started."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def none_is_running(pids: set[int]) -> bool:
    return not any(is_running(pid) for pid in pids)


def test_up_heals_what_dies_and_stops_without_a_trace(
    start_server: Callable[..., Server], tiny_model: Path
) -> None:
    server = start_server(
        TINKERAPI_BASE_MODEL=str(tiny_model),
        TINKERAPI_ALLOWED_HOSTS="train.example",  # also of up and doctor, which ask by loopback
    )
    wait_for(lambda: "ready after" in server.log())
    for host, status in (("train.example", 200), ("elsewhere.example", 400)):
        named = requests.get(f"{server.url}/readyz", headers={"Host": host}, timeout=LONG_SECONDS)
        assert named.status_code == status
    assert requests.get(f"{server.url}/healthz", timeout=LONG_SECONDS).json() == {"status": "ok"}
    style = requests.get(f"{server.url}/static/admin/css/base.css", timeout=LONG_SECONDS)
    assert style.status_code == 200
    assert requests.get(f"{server.url}/admin/login/", timeout=LONG_SECONDS).status_code == 200
    assert server.process is not None
    up = server.process.pid
    everyone = family(up)
    assert len(children(up)) == 3, "Postgres, web and one worker"

    second_up = server.manage("up", "--port", str(server.port))
    assert second_up.returncode == 1
    [sentence] = second_up.stderr.splitlines()
    assert f"already running on {server.data_dir} (process {up}, " in sentence

    doctor = server.manage("doctor", "--no-color")
    verdicts = {line.split()[0] for line in doctor.stdout.splitlines()}
    assert (doctor.returncode, verdicts) == (0, {"ok"}), doctor.stdout + doctor.stderr

    worker = max(children(up), key=started_at)  # the last part that ``up`` starts
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: "worker tiny was ended by SIGKILL; starting it again" in server.log())
    wait_for(lambda: len(children(up)) == 3)
    trained = requests.post(
        f"{server.url}/api/v1/add_lora",
        json={"model_id": "after", "rank": 2},
        headers={"X-API-Key": api_key(server)},  # a server with a public name asks for one
        timeout=LONG_SECONDS,
    )
    assert trained.status_code == 200, "the new worker does the work"
    wait_for(lambda: server.log().splitlines()[-1] == "ready again")
    assert server.log().count("ready after") == 1

    everyone |= family(up)
    server.stop()
    assert none_is_running(everyone)
    assert server.log().splitlines()[-1] == "stopped"


def test_a_model_that_can_never_be_loaded_ends_up_with_the_workers_sentence(
    tiny_model: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    (tmp_path / "data").mkdir()
    server = Server(tmp_path / "data", free_port(), {"TINKERAPI_BASE_MODEL": str(broken)})

    up = server.manage("up", "--port", str(server.port))

    assert up.returncode == 1
    [sentence] = up.stderr.splitlines()
    assert f"worker broken: No model can be read from {broken}: ZeroDivisionError" in sentence
    assert "starting it again" not in up.stdout


def test_a_killed_up_takes_everything_along_and_the_next_one_finds_it_all(start: Start) -> None:
    server = start()
    [key] = re.findall(r"tml-\S+", server.log())
    assert server.log().count("password") == 1
    assert server.process is not None
    everyone = family(server.process.pid)
    server.process.kill()
    server.process.wait()
    server.spawn()  # at once, while the children of the killed one are still ending
    wait_for(lambda: none_is_running(everyone))
    server.wait_until("/readyz")

    assert server.log().count("tml-") == server.log().count("password") == 1
    assert "database  up to date" in server.log()
    adapters = f"{server.url}/api/v1/adapters"
    assert (
        requests.get(adapters, headers={"X-API-Key": key}, timeout=LONG_SECONDS).status_code == 200
    )
    wrong = requests.get(adapters, headers={"X-API-Key": key + "x"}, timeout=LONG_SECONDS)
    assert wrong.status_code == 401
    server.stop()


def test_other_users_of_the_machine_can_read_nothing_that_a_server_writes(
    tiny_model: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    data_dir.chmod(0o755)  # as an older version left it
    settings = {"TINKERAPI_BASE_MODEL": str(tiny_model), "TINKERAPI_SNAPSHOT_SECONDS": "0"}
    server = Server(data_dir, free_port(), settings)
    server.start()
    try:
        server.results(server.submit_steps("m", 2, learning_rate=0.1))
        for path in ("save_weights", "save_weights_for_sampler"):
            assert server.post(f"/api/v1/{path}", model_id="m", name="kept").status_code == 200
        wait_for(lambda: list((data_dir / "snapshots").iterdir()))
        backup = server.manage("backup", str(tmp_path / "backup"))
        assert backup.returncode == 0, backup.stderr
    finally:
        server.stop()

    written = [path for folder in (data_dir, tmp_path / "backup") for path in folder.rglob("*")]
    folders = {path.name for path in written}
    assert {"checkpoints", "snapshots", "logs", "postgres", "secret_key", "static"} <= folders
    paths = [data_dir, tmp_path / "backup", *written]
    assert [str(path) for path in paths if path.lstat().st_mode & 0o077] == []
    assert f"data      {data_dir} is now closed to other users" in server.log()
