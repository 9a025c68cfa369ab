"""Engine results in the form that a future stores: the quick reference's answers.

The numbers stay numpy arrays; ``futures.payload`` stores them as bytes and the HTTP side
renders them in the client's dialect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from futures.finishing import Outcome
from futures.models import Future
from futures.payload import encode
from training.engine.interface import Trainer
from training.errors import TrainingError


def backend(trainer: Trainer) -> str:
    """The backend that computed a result, for its owner."""
    return f"torch-{trainer.info.device}"


def ready(future: Future, result: Mapping[str, Any], **summary: Any) -> Outcome:
    """The future's result, and a few facts of it for lists and charts."""
    return Outcome(request_id=future.id, result=encode(dict(result)), summary=summary)


def failed(future: Future, error: TrainingError) -> Outcome:
    """The future's error, for its owner."""
    return Outcome(
        request_id=future.id,
        error=str(error),
        category=error.category,
        error_code=type(error).__name__,
    )
