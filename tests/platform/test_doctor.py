"""The doctor: each part on its own, healthy, broken, and simply not running."""

from __future__ import annotations

import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from io import StringIO
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.utils import timezone
from pytest_django import Settings

from futures.models import Worker
from futures.services import future_submit
from tests.base_models import base_model_configs
from tests.platform.model_folders import make_model_folder
from tinkerapi.server import doctor, joining
from tinkerapi.server.doctor import Finding, Verdict
from tinkerapi.server.preflight import RunningServer
from tinkerapi.services import api_key_create
from training.base_models import ServedBaseModel, base_model_of, base_models
from training.devices import count_cores
from training.services.installation import storage_id_ensure
from training.worker.agreement import FIGURE, worker_facts
from training.worker.crash_log import crash_file

CORES = count_cores()

SERVER = RunningServer(pid=1, host="127.0.0.1", port=9)


@pytest.fixture
def base_model() -> ServedBaseModel:
    return base_models()[0]


@pytest.fixture
def start_worker_row(base_model: ServedBaseModel) -> Callable[..., Worker]:
    def start(**fields: object) -> Worker:
        return Worker.objects.create(
            **{"queue": base_model.queue, "state": "live", "hostname": "h", "pid": 7, **fields}
        )

    return start


def first_of(findings: Iterator[Finding]) -> Finding:
    return next(iter(findings))


def test_every_package_that_is_required_is_found_to_fit() -> None:
    python, packages = doctor.check_packages()

    assert python.verdict is Verdict.OK
    assert packages.verdict is Verdict.OK, packages.detail


