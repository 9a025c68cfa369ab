"""remove_run: frees a run's memory and snapshots."""

from __future__ import annotations

from futures.finishing import Outcome
from training.kinds import RemoveRun
from training.worker import outcomes
from training.worker.kinds.barrier import Barrier, Turn


class RemoveRunKind(Barrier[RemoveRun]):
    """Its row is marked removed already."""

    def run(self, turn: Turn, request: RemoveRun) -> Outcome:
        turn.effects.after_commit.append(lambda: turn.adapter_cache.remove_run(turn.run))
        return outcomes.ready(turn.future, {"status": "deleted", "model_id": turn.run.name})
