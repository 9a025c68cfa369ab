"""The outcomes of futures: a result of its kind, or an error."""

from __future__ import annotations

from typing import Any

from futures.finishing import Outcome
from futures.models import Future
from training.engine.interface import Trainer
from training.errors import TrainingError
from training.kinds import Result


def backend(trainer: Trainer) -> str:
    """The backend that computed a result, for its owner."""
    return f"torch-{trainer.info.device}"


def ready(future: Future, result: Result, **summary: Any) -> Outcome:
    """The future's result, and a few facts of it for lists and charts."""
    return Outcome(request_id=future.id, result=result.encoded(), summary=summary)


def failed(future: Future, error: TrainingError) -> Outcome:
    """The future's error, for its owner."""
    return Outcome(
        request_id=future.id,
        error=str(error),
        category=error.category,
        error_code=type(error).__name__,
    )
