"""A run's curves: what its steps, its samples and its client measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext

from futures.models import Future, Lane
from training import curves
from training.curves import client_curves, run_curves, run_steps, sampled_curves
from training.models import ClientMetrics, Run, SampledStep

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
LogFactory = Callable[..., Run]


@pytest.fixture
def log(db: None, django_user_model: type[User]) -> LogFactory:
    """``log({"loss": 1.0}, {"step": 1})``: a run whose requests, a second apart, have these
    summaries; those with a step are optimizer steps."""

    def make(*summaries: dict[str, Any]) -> Run:
        owner, _ = django_user_model.objects.get_or_create(username="ann")
        run = Run.objects.create(
            owner=owner,
            name=f"run-{Run.objects.count()}",
            base_model="base",
            rank=1,
            alpha=1,
            seed=0,
            state="ready",
            applied_seq_id=len(summaries),
            step=sum("step" in summary for summary in summaries),
        )
        Lane.objects.create(id=run.pk, owner=owner, queue="engine")
        Future.objects.bulk_create(
            Future(
                owner=owner,
                queue="engine",
                lane_id=run.pk,
                seq_id=seq_id,
                kind="optim_step" if "step" in summary else "forward_backward",
                state="ready",
                payload_digest=b"",
                result=b"",
                finished_at=BEGIN + timedelta(seconds=seq_id),
                summary=summary,
            )
            for seq_id, summary in enumerate(summaries, start=1)
        )
        return run

    return make


def steps(number: int, **more: Any) -> list[dict[str, Any]]:
    """One pass and one step each."""
    return [
        summary
        for n in range(1, number + 1)
        for summary in (
            {"loss": float(n), "tokens": 10, **more},
            {"step": n, "grad_norm": 2.0 * n, "run_tokens": 10 * n, "learning_rate": 0.5},
        )
    ]


def test_a_step_has_the_means_of_its_passes(log: LogFactory) -> None:
    run = log(
        {"loss": 1.0, "trained_tokens": 10, "tokens": 99},
        {"loss": 4.0, "trained_tokens": 20, "tokens": 1},
        {"step": 1, "grad_norm": 0.5, "learning_rate": 1e-3, "run_tokens": 100},
        {"loss": 2.0, "tokens": 7},  # of an older version, without trained_tokens
        {"step": 2, "grad_norm": 0.25, "learning_rate": 1e-3, "run_tokens": 120},
    )
    found = run_curves(run)
    assert (found.steps, found.seq_ids, found.tokens) == ([1, 2], [3, 5], [100, 120])
    assert found.times == [BEGIN.timestamp() + 3, BEGIN.timestamp() + 5]
    assert found.columns["loss"] == [3.0, 2.0]
    assert found.columns["grad_norm"] == [0.5, 0.25]
    assert found.columns["learning_rate"] == [1e-3, 1e-3]
    assert found.columns["tokens_per_second"] == [None, 10.0]  # 20 tokens in 2 seconds
    assert not found.is_thinned


def test_figures_of_several_passes_are_those_of_all_their_sequences(log: LogFactory) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=5), rng.normal(size=3)]
    run = log(
        *(
            {
                "advantage_mean": part.mean(),
                "advantage_std": part.std(),
                "sequences": len(part),
                "entropy": float(len(part)),
                "sampled_tokens": 10 * len(part),
                "loss_fn": "ppo",
            }
            for part in parts
        ),
        {"step": 1},
    )
    found = run_curves(run)
    whole = np.concatenate(parts)
    assert found.columns["advantage_mean"] == [pytest.approx(whole.mean())]
    assert found.columns["advantage_std"] == [pytest.approx(whole.std())]
    assert found.columns["entropy"] == [pytest.approx((5 * 50 + 3 * 30) / 80)]
    assert found.columns["sequences"] == [8]
    assert found.loss_fns == ["ppo"]


def test_the_largest_drift_stays_the_largest_when_passes_and_steps_are_joined(
    log: LogFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = log(
        {"drift_max": 0.5, "drift_mean": 0.25, "sampled_tokens": 30},
        {"drift_max": 0.125, "drift_mean": 0.125, "sampled_tokens": 10},
        {"step": 1},
        {"drift_max": 0.25, "drift_mean": 0.1, "sampled_tokens": 10},
        {"step": 2},
    )
    found = run_curves(run)
    assert found.columns["drift_mean"] == [pytest.approx(0.21875), 0.1]
    assert found.columns["drift_max"] == [0.5, 0.25]
    monkeypatch.setattr(curves, "MAX_POINTS", 1)
    assert run_curves(run).columns["drift_max"] == [0.5]


def test_numbers_that_are_none_leave_a_gap(log: LogFactory) -> None:
    run = log(
        {"loss": "NaN", "tokens": 10}, {"step": 1, "grad_norm": None}, {"step": 2, "grad_norm": 1.0}
    )
    found = run_curves(run)
    assert found.steps == [1, 2]
    assert found.columns == {"grad_norm": [None, 1.0]}


def test_only_what_came_later_is_read_again(log: LogFactory) -> None:
    run = log(*steps(5))
    found = run_curves(run, after=6)
    assert found.steps == [4, 5]
    assert found.columns["tokens_per_second"] == [5.0, 5.0]  # the step before is known
    assert run_curves(run, after=10).steps == []


def test_a_part_can_be_read_by_its_numbers(log: LogFactory) -> None:
    assert run_curves(log(*steps(9)), after=2, until=6).steps == [2, 3]


def test_many_steps_are_averaged_to_a_bounded_number_of_points(
    log: LogFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "MAX_POINTS", 3)
    found = run_curves(log(*steps(7)))
    assert found.steps == [3, 6, 7]
    assert found.columns["loss"] == [2.0, 5.0, 7.0]


def test_of_a_long_run_windows_are_read_and_the_newest_step_is_near_the_end(
    log: LogFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "MAX_REQUESTS", 100)
    run = log(*steps(1000))
    with CaptureQueriesContext(connection) as queries:
        found = run_curves(run)
    assert len(queries) <= 1
    assert found.is_thinned
    assert 10 <= len(found.steps) <= 25
    assert found.steps == sorted(found.steps)
    assert found.steps[0] <= 10
    assert found.steps[-1] >= 940
    middle = [loss for loss in found.columns["loss"] if loss is not None]
    # A window's mean is that of the steps in it, and its place is the last of them.
    assert all(abs(loss - step) <= 3 for loss, step in zip(middle, found.steps, strict=True))


def test_a_download_has_every_step_of_a_long_run(
    log: LogFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "MAX_REQUESTS", 7)
    rows = list(run_steps(log(*steps(40))))
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["loss"] for row in rows] == [float(n) for n in range(1, 41)]
    assert all(row["tokens_per_second"] == 5.0 for row in rows[1:])


def test_a_download_has_a_step_of_very_many_passes(
    log: LogFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "MAX_REQUESTS", 5)
    passes = [{"loss": float(n), "tokens": 1} for n in range(30)]
    [row] = run_steps(log(*passes, {"step": 1}))
    assert row["loss"] == pytest.approx(14.5)


def test_clients_metrics_keep_their_names_and_gaps(log: LogFactory) -> None:
    run, other = log(), log()
    for step, metrics in ((2, {"b": 1.0}), (5, {"a": None, "b": 2.0}), (9, {"a": 3.0})):
        ClientMetrics.objects.create(run=run, step=step, metrics=metrics)
    ClientMetrics.objects.create(run=other, step=1, metrics={"c": 1.0})
    found = client_curves(run)
    assert found["steps"] == [2, 5, 9]
    assert found["values"] == [["a", [None, None, 3.0]], ["b", [1.0, 2.0, None]]]
    assert client_curves(run, from_step=5)["steps"] == [5, 9]


def test_many_client_metrics_are_thinned_and_the_last_step_stays(
    log: LogFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "MAX_POINTS", 10)
    run = log()
    ClientMetrics.objects.bulk_create(
        ClientMetrics(run=run, step=step, metrics={"reward": step}) for step in range(95)
    )
    found = client_curves(run)
    assert len(found["steps"]) <= 10
    assert found["steps"][-1] == 94


def test_sampled_steps_become_means(log: LogFactory) -> None:
    run = log()
    SampledStep.objects.create(
        run=run, step=3, sequences=4, tokens=50, stopped_by_length=1, logprob_sum=-25.0
    )
    found = sampled_curves(run)
    assert found == {"steps": [3], "length": [12.5], "length_share": [0.25], "entropy": [0.5]}
    assert sampled_curves(log())["steps"] == []


def test_every_number_can_be_written_as_json(log: LogFactory) -> None:
    found = run_curves(log({"loss": 1e308, "tokens": 1}, {"loss": 1e308, "tokens": 1}, {"step": 1}))
    assert all(value is None or math.isfinite(value) for value in found.columns.get("loss", []))
