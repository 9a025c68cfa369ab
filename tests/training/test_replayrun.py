"""``replayrun`` rebuilds a run from its log and tells whether it came out the same."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest
from django.core.management import CommandError, call_command

from futures.models import Future
from tests.conftest import InProcessWorker
from training.management.commands import replayrun
from training.models import Run

Submit = Callable[..., Future]


@pytest.fixture
def replay(work: InProcessWorker, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command; the worker works whenever the command waits."""
    monkeypatch.setattr(replayrun.time, "sleep", lambda seconds: work())

    def run(*arguments: str) -> str:
        output = StringIO()
        call_command("replayrun", *arguments, stdout=output)
        return output.getvalue()

    return run


def test_a_replayed_run_is_identical_and_linked_to_the_first(
    trained: Run, replay: Callable[..., str], work: InProcessWorker
) -> None:
    output = replay("m", "--tolerance", "0")
    assert "identical" in output
    assert "match" in output
    copy = Run.objects.get(replay_of=trained)
    assert copy.step == trained.step == 3
    ours = work.engine.trainer.adapter_state(copy.id)
    theirs = work.engine.trainer.adapter_state(trained.id)
    assert all((ours[key] == theirs[key]).all() for key in ("weights", "exp_avg", "grad"))
    replayed = Future.objects.filter(lane_id=copy.id, replay_of__isnull=False)
    assert replayed.count() == Future.objects.filter(lane_id=trained.id).count()


def test_a_run_that_was_tampered_with_does_not_match(
    trained: Run, replay: Callable[..., str], work: InProcessWorker
) -> None:
    work.engine.trainer.find(trained.id).weights[0, 0] += 1.0
    with pytest.raises(CommandError, match="differs from the original"):
        replay("m")


def test_a_run_whose_log_was_pruned_is_refused(trained: Run, replay: Callable[..., str]) -> None:
    Future.objects.filter(lane_id=trained.id, kind="optim_step").update(payload=None)
    with pytest.raises(CommandError, match="pruned"):
        replay("m")
    assert not Run.objects.filter(replay_of=trained).exists()


def test_an_unknown_run_is_named(db: None, replay: Callable[..., str]) -> None:
    with pytest.raises(CommandError, match="'nobody'"):
        replay("nobody")


def test_a_step_that_dropped_its_gradient_is_replayed_as_one(
    work: InProcessWorker, replay: Callable[..., str], train_datum: Submit, optim_step: Submit
) -> None:
    train_datum("m", 1e30)
    optim_step("m")
    train_datum("m", 1.0)
    optim_step("m")
    work()
    assert "identical" in replay("m", "--tolerance", "0")
