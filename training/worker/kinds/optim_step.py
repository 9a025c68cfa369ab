"""optim_step: AdamW with the accumulated gradient."""

from __future__ import annotations

from futures.finishing import Outcome
from training.engine.interface import Trainer
from training.kinds import OptimStep, OptimStepResult
from training.models import Run
from training.types import OptimStepOutput
from training.worker import outcomes
from training.worker.kinds.barrier import BarrierContext, LoggedBarrier


class OptimStepKind(LoggedBarrier[OptimStep, OptimStepOutput]):
    """Changes weights, moments and step, and clears the gradient."""

    def apply(self, trainer: Trainer, run: Run, request: OptimStep) -> OptimStepOutput:
        return trainer.optim_step(run.id, request.adam_params)

    def apply_failed(self, trainer: Trainer, run: Run, request: OptimStep) -> None:
        trainer.drop_gradient(run.id)

    def outcome(
        self, context: BarrierContext, request: OptimStep, applied: OptimStepOutput
    ) -> Outcome:
        """The step's result; the summary also has the run's tokens so far."""
        context.run.step = applied.step
        result = OptimStepResult(
            model_id=context.run.name,
            backend=outcomes.backend(context.trainer),
            step=applied.step,
            learning_rate=request.adam_params.learning_rate,
            grad_norm=applied.grad_norm,
        )
        return outcomes.ready(
            context.future,
            result,
            step=applied.step,
            grad_norm=applied.grad_norm,
            run_tokens=context.run.tokens,
        )
