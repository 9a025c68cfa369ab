"""compare_runs: whether two runs' states are equal."""

from __future__ import annotations

import numpy as np

from futures.finishing import Outcome
from training.errors import RunNotFound
from training.kinds import CompareRuns, CompareRunsResult
from training.models import Run
from training.worker import outcomes
from training.worker.kinds.barrier import Barrier, BarrierContext


class CompareRunsKind(Barrier[CompareRuns]):
    """Reads both, and changes neither."""

    def run(self, context: BarrierContext, request: CompareRuns) -> Outcome:
        other = Run.objects.filter(id=request.other, owner_id=context.run.owner_id).first()
        if other is None:
            raise RunNotFound("the run to compare with does not exist")
        ours, theirs = (
            context.trainer.adapter_state(context.adapter_cache.bring_run(run))
            for run in (context.run, other)
        )
        difference = {
            key: float(np.max(np.abs(ours[key] - theirs[key]), initial=0.0))
            for key in ("weights", "exp_avg", "exp_avg_sq", "grad")
        }
        result = CompareRunsResult(
            steps=(int(ours["step"]), int(theirs["step"])), largest_difference=difference
        )
        return outcomes.ready(context.future, result, identical=result.is_identical)