def test_missing_and_unfit_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["django>=99", "no-such-package>=1", "ruff>=99 ; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)

    _, packages = doctor.check_packages()

    assert packages.verdict is Verdict.FAILED
    assert "django>=99 is wanted, 5." in packages.detail
    assert "no-such-package>=1 is missing" in packages.detail
    assert "ruff" not in packages.detail


def test_a_data_folder_that_is_not_there_yet_is_no_fault(
    settings: Settings, tmp_path: Path
) -> None:
    settings.DATA_DIR = tmp_path / "new"

    finding = doctor.check_data_folder()

    assert finding.verdict is Verdict.OK
    assert "will make it" in finding.detail
    assert not list(tmp_path.iterdir()), "looking must leave nothing behind"


def test_a_disk_without_room_is_a_fault(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.DATA_DIR = tmp_path
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(0, 0, 2**28))

    finding = doctor.check_data_folder()

    assert finding.verdict is Verdict.FAILED
    assert "only 0.2 GiB free" in finding.detail


def test_a_base_model_is_whole_absent_or_broken(tmp_path: Path) -> None:
    def check(name: str) -> Finding:
        return doctor.check_base_model(base_model_of(*base_model_configs(name), tmp_path))

    make_model_folder(tmp_path / "whole")
    assert check(str(tmp_path / "whole")).verdict is Verdict.OK
    assert check(str(tmp_path / "gone")).verdict is Verdict.FAILED
    assert check(doctor.DEFAULT_MODEL_NAME).verdict is Verdict.OFF, "up will make it"


def test_a_torch_that_cannot_be_imported_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DEVICE_PROGRAM", "raise ImportError('libcudart.so not found')")

    finding = doctor.check_device()

    assert finding.verdict is Verdict.FAILED
    assert finding.detail.endswith("ImportError: libcudart.so not found")


@pytest.mark.parametrize(
    ("gpus", "device", "verdict", "detail"),
    [
        (["H100, 80 GiB"], "auto", Verdict.OK, "H100, 80 GiB"),
        ([], "auto", Verdict.OK, f"CPU, up to {CORES} thread{'s' * (CORES > 1)} for a worker"),
        ([], "cuda", Verdict.FAILED, "some/model is for cuda and torch sees no GPU"),
    ],
)
def test_the_device_is_the_one_that_was_asked_for(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    gpus: list[str],
    device: str,
    verdict: Verdict,
    detail: str,
) -> None:
    settings.BASE_MODELS = base_model_configs("some/model", device=device)
    answer = f"import json; print(json.dumps({{'torch': '2', 'gpus': {gpus}}}))"
    monkeypatch.setattr(doctor, "DEVICE_PROGRAM", answer)

    finding = doctor.check_device()

    assert finding.verdict is verdict
    assert detail in finding.detail


def test_the_threads_are_those_that_the_worker_will_use(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = "import json; print(json.dumps({'torch': '2', 'gpus': []}))"
    monkeypatch.setattr(doctor, "DEVICE_PROGRAM", answer)

    settings.NUM_THREADS = 0
    assert f"CPU, up to {CORES} thread" in doctor.check_device().detail
    settings.NUM_THREADS = 4
    assert "CPU, 4 threads for a worker" in doctor.check_device().detail


def test_the_device_line_sets_the_instruction_sets_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "import json; print(json.dumps({'torch': '2', 'gpus': []}))"
    monkeypatch.setattr(doctor, "DEVICE_PROGRAM", answer)
    for flags, end in ({"avx2", "avx512f"}, "worker; it has avx2, avx512f"), (set(), "worker"):
        monkeypatch.setattr(doctor, "_cpu_flags", lambda flags=flags: flags)

        assert doctor.check_device().detail.endswith(end)


def test_no_server_is_off_and_a_silent_one_has_failed() -> None:
    assert doctor.check_server(None).verdict is Verdict.OFF

    silent = doctor.check_server(SERVER)
    assert silent.verdict is Verdict.FAILED
    assert "http://127.0.0.1:9/healthz" in silent.detail
    assert "web.log" in silent.detail


@pytest.mark.django_db
def test_a_database_that_answers_tells_its_version_and_its_tables_fit() -> None:
    database = doctor.check_database(None)

    assert database.verdict is Verdict.OK
    assert database.detail[0].isdigit()
    assert doctor.check_schema().verdict is Verdict.OK


@pytest.mark.django_db
def test_missing_migrations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "unapplied_migrations", lambda: 2)

    finding = doctor.check_schema()

    assert finding.verdict is Verdict.FAILED
    assert finding.detail.startswith("2 migrations are missing; restart")


@pytest.mark.django_db
def test_a_worker_that_reports_is_ok(
    base_model: ServedBaseModel, start_worker_row: Callable[..., Worker]
) -> None:
    start_worker_row(state="stopped", stopped_at=timezone.now())
    start_worker_row(pid=8)

    finding = first_of(doctor.check_workers(base_model, SERVER))

    assert finding.verdict is Verdict.OK
    assert "process 8" in finding.detail


@pytest.mark.django_db
def test_a_model_whose_conversations_cannot_be_trained_on_says_why(
    base_model: ServedBaseModel, start_worker_row: Callable[..., Worker]
) -> None:
    start_worker_row(figures={"conversation_fault": "no token ends an answer"})
    finding = first_of(doctor.check_workers(base_model, SERVER))
    assert finding.verdict is Verdict.OK
    assert finding.detail.endswith("takes no conversations to train on: no token ends an answer")


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("figures", "verdict", "words"),
    [
        (
            {"state": "ready", "differences": {"x": None, "the base model": 1.4e-6}},
            Verdict.OK,
            "vLLM: ready, differences in nats: x unknown, the base model 1e-06",
        ),
        (
            {"state": "not used: other weights", "differences": {"the base model": 0.5}},
            Verdict.FAILED,
            "vLLM: not used: other weights; the built-in sampler takes its requests",
        ),
    ],
)
def test_a_worker_says_whether_it_uses_its_vllm_server(
    base_model: ServedBaseModel,
    start_worker_row: Callable[..., Worker],
    figures: dict[str, object],
    verdict: Verdict,
    words: str,
) -> None:
    start_worker_row(figures={"vllm": figures})
    finding = first_of(doctor.check_workers(base_model, SERVER))
    assert finding.verdict is verdict
    assert finding.detail.endswith(words)


@pytest.mark.django_db
def test_the_layout_of_a_workers_passes_is_named(
    base_model: ServedBaseModel, start_worker_row: Callable[..., Worker]
) -> None:
    start_worker_row(figures={"layout": "padded"})
    assert (
        "heartbeat 0 s ago, padded layout"
        in first_of(doctor.check_workers(base_model, SERVER)).detail
    )


