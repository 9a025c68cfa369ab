"""The curve of a run consists of its finished passes and steps, weighted by tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone

from futures.models import Future
from tests.console.conftest import page
from tinkerapi.console.kit.charts import line_chart
from training import progress
from training.models import Run

LogFactory = Callable[..., Run]


@pytest.fixture
def log(trained: Callable[..., SimpleNamespace], superuser: User) -> LogFactory:
    """``log(("pass", loss, tokens), ("step", n, grad_norm))``: a run with just these futures."""

    def make(*entries: tuple[str, Any, Any]) -> Run:
        run: Run = trained(superuser).run
        Future.objects.filter(lane_id=run.pk).delete()
        now = timezone.now()
        Future.objects.bulk_create(
            Future(
                owner=superuser,
                queue="engine",
                lane_id=run.pk,
                seq_id=seq_id,
                kind="forward_backward" if what == "pass" else "optim_step",
                state="ready",
                payload_digest=b"",
                result=b"",
                finished_at=now,
                summary={"loss": first, "tokens": second}
                if what == "pass"
                else {"step": first, "grad_norm": second},
            )
            for seq_id, (what, first, second) in enumerate(entries, start=1)
        )
        return run

    return make


def test_the_loss_of_a_step_is_the_mean_of_its_passes_by_tokens(log: LogFactory) -> None:
    run = log(("pass", 1.0, 10), ("pass", 4.0, 20), ("step", 1, 0.5), ("pass", 2.0, 5))
    first, last = progress.run_progress(run).points
    assert (first.step, first.loss, first.grad_norm) == (1, 3.0, 0.5)
    assert (last.step, last.loss, last.grad_norm) == (2, 2.0, None)


def test_numbers_that_are_none_leave_a_gap(log: LogFactory) -> None:
    run = log(("pass", "NaN", 10), ("step", 1, None), ("step", 2, "Infinity"))
    points = progress.run_progress(run).points
    assert [(point.step, point.loss, point.grad_norm) for point in points] == [
        (1, None, None),
        (2, None, None),
    ]


def test_a_long_curve_is_averaged_to_a_bounded_number_of_points(
    log: LogFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "MAX_POINTS", 3)
    steps = range(1, 8)
    run = log(*[entry for n in steps for entry in (("pass", float(n), 1), ("step", n, 2.0 * n))])
    curve = progress.run_progress(run)
    assert curve.steps_per_point == 3
    assert [(point.step, point.loss) for point in curve.points] == [(3, 2.0), (6, 5.0), (7, 7.0)]


def test_only_the_newest_requests_are_read(
    log: LogFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "MAX_REQUESTS", 4)
    run = log(*[entry for n in (1, 2, 3) for entry in (("pass", 1.0, 1), ("step", n, 1.0))])
    curve = progress.run_progress(run)
    assert [point.step for point in curve.points] == [2, 3]
    assert not curve.is_whole


def test_the_last_loss_and_request_are_those_of_the_newest_futures(
    log: LogFactory, superuser: User
) -> None:
    run = log(("pass", 3.0, 1), ("pass", 2.5, 1), ("step", 1, 1.0))
    found = progress.with_progress(Run.objects.filter(pk=run.pk)).get()
    newest = Future.objects.filter(lane_id=run.pk).latest("seq_id")
    assert found.newest_request_at == newest.created_at  # type: ignore[attr-defined]
    assert float(found.last_loss) == 2.5  # type: ignore[attr-defined]


def test_the_page_of_a_trained_run_draws_what_the_worker_reported(
    console: Client, trained: Callable[..., SimpleNamespace], superuser: User
) -> None:
    traces = trained(superuser)
    answer = console.get(page(traces.run))
    loss, grad_norm = answer.context["charts"]
    assert (loss["title"], grad_norm["title"]) == ("Loss", "Gradient norm")
    assert loss["last"] == f"{traces.forward_backward.summary['loss']:.4g}"
    assert grad_norm["last"] == f"{traces.optim_step.summary['grad_norm']:.4g}"
    assert answer.content.decode().count('data-type="line"') == 2


@pytest.mark.parametrize(
    ("values", "style"),
    [([2.5], "circle"), ([None, 2.5], "circle"), ([2.5, 2.4], False), ([], False)],
)
def test_a_curve_of_one_value_is_a_point(values: list[float | None], style: str | bool) -> None:
    [curve] = json.loads(line_chart(range(len(values)), values, name="Loss"))["datasets"]
    assert curve["pointStyle"] == style
