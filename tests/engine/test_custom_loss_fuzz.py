"""Random graphs of hostile sizes in the process that a worker uses: it outlives all of them.

Some dozens; ``python -m tests.engine.custom_loss_fuzz 2000`` is the long form.
"""

from __future__ import annotations

import pytest

from tests.engine.custom_loss_fuzz import OPERATIONS, Tally
from tests.waiting import LONG_SECONDS
from training.custom_loss_limits import CPU_SECONDS, WALL_SECONDS
from training.engine.custom_loss.process import CustomLossProcess


def test_no_random_graph_ends_its_process_or_takes_more_than_is_stated(
    custom_loss_process: CustomLossProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom_loss_process, "_cpu_seconds", CPU_SECONDS)
    monkeypatch.setattr(custom_loss_process, "_wall_seconds", WALL_SECONDS)
    tally = Tally(patience_seconds=LONG_SECONDS)
    for number in range(0, len(OPERATIONS), 8):
        tally.add(f"short.{number}", OPERATIONS[number], custom_loss_process)
    assert not tally.faults, tally
    assert tally.outcomes["CustomLossOutput"] > 8, tally
