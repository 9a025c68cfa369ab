"""The base classes of kinds that run alone in their run's lane."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from futures.finishing import Outcome
from futures.models import Future
from training.engine.interface import Trainer
from training.kinds import Request
from training.models import Run
from training.worker.adapter_cache import AdapterCache
from training.worker.effects import Effects
from training.worker.uploads import Later

RequestT = TypeVar("RequestT", bound=Request)
AppliedT = TypeVar("AppliedT")


@dataclass(frozen=True)
class BarrierContext:
    """One future that runs now, and the objects that its kind may use."""

    future: Future
    run: Run
    """Its run; changes of the row are committed with the outcome."""
    trainer: Trainer
    adapter_cache: AdapterCache
    effects: Effects


class Barrier(ABC, Generic[RequestT]):
    """A kind that changes nothing that a replay would have to repeat."""

    @abstractmethod
    def run(self, context: BarrierContext, request: RequestT) -> Outcome | Later:
        """Run the request.

        Returns:
            The outcome; or how to get it, and then the lane waits for it.

        Raises:
            TrainingError: It becomes the future's failure, and nothing was changed.
        """


class LoggedBarrier(Barrier[RequestT], Generic[RequestT, AppliedT]):
    """A kind that changes its run.

    One method changes the adapter, for the first run and for a replay.
    """

    @abstractmethod
    def apply(self, trainer: Trainer, run: Run, request: RequestT) -> AppliedT:
        """Change the run's adapter, and nothing else.

        Raises:
            TrainingError: The adapter is as it was, unless it is one of the request's
                ``logged_errors``.
        """

    def apply_failed(self, trainer: Trainer, run: Run, request: RequestT) -> None:
        """Repeat the effect of a failure that is one of the request's ``logged_errors``."""
        raise NotImplementedError

    def prepare(self, context: BarrierContext) -> None:
        """Bring the adapter into memory before it is changed."""
        context.adapter_cache.bring_run(context.run)

    @abstractmethod
    def outcome(self, context: BarrierContext, request: RequestT, applied: AppliedT) -> Outcome:
        """The outcome of ``apply``; also records its further effects."""

    def run(self, context: BarrierContext, request: RequestT) -> Outcome:
        self.prepare(context)
        return self.outcome(context, request, self.apply(context.trainer, context.run, request))


AnyBarrier = Barrier[Any]
