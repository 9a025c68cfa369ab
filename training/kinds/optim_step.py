"""One optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from training import payloads
from training.errors import GradientDropped
from training.kinds.request import Kind, Request
from training.kinds.result import Result
from training.payloads import Payload
from training.types import AdamParams


@dataclass(frozen=True, kw_only=True)
class OptimStep(Request):
    """Apply the accumulated gradient with AdamW and clear it."""

    kind: ClassVar = Kind.OPTIM_STEP
    is_logged: ClassVar = True
    logged_errors: ClassVar = (GradientDropped,)

    adam_params: AdamParams

    def to_payload(self) -> Payload:
        return {"adam_params": payloads.adam_params_to_payload(self.adam_params)}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(adam_params=payloads.adam_params_from_payload(payload["adam_params"]))

    @property
    def summary(self) -> dict[str, Any]:
        return {"learning_rate": self.adam_params.learning_rate}


@dataclass(frozen=True, kw_only=True)
class OptimStepResult(Result):
    """The run after the step."""

    model_id: str
    """The run's name."""
    backend: str
    """The engine that computed it, such as ``torch-cpu``."""
    step: int
    """Optimizer steps of the run, this one included."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm of the accumulated gradient before clipping."""

    def to_payload(self) -> Payload:
        return {
            "model_id": self.model_id,
            "backend": self.backend,
            "step": self.step,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(
            model_id=payload["model_id"],
            backend=payload["backend"],
            step=payload["step"],
            learning_rate=payload["learning_rate"],
            grad_norm=payload["grad_norm"],
        )
