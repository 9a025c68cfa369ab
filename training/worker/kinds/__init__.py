"""The execution of each kind of request, one module each, as in ``training.kinds``.

Nothing is committed here: a kind returns an outcome and records
effects. A domain error becomes the future's failure; any other exception reaches the loop, which
assumes that memory is corrupt and leaves the process.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.kinds import Kind
from training.worker.kinds.barrier import AnyBarrier
from training.worker.kinds.compare_runs import CompareRunsKind
from training.worker.kinds.create_run import CreateRunKind
from training.worker.kinds.load_weights import LoadWeightsKind
from training.worker.kinds.optim_step import OptimStepKind
from training.worker.kinds.remove_run import RemoveRunKind
from training.worker.kinds.save_weights import SaveWeightsKind

__all__ = ["BARRIERS"]

BARRIERS: Mapping[str, AnyBarrier] = {
    Kind.CREATE_RUN: CreateRunKind(),
    Kind.REMOVE_RUN: RemoveRunKind(),
    Kind.OPTIM_STEP: OptimStepKind(),
    Kind.SAVE_WEIGHTS: SaveWeightsKind(),
    Kind.LOAD_WEIGHTS: LoadWeightsKind(),
    Kind.COMPARE_RUNS: CompareRunsKind(),
}
"""The kinds that are barriers. ``forward_backward`` and ``sample`` are not one by one."""
