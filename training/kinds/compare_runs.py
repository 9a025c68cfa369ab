"""Compares two runs, for ``replayrun``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from training.kinds.request import Kind, Request
from training.kinds.result import Result
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


@dataclass(frozen=True, kw_only=True)
class CompareRunsResult(Result):
    """How far two runs' states are apart."""

    steps: tuple[int, int]
    """Of the run, and of the other."""
    largest_difference: Mapping[str, float]
    """The largest absolute difference in each of ``weights``, ``grad``, ``exp_avg`` and
    ``exp_avg_sq``."""

    @property
    def is_identical(self) -> bool:
        """Whether step and all numbers are equal."""
        return self.steps[0] == self.steps[1] and not any(self.largest_difference.values())

    def to_payload(self) -> Payload:
        return {
            "steps": list(self.steps),
            "largest_difference": dict(self.largest_difference),
        }

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        ours, theirs = payload["steps"]
        return cls(steps=(ours, theirs), largest_difference=payload["largest_difference"])
