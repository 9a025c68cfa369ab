"""The log's line about the duration of a start."""

from __future__ import annotations

from training.worker.process import Stages


def test_each_stage_ends_where_the_next_begins() -> None:
    times = iter([10.0, 10.84, 11.5])
    stages = Stages(clock=lambda: next(times))
    stages.begin("read")
    stages.begin("prove")
    assert str(stages) == "read in 0.8 s, prove in 0.7 s"
