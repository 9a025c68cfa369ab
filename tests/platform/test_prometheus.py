"""``GET /metrics``: right figures, for those who may see them, as the manual lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families
from pytest_django import Settings

from futures.models import Future, Worker
from tests.conftest import ApiClient
from tests.console.conftest import superuser, trained, user_factory
from tinkerapi.server.last_backup import last_backup_record
from tinkerapi.services import api_key_create
from training.base_models import base_model_get
from training.models import Run
from training.request_hours import hours_count

__all__ = ["superuser", "trained", "user_factory"]

DOCS = Path(__file__).parents[2] / "tinkerapi" / "docs"
QUERIES = 16

Traces = Callable[..., SimpleNamespace]


def samples(api: ApiClient) -> dict[tuple[Any, ...], float]:
    """(name, label values in the order of the labels' names) to value."""
    answer = api.get("/metrics")
    assert answer.status_code == 200, answer.content
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(answer.content.decode())
        for sample in family.samples
    }


FIGURES = {
    "memory_bytes": 5,
    "gpu_memory_bytes": 7,
    "resident_adapters": 2,
    "cache_tokens": 640,
    "cache_tokens_held": 96,
    "preemptions": 3,
}


def test_the_figures_are_those_of_the_rows(
    api: ApiClient, trained: Traces, superuser: User
) -> None:
    trained(superuser)
    Future.objects.filter(state="ready").update(created_at=timezone.now() - timedelta(hours=3))
    Worker.objects.update(state="live", figures=FIGURES)
    model = base_model_get(None).name
    states = list(Future.objects.values_list("state", flat=True))

    def check() -> None:
        found = samples(api)
        for state in ("ready", "failed", "cancelled"):
            assert found["tinkerapi_requests_total", state] == states.count(state)
        assert found["tinkerapi_requests_open", model, "pending"] == states.count("pending") == 1
        assert found["tinkerapi_oldest_pending_seconds", model] > 0
        assert found["tinkerapi_workers", model, "live"] == 1
        assert found["tinkerapi_workers", model, "silent"] == 0
        assert found["tinkerapi_worker_memory_bytes", model] == 5
        assert found["tinkerapi_worker_gpu_memory_bytes", model] == 7
        assert found["tinkerapi_resident_adapters", model] == 2
        assert found["tinkerapi_cache_tokens", model] == 640
        assert found["tinkerapi_cache_tokens_held", model] == 96
        assert found["tinkerapi_preemptions_total", model] == 3
        run = Run.objects.get()
        assert found["tinkerapi_runs", model, "ready"] == 1
        assert found["tinkerapi_optimizer_steps_total", model] == run.step == 1
        assert found["tinkerapi_trained_tokens_total", model] == run.tokens > 0
        size = run.checkpoints.get().size_bytes
        assert found["tinkerapi_storage_bytes", "checkpoints"] == size > 0

    check()
    while hours_count():
        pass
    check()


def test_a_worker_that_is_lost_or_silent_shows(api: ApiClient) -> None:
    queue, model = base_model_get(None).queue, base_model_get(None).name
    where = {"queue": queue, "hostname": "h", "pid": 1}
    Worker.objects.create(state="lost", stopped_at=timezone.now(), **where)
    old = timezone.now() - timedelta(minutes=2)
    Worker.objects.create(state="live", heartbeat_at=old, **where)

    found = samples(api)

    assert found["tinkerapi_worker_ends_total", model, "lost"] == 1
    assert found["tinkerapi_workers", model, "live"] == 0
    assert found["tinkerapi_workers", model, "silent"] == 1


def test_the_last_backup_shows_once_there_is_one(
    api: ApiClient, settings: Settings, tmp_path: Path
) -> None:
    settings.DATA_DIR = tmp_path
    name = ("tinkerapi_last_backup_timestamp_seconds",)
    assert name not in samples(api)
    moment = datetime(2026, 5, 1, tzinfo=UTC)
    last_backup_record(moment)
    assert samples(api)[name] == moment.timestamp()
    (tmp_path / "last_backup").write_text("soon")
    assert name not in samples(api)


@pytest.mark.parametrize(("fields", "status"), [({}, 403), ({"is_superuser": True}, 200)])
def test_a_key_must_be_a_superusers(
    api: ApiClient, user_factory: Callable[..., User], fields: dict[str, bool], status: int
) -> None:
    _, key = api_key_create(user=user_factory(**fields), name="prometheus")
    answer = api.get("/metrics", Authorization=f"Bearer {key}")
    assert answer.status_code == status


def test_without_a_key_only_this_machine_may_look(api: ApiClient, settings: Settings) -> None:
    assert api.get("/metrics").status_code == 200
    assert api.get("/metrics", Host="train.example.com").status_code == 401
    settings.REQUIRE_API_KEY = True
    assert api.get("/metrics").status_code == 401


def test_the_number_of_queries_does_not_grow(
    api: ApiClient, trained: Traces, user_factory: Callable[..., User]
) -> None:
    for _ in range(3):
        trained(user_factory())
    with CaptureQueriesContext(connection) as queries:
        api.get("/metrics")
    assert len(queries) <= QUERIES, "\n".join(query["sql"] for query in queries)


def test_the_manual_lists_every_metric_and_the_dashboard_uses_no_other(
    api: ApiClient, trained: Traces, superuser: User, settings: Settings, tmp_path: Path
) -> None:
    trained(superuser)
    Worker.objects.update(state="live")
    settings.DATA_DIR = tmp_path
    last_backup_record(timezone.now())
    Worker.objects.create(
        queue="other", hostname="h", pid=1, state="lost", stopped_at=timezone.now()
    )
    manual = (DOCS / "monitoring.md").read_text()
    table = [line for line in manual.splitlines() if line.startswith("| `tinkerapi_")]
    listed = {name for line in table for name in re.findall(r"`(tinkerapi_\w+)`", line)}

    assert listed == {name for name, *_ in samples(api)}
    dashboard = json.loads((DOCS / "examples" / "grafana.json").read_text())
    used = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"tinkerapi_\w+", target["expr"])
    }
    assert used
    assert used <= listed
