"""A new adapter: fresh, from a checkpoint, or from files in peft's format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from training import payloads
from training.kinds.load_weights import LoadWeights
from training.kinds.request import Kind, Request
from training.kinds.result import Result
from training.payloads import Payload
from training.types import LoraConfig


@dataclass(frozen=True, kw_only=True)
class CreateRun(Request):
    """Make a run's adapter."""

    kind: ClassVar = Kind.CREATE_RUN
    is_logged: ClassVar = True

    model_id: str
    """The run's name: stored so that one Idempotency-Key cannot mean two models."""
    lora_config: LoraConfig
    base_model: str | None = None
    """The base model in an SDK client's request; stored for the digest."""
    source: LoadWeights | None = None
    """The checkpoint that it starts from; None for a new adapter."""
    upload: int | None = None
    """The checkpoint that holds the files in peft's format from which it is made."""

    def to_payload(self) -> Payload:
        payload: Payload = {
            "model_id": self.model_id,
            "lora_config": payloads.lora_config_to_payload(self.lora_config),
        }
        if self.base_model is not None:
            payload["base_model"] = self.base_model
        if self.upload is not None:
            payload["upload"] = self.upload
        return payload | (self.source.to_payload() if self.source is not None else {})

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(
            model_id=payload["model_id"],
            lora_config=payloads.lora_config_from_payload(payload["lora_config"]),
            base_model=payload.get("base_model"),
            upload=payload.get("upload"),
            source=LoadWeights.from_payload(payload) if "checkpoint" in payload else None,
        )

    @property
    def summary(self) -> dict[str, Any]:
        return self.source.summary if self.source is not None else {}


@dataclass(frozen=True, kw_only=True)
class CreateRunResult(Result):
    """The new run."""

    model_id: str
    """The run's name."""
    base_model: str
    rank: int
    alpha: float
    path: str | None = None
    """The checkpoint that it starts from."""

    def to_payload(self) -> Payload:
        return {
            "model_id": self.model_id,
            "base_model": self.base_model,
            "rank": self.rank,
            "alpha": self.alpha,
            "path": self.path,
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(
            model_id=payload["model_id"],
            base_model=payload["base_model"],
            rank=payload["rank"],
            alpha=payload["alpha"],
            path=payload["path"],
        )
