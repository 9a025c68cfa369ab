"""The last loss of runs in lists, and the data of the dashboard's charts."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.utils import timezone

from futures.models import Future
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


def test_the_last_loss_and_request_are_those_of_the_newest_futures(
    log: LogFactory, superuser: User
) -> None:
    run = log(("pass", 3.0, 1), ("pass", 2.5, 1), ("step", 1, 1.0))
    found = progress.with_progress(Run.objects.filter(pk=run.pk)).get()
    newest = Future.objects.filter(lane_id=run.pk).latest("seq_id")
    assert found.newest_request_at == newest.created_at  # type: ignore[attr-defined]
    assert float(found.last_loss) == 2.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "style"),
    [([2.5], "circle"), ([None, 2.5], "circle"), ([2.5, 2.4], False), ([], False)],
)
def test_a_curve_of_one_value_is_a_point(values: list[float | None], style: str | bool) -> None:
    [curve] = json.loads(line_chart(range(len(values)), values, name="Loss"))["datasets"]
    assert curve["pointStyle"] == style
