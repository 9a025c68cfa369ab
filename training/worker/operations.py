"""What each kind of future does when its turn comes: engine calls in, outcomes out.

Nothing is committed here. A domain error becomes the future's failure; any other exception
rises to the loop, which takes memory for suspect and leaves the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from futures.finishing import Outcome
from futures.models import Future
from futures.payload import decode
from training import payloads
from training.engine.interface import Trainer
from training.errors import GradientDropped, RunNotCreated, RunNotFound, TrainingError
from training.kinds import LOGGED, Kind
from training.models import Run
from training.types import ForwardBackwardOutput
from training.worker import outcomes
from training.worker.adapter_cache import AdapterCache
from training.worker.checkpoints import CheckpointOperations
from training.worker.passes import run_passes
from training.worker.texts import Texts


@dataclass
class Effects:
    """What a batch did, to be committed in one transaction."""

    outcomes: list[Outcome] = field(default_factory=list)
    writes: list[tuple[Future, Callable[[], None]]] = field(default_factory=list)
    """Row changes that belong to the outcomes of these futures; called inside the commit's
    transaction. A domain error that one raises becomes its future's failure."""
    runs: list[Run] = field(default_factory=list)
    """The batch's runs, as its operations leave their rows."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Run id -> work that a crash would repeat."""
    after_commit: list[Callable[[], None]] = field(default_factory=list)

    def write(self) -> None:
        """Change the rows, inside the commit's transaction and before the outcomes are written:
        a row may turn out to be another's by now."""
        for future, write in self.writes:
            try:
                write()
            except TrainingError as error:
                self.outcomes = [o for o in self.outcomes if o.request_id != future.id]
                self.outcomes.append(outcomes.failed(future, error))


