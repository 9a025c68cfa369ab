"""Saves a checkpoint of a run's state when the request runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from training.kinds.request import Kind, Request
from training.kinds.result import Result
from training.payloads import Payload


@dataclass(frozen=True, kw_only=True)
class SaveWeights(Request):
    """Save the run under a name, or for one sampling session of the SDK."""

    kind: ClassVar = Kind.SAVE_WEIGHTS

    checkpoint_kind: str
    """``training``, ``sampler`` or ``external``."""
    name: str | None = None
    """None for a sampling session."""
    sampling_session_seq_id: int | None = None
    """The session's number for it; then only the kind is set besides."""
    overwrite: bool = False
    ttl_seconds: int | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    recipients: Sequence[str] = ()
    """age public keys for which the files of an external checkpoint are encrypted."""

    def to_payload(self) -> Payload:
        if self.sampling_session_seq_id is not None:
            return {
                "kind": self.checkpoint_kind,
                "sampling_session_seq_id": self.sampling_session_seq_id,
            }
        payload: Payload = {
            "name": self.name,
            "kind": self.checkpoint_kind,
            "overwrite": self.overwrite,
            "ttl_seconds": self.ttl_seconds,
            "user_metadata": dict(self.user_metadata),
        }
        return {**payload, "recipients": list(self.recipients)} if self.recipients else payload

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        given = {name: value for name, value in payload.items() if name != "kind"}
        return cls(checkpoint_kind=payload["kind"], **given)


@dataclass(frozen=True, kw_only=True)
class SaveWeightsResult(Result):
    """A checkpoint with a path, or a sampling session of the run's weights."""

    model_id: str
    """The run's name."""
    path: str | None = None
    """The checkpoint's; None for a sampling session."""
    size_bytes: int | None = None
    """Size of the checkpoint's files; None for a sampling session."""
    sampling_session_id: str | None = None

    def to_payload(self) -> Payload:
        return {
            "model_id": self.model_id,
            "path": self.path,
            "size_bytes": self.size_bytes,
            "sampling_session_id": self.sampling_session_id,
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(
            model_id=payload["model_id"],
            path=payload["path"],
            size_bytes=payload["size_bytes"],
            sampling_session_id=payload["sampling_session_id"],
        )
