"""The end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from training.kinds.request import Kind, Request
from training.kinds.result import Result
from training.payloads import Payload


@dataclass(frozen=True, kw_only=True)
class RemoveRun(Request):
    """Free a run's memory and snapshots."""

    kind: ClassVar = Kind.REMOVE_RUN

    def to_payload(self) -> Payload:
        return {}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls()


@dataclass(frozen=True, kw_only=True)
class RemoveRunResult(Result):
    """The removed run."""

    model_id: str
    """The run's name."""

    def to_payload(self) -> Payload:
        return {"model_id": self.model_id}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(model_id=payload["model_id"])