class Operations:
    """Runs batches against one trainer."""

    def __init__(self, trainer: Trainer, adapter_cache: AdapterCache, texts: Texts) -> None:
        self._trainer = trainer
        self._texts = texts
        self._adapter_cache = adapter_cache
        self._checkpoints = CheckpointOperations(trainer, adapter_cache)
        self._backend = f"torch-{trainer.info.device}"
        self._barriers: dict[str, Callable[[Future, Run, payloads.Payload, Effects], Outcome]] = {
            Kind.CREATE_RUN: self._create_run,
            Kind.REMOVE_RUN: self._remove_run,
            Kind.OPTIM_STEP: self._optim_step,
            Kind.SAVE_WEIGHTS: self._checkpoints.save,
            Kind.LOAD_WEIGHTS: self._checkpoints.load,
            Kind.COMPARE_RUNS: self._compare_runs,
        }

    def run_passes(self, futures: Sequence[Future], runs: dict[str, Run], effects: Effects) -> None:
        """forward and forward_backward of any runs, merged."""
        requests = []
        for future in futures:
            try:
                requests.append((self.bring(future, runs), future))
            except TrainingError as error:
                self._texts.forget([future.id])
                effects.outcomes.append(outcomes.failed(future, error))
        if not requests:
            return
        begin = time.monotonic()
        answers = run_passes(self._trainer, requests, self._texts.take)
        seconds = time.monotonic() - begin
        total = sum(future.cost for _, future in requests)
        for answer in answers:
            future, run = answer.future, runs[answer.future.lane_id or ""]
            if not isinstance(answer.output, ForwardBackwardOutput):
                effects.outcomes.append(outcomes.failed(future, answer.output))
                continue
            outcome = outcomes.forward_backward_ready(
                future,
                model_id=run.name,
                backend=self._backend,
                loss_fn=answer.loss_fn,
                data=answer.data,
                output=answer.output,
            )
            effects.outcomes.append(outcome)
            if future.kind == Kind.FORWARD_BACKWARD:
                run.tokens += outcome.summary["tokens"]
                self._changed(future, run, effects, seconds * future.cost / total)

    def run_barrier(self, future: Future, runs: dict[str, Run], effects: Effects) -> None:
        """One future that runs alone in its lane."""
        begin = time.monotonic()
        try:
            run = self._run_of(future, runs)
            payload = decode(bytes(future.payload or b""))
            outcome = self._barriers[future.kind](future, run, payload, effects)
        except GradientDropped as error:
            outcome = outcomes.failed(future, error)  # a failure that changed something
        except TrainingError as error:
            effects.outcomes.append(outcomes.failed(future, error))
            return
        effects.outcomes.append(outcome)
        if future.kind in LOGGED:
            self._changed(future, run, effects, time.monotonic() - begin)

    def bring(self, future: Future, runs: dict[str, Run]) -> str:
        """Make the adapter of the future's run resident; return its name in the trainer.

        Raises:
            RunNotCreated: Its creation failed or was cancelled. (failed future)
            RunLost: It cannot be rebuilt. (failed future)
            OutOfMemory: There is no room to rebuild it now. (failed future)
        """
        return self._adapter_cache.bring_run(self._run_of(future, runs))

    def publish(self, future: Future, runs: dict[str, Run]) -> str:
        """Have the sampler know the weights of the future's run; return their version.

        Raises:
            TrainingError: As ``bring`` does. (failed future)
        """
        return self._adapter_cache.publish_run(self._run_of(future, runs))

    def _run_of(self, future: Future, runs: dict[str, Run]) -> Run:
        run = runs[future.lane_id or ""]
        if run.error and future.kind != Kind.REMOVE_RUN:
            raise RunNotCreated(f"model {run.name!r} could not be created: {run.error}")
        return run

    def _changed(self, future: Future, run: Run, effects: Effects, seconds: float) -> None:
        run.applied_seq_id = future.seq_id or 0
        effects.seconds[run.id] = effects.seconds.get(run.id, 0.0) + seconds

    def _create_run(
        self, future: Future, run: Run, payload: payloads.Payload, effects: Effects
    ) -> Outcome:
        config = payloads.lora_config_from_payload(payload["lora_config"])
        self._adapter_cache.make_room()
        if "checkpoint" in payload:
            self._checkpoints.restore(run.id, run, payload, effects)
        else:
            self._trainer.create_adapter(run.id, config)
        self._adapter_cache.created(run)
        effects.writes.append((future, lambda: _leave_creating(run)))
        result = {
            "model_id": run.name,
            "base_model": run.base_model,
            "rank": run.rank,
            "alpha": run.alpha,
        }
        if "checkpoint" in payload:
            result["path"] = payload["path"]
        return outcomes.ready(future, result, rank=run.rank)

    def _remove_run(
        self, future: Future, run: Run, payload: payloads.Payload, effects: Effects
    ) -> Outcome:
        effects.after_commit.append(lambda: self._adapter_cache.remove_run(run))
        return outcomes.ready(future, {"status": "deleted", "model_id": run.name})

    def _optim_step(
        self, future: Future, run: Run, payload: payloads.Payload, effects: Effects
    ) -> Outcome:
        params = payloads.adam_params_from_payload(payload["adam_params"])
        output = self._trainer.optim_step(self._adapter_cache.bring_run(run), params)
        run.step = output.step
        return outcomes.optim_step_ready(
            future, model_id=run.name, backend=self._backend, params=params, output=output
        )

    def _compare_runs(
        self, future: Future, run: Run, payload: payloads.Payload, effects: Effects
    ) -> Outcome:
        other = Run.objects.filter(id=payload["other"], owner_id=run.owner_id).first()
        if other is None:
            raise RunNotFound("the run to compare with does not exist")
        ours = self._trainer.adapter_state(self._adapter_cache.bring_run(run))
        theirs = self._trainer.adapter_state(self._adapter_cache.bring_run(other))
        difference = {
            key: float(np.max(np.abs(ours[key] - theirs[key]), initial=0.0))
            for key in ("weights", "exp_avg", "exp_avg_sq", "grad")
        }
        result: dict[str, Any] = {
            "steps": [int(ours["step"]), int(theirs["step"])],
            "largest_difference": difference,
            "identical": ours["step"] == theirs["step"] and not any(difference.values()),
        }
        return outcomes.ready(future, result, identical=result["identical"])


def _leave_creating(run: Run) -> None:
    """Say that the run is made, unless its owner removed it meanwhile."""
    Run.objects.filter(id=run.id, state=Run.RunState.CREATING).update(state=Run.RunState.READY)
