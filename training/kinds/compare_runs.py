"""Compares two runs, for ``replayrun``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from training.kinds.request import Kind, Request
from training.payloads import Payload


@dataclass(frozen=True, kw_only=True)
class CompareRuns(Request):
    """Compare the run's weights, gradient and moments with those of another run of its owner."""

    kind: ClassVar = Kind.COMPARE_RUNS

    other: str
    """The other run's id."""

    def to_payload(self) -> Payload:
        return {"other": self.other}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(other=payload["other"])
