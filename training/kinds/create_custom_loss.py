"""An uploaded loss function. Its future is ready once it is stored; no worker runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from training.kinds.request import Kind, Request
from training.kinds.result import Result
from training.payloads import Payload


@dataclass(frozen=True, kw_only=True)
class CreateCustomLoss(Request):
    """Store a loss that a client traced, as a checked graph."""

    kind: ClassVar = Kind.CREATE_CUSTOM_LOSS

    name: str
    inputs: Sequence[Mapping[str, Any]]
    graph: Mapping[str, Any]

    def to_payload(self) -> Payload:
        return {"name": self.name, "inputs": list(self.inputs), "graph": dict(self.graph)}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(**payload)

    @property
    def summary(self) -> dict[str, Any]:
        return {"name": self.name, "nodes": len(self.graph["nodes"])}


@dataclass(frozen=True, kw_only=True)
class CreateCustomLossResult(Result):
    """The stored loss."""

    loss_id: str
    """``<session>:loss:<number>``."""

    def to_payload(self) -> Payload:
        return {"loss_id": self.loss_id}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(loss_id=payload["loss_id"])
