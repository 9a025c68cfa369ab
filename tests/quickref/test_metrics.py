"""A client's own metrics: recorded once for each step, of the owner's runs only."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import ApiClient
from training.models import ClientMetrics, Run
from training.services import client_metrics


@pytest.fixture
def run(api: ApiClient) -> Run:
    api.post("/add_lora", model_id="policy")
    return Run.objects.get(name="policy")


def stored(run: Run) -> dict[int, Any]:
    return dict(ClientMetrics.objects.filter(run=run).values_list("step", "metrics"))


def test_metrics_of_a_step_are_recorded_by_id_and_by_name(api: ApiClient, run: Run) -> None:
    for name in (run.pk, "policy"):
        answer = api.post(f"/api/v1/runs/{name}/metrics", step=3, metrics={"reward": 0.5, "n": 2})
        assert answer.status_code == 200
        assert answer.json() == {"run_id": run.pk, "steps": 1}
    assert stored(run) == {3: {"reward": 0.5, "n": 2.0}}


def test_another_request_for_a_step_adds_names_and_replaces_values(
    api: ApiClient, run: Run
) -> None:
    url = f"/api/v1/runs/{run.pk}/metrics"
    api.post(url, step=1, metrics={"reward": 0.5, "kl": 0.1})
    api.post(
        url, points=[{"step": 1, "metrics": {"reward": 0.6}}, {"step": 2, "metrics": {"a": 1}}]
    )
    assert stored(run) == {1: {"reward": 0.6, "kl": 0.1}, 2: {"a": 1.0}}


def test_one_request_may_name_a_step_twice(api: ApiClient, run: Run) -> None:
    points = [{"step": 1, "metrics": {"a": 1, "b": 1}}, {"step": 1, "metrics": {"a": 2}}]
    assert api.post(f"/api/v1/runs/{run.pk}/metrics", points=points).json()["steps"] == 1
    assert stored(run) == {1: {"a": 2.0, "b": 1.0}}


def test_null_stands_for_a_number_that_is_not_finite(api: ApiClient, run: Run) -> None:
    api.post(f"/api/v1/runs/{run.pk}/metrics", step=1, metrics={"loss": None})
    assert stored(run) == {1: {"loss": None}}


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "step: this field is required"),
        ({"step": 1}, "metrics: this field is required"),
        ({"step": -1, "metrics": {"a": 1}}, "step: expected a whole number from 0"),
        ({"step": 1.5, "metrics": {"a": 1}}, "step: expected a whole number from 0"),
        ({"step": 2**53 + 1, "metrics": {"a": 1}}, "step: expected a whole number from 0"),
        ({"step": 1, "metrics": {}}, "metrics: is empty"),
        ({"step": 1, "metrics": [1]}, "metrics: expected an object of names and numbers"),
        ({"step": 1, "metrics": {"a": "1"}}, "metrics.a: expected a finite number, or null"),
        ({"step": 1, "metrics": {"a": True}}, "metrics.a: expected a finite number, or null"),
        ({"step": 1, "metrics": {"a": 10**400}}, "The body is not valid JSON"),
        ({"step": 1, "metrics": {"a": float("nan")}}, "The body is not valid JSON"),
        ({"step": 1, "metrics": {"": 1}}, "metrics (a name): expected text of 1 to 120"),
        ({"step": 1, "metrics": {"x" * 121: 1}}, "metrics (a name): expected text of 1 to 120"),
        ({"step": 1, "metrics": {"a\0": 1}}, "metrics (a name): may not hold"),
        ({"step": 1, "metrics": {str(n): n for n in range(101)}}, "at most 100"),
        ({"points": []}, "points: expected a list of 1 to 1000 steps"),
        ({"points": [{"step": 1}]}, "points[0].metrics: this field is required"),
        ({"points": [{"step": 1, "metrics": {"a": 1}}], "step": 1}, "step: send it in points"),
    ],
)
def test_other_bodies_are_refused_by_name(
    api: ApiClient, run: Run, body: dict[str, Any], error: str
) -> None:
    answer = api.post(f"/api/v1/runs/{run.pk}/metrics", **body)
    assert answer.status_code == 400
    assert error in answer.json()["detail"]
    assert stored(run) == {}


def test_too_many_steps_are_refused_and_none_is_recorded(
    api: ApiClient, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_metrics, "MAX_STEPS", 2)
    url = f"/api/v1/runs/{run.pk}/metrics"
    points = [{"step": step, "metrics": {"a": step}} for step in (1, 2, 3)]
    answer = api.post(url, points=points)
    assert answer.status_code == 400
    assert "metrics of 2 steps" in answer.json()["detail"]
    assert stored(run) == {}
    assert api.post(url, points=points[:2]).status_code == 200
    assert api.post(url, points=points[1:2]).status_code == 200  # a repeat


def test_a_run_that_does_not_exist_is_404(api: ApiClient, run: Run) -> None:
    assert api.post("/api/v1/runs/none/metrics", step=1, metrics={"a": 1}).status_code == 404