@pytest.mark.django_db
def test_a_worker_that_is_silent_or_absent_has_failed(
    base_model: ServedBaseModel, start_worker_row: Callable[..., Worker]
) -> None:
    assert first_of(doctor.check_workers(base_model, None)).verdict is Verdict.OFF
    assert first_of(doctor.check_workers(base_model, SERVER)).verdict is Verdict.FAILED

    start_worker_row(heartbeat_at=timezone.now() - timedelta(seconds=90))
    silent = first_of(doctor.check_workers(base_model, SERVER))
    assert silent.verdict is Verdict.FAILED
    assert "silent for 90 s" in silent.detail


@pytest.mark.django_db
def test_every_worker_is_listed_and_one_that_differs_from_this_machine_is_named(
    base_model: ServedBaseModel,
    start_worker_row: Callable[..., Worker],
    settings: Settings,
    tmp_path: Path,
) -> None:
    folder = make_model_folder(tmp_path / "m")
    model = replace(base_model, folder=folder)
    facts = worker_facts(model)
    for pid, torch in ((8, facts["torch"]), (9, "1.0")):
        worker = start_worker_row(pid=pid, figures={FIGURE: {**facts, "torch": torch}})
        crash_file(worker).parent.mkdir(parents=True, exist_ok=True)
        crash_file(worker).touch()

    first, second, disagreement = doctor.check_workers(model, SERVER)

    assert [first.verdict, second.verdict] == [Verdict.OK, Verdict.OK]
    assert "process 8 on h" in first.detail
    assert "process 9 on h" in second.detail
    assert disagreement.verdict is Verdict.FAILED
    assert disagreement.detail == f"torch: {facts['torch']} here, 1.0 at worker {worker.pk} on h"


@pytest.mark.django_db
def test_clock_and_storage_are_compared_with_those_of_the_database(
    base_model: ServedBaseModel,
    start_worker_row: Callable[..., Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert doctor.check_clock().verdict is Verdict.OK
    now = time.time()
    monkeypatch.setattr(joining.time, "time", lambda: now - 3600)
    assert doctor.check_clock().detail.startswith("this machine's is 3600.")
    assert "behind Postgres's" in doctor.check_clock().detail

    storage_id_ensure()
    assert doctor.check_storage().verdict is Verdict.OK
    start_worker_row(figures={FIGURE: {"data folder's installation": "another"}})
    assert "another installation's" in doctor.check_storage().detail


@pytest.mark.django_db
def test_work_that_no_worker_will_ever_take_is_a_fault(base_model: ServedBaseModel) -> None:
    assert doctor.check_queue().detail == "nothing waits"
    user = User.objects.create_user("ada")

    future_submit(owner_id=user.pk, queue=base_model.queue, kind="sample", payload={})
    waiting = doctor.check_queue()
    assert waiting.verdict is Verdict.OK
    assert f"1 wait on {base_model.queue}" in waiting.detail

    future_submit(owner_id=user.pk, queue="engine-retired", kind="sample", payload={})
    assert doctor.check_queue().verdict is Verdict.FAILED


@pytest.mark.django_db
def test_a_server_that_wants_keys_and_has_none_lets_nobody_in(settings: Settings) -> None:
    settings.REQUIRE_API_KEY = True
    closed = doctor.check_api_keys()
    assert closed.verdict is Verdict.FAILED
    assert "createapikey" in closed.detail

    api_key_create(user=User.objects.create_user("ada"), name="k")
    assert doctor.check_api_keys().detail == "1 valid"


def test_the_command_prints_a_line_per_part_and_fails_if_one_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    findings = [
        Finding("python", Verdict.OK, "3.11"),
        Finding("server", Verdict.OFF, "not running"),
        Finding("device", Verdict.FAILED, "no torch"),
    ]
    command = "tinkerapi.management.commands.doctor.examine"
    monkeypatch.setattr(command, lambda: iter(findings))
    output = StringIO()

    with pytest.raises(CommandError, match="1 of the checks failed"):
        call_command("doctor", stdout=output, no_color=True)

    assert output.getvalue().splitlines() == [
        "ok      python: 3.11",
        "off     server: not running",
        "failed  device: no torch",
    ]
    monkeypatch.setattr(command, lambda: iter(findings[:2]))
    call_command("doctor", stdout=output)
