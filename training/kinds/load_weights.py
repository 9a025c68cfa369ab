"""Loads a checkpoint into a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from training.kinds.request import Kind, Request
from training.kinds.result import Result
from training.payloads import Payload


@dataclass(frozen=True, kw_only=True)
class LoadWeights(Request):
    """Load a checkpoint into a run."""

    kind: ClassVar = Kind.LOAD_WEIGHTS
    is_logged: ClassVar = True

    checkpoint: int
    path: str
    """The checkpoint's path at the time of the request."""
    optimizer: bool
    """False loads the weights and resets the optimizer."""

    def to_payload(self) -> Payload:
        return {"checkpoint": self.checkpoint, "path": self.path, "optimizer": self.optimizer}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(
            checkpoint=payload["checkpoint"],
            path=payload["path"],
            optimizer=payload["optimizer"],
        )

    @property
    def summary(self) -> dict[str, Any]:
        return {"path": self.path}


@dataclass(frozen=True, kw_only=True)
class LoadWeightsResult(Result):
    """The checkpoint that a run has loaded."""

    model_id: str
    """The run's name."""
    path: str

    def to_payload(self) -> Payload:
        return {"model_id": self.model_id, "path": self.path}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(model_id=payload["model_id"], path=payload["path"])
