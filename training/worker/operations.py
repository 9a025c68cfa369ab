"""Runs batches: each future by its kind, with its outcome recorded for the commit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from futures.finishing import Outcome
from futures.models import Future
from training.engine.interface import Trainer
from training.errors import RunNotCreated, TrainingError
from training.kinds import ForwardBackward, Kind
from training.models import Run
from training.worker import outcomes
from training.worker.adapter_cache import AdapterCache
from training.worker.effects import Effects
from training.worker.kinds import BARRIERS, forward_backward
from training.worker.kinds.barrier import BarrierContext
from training.worker.requests import request_of
from training.worker.texts import Texts
from training.worker.uploads import Later


class Operations:
    """Runs futures on one trainer. Nothing is committed here."""

    def __init__(self, trainer: Trainer, adapter_cache: AdapterCache, texts: Texts) -> None:
        self._trainer = trainer
        self._texts = texts
        self._adapter_cache = adapter_cache

    def run_passes(self, futures: Sequence[Future], runs: dict[str, Run], effects: Effects) -> None:
        """forward and forward_backward of any runs, merged."""
        requests = []
        for future in futures:
            try:
                self.bring(future, runs)
                request = cast(ForwardBackward, self._texts.request(future))
                requests.append((runs[future.lane_id or ""], future, request))
            except TrainingError as error:
                self._texts.forget([future.id])
                effects.outcomes.append(outcomes.failed(future, error))
        if requests:
            forward_backward.run(self._trainer, requests, self._texts.take, effects)

    def run_barrier(self, future: Future, runs: dict[str, Run], effects: Effects) -> Later | None:
        """One future that runs alone in its lane.

        Returns:
            How to get its outcome, if it has none yet; then ``effects`` have nothing of it.
        """
        begin = time.monotonic()
        request = request_of(future)
        outcome: Outcome | Later
        try:
            run = self._run_of(future, runs)
            context = BarrierContext(future, run, self._trainer, self._adapter_cache, effects)
            outcome = BARRIERS[future.kind].run(context, request)
            has_changed = request.is_logged
        except TrainingError as error:
            outcome = outcomes.failed(future, error)
            has_changed = isinstance(error, request.logged_errors)
        if isinstance(outcome, Later):
            return outcome
        effects.outcomes.append(outcome)
        if has_changed:
            effects.changed(run, future, time.monotonic() - begin)
        return None

    def bring(self, future: Future, runs: dict[str, Run]) -> str:
        """Make the adapter of the future's run resident; return its name in the trainer.

        Raises:
            RunNotCreated: Its creation failed or was cancelled. (failed future)
            RunLost: It cannot be rebuilt. (failed future)
            OutOfMemory: There is not enough memory to rebuild it now. (failed future)
        """
        return self._adapter_cache.bring_run(self._run_of(future, runs))

    def publish(self, future: Future, runs: dict[str, Run]) -> str:
        """Publish the weights of the future's run to the sampler; return their version.

        Raises:
            TrainingError: As ``bring`` does. (failed future)
        """
        return self._adapter_cache.publish_run(self._run_of(future, runs))

    def _run_of(self, future: Future, runs: dict[str, Run]) -> Run:
        run = runs[future.lane_id or ""]
        if run.error and future.kind != Kind.REMOVE_RUN:
            raise RunNotCreated(f"model {run.name!r} could not be created: {run.error}")
        return run
