"""What a run is doing, in one sentence and a few figures."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from django.utils import timezone

from futures.overview import lane_waiting
from tinkerapi.console.kit.display import duration, moment_text, state_label
from training.activity import activity
from training.models import Run
from training.progress import steps_newest
from training.replays import replay_of, replay_sentence
from training.services.replays import FORKED_STEP

PACE_STEPS = 20
"""Newest steps from which the pace is computed."""

OWN_OBJECTIVE = "stable_reinforce: this server's own objective, not the hosted service's"
"""What a run says if the name of its loss could mislead."""


def run_status(run: Any) -> dict[str, Any]:
    """The state as a label, a sentence about it, and figures.

    Args:
        run: Read by ``with_progress`` and ``with_activity``.
    """
    state, waiting = activity(run), lane_waiting(run.pk)
    steps = steps_newest(run, limit=PACE_STEPS)
    return {
        "label": state_label(state),
        "sentence": " ".join(filter(None, (origin(run), sentence(run, state, steps, waiting)))),
        "figures": [
            ["Steps", f"{run.step:,}"],
            ["Trained tokens", f"{run.tokens:,}"],
            ["Pace", pace(steps) or "-"],
            ["Waiting", f"{waiting:,}"],
        ],
    }


def origin(run: Run) -> str:
    """Of a run that repeats another one's log, how far it is and whether both are equal."""
    if run.replay_of is None:
        return ""
    forked_step = run.user_metadata.get(FORKED_STEP)
    what = "Replay of" if forked_step is None else f"Fork at step {forked_step} of"
    result = replay_of(run)
    said = f" {replay_sentence(result)}" if result.requests else ""
    return f"{what} {run.replay_of}.{said}"


def sentence(run: Any, state: str, steps: Sequence[datetime], waiting: int) -> str:
    """What a person would say of the run."""
    if state == Run.RunState.CREATING:
        return "The worker is making its adapter."
    if state == Run.RunState.FAILED:
        return f"Its adapter could not be made: {run.error}"
    done = f"{run.step:,} step{'' if run.step == 1 else 's'}"
    last = f", the last one {moment_text(steps[0])}" if steps else ""
    if state == Run.RunState.DELETED:
        return f"It was removed after {done}{last}. Its checkpoints and its history stay."
    if state == Run.FINISHED:
        return f"Its session has ended; it took {done}{last}."
    if state == "client gone":
        silent = moment_text(run.session.heartbeat_at)
        return f"Its client was last heard of {silent}. It took {done}{last}, and can go on."
    wait = f" {waiting:,} request{'s wait' if waiting != 1 else ' waits'}." if waiting else ""
    if state == "idle":
        return f"Nothing to do now. It took {done}{last}." + wait
    if not steps:
        return f"The first {'samples' if state == 'sampling' else 'step'} are on the way." + wait
    speed = pace(steps)
    now = "Sampling" if state == "sampling" else "Training"
    return f"{now}: {done}{last}" + (f", {speed}." if speed else ".") + wait


def pace(steps: Sequence[datetime]) -> str | None:
    """The duration of a step, from the newest ones; None if they do not say."""
    if len(steps) < 2:
        return None
    mean = (steps[0] - steps[-1]) / (len(steps) - 1)
    if timezone.now() - steps[0] > max(10 * mean, timedelta(minutes=5)):
        return None
    return f"{duration(mean)} a step"
