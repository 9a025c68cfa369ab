"""The base class of the results of all kinds, for the worker and the web process.

A result holds what was computed. Each dialect renders its own answer from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from futures.payload import encode
from training.payloads import Payload

FORM_FIELD = "form"
FORM = 2
"""The form in which this version stores results; see ``training.kinds.first_results`` for the
first, which has no such field."""


class Result(ABC):
    """The result of one request of a kind, as plain values."""

    @abstractmethod
    def to_payload(self) -> Payload:
        """The values that the future stores; equal results have equal payloads."""

    @classmethod
    @abstractmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        """The result from a payload in the present form."""

    def encoded(self) -> bytes:
        """``to_payload()`` as bytes, marked with its form."""
        return encode({FORM_FIELD: FORM, **self.to_payload()})


def joined(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    """Arrays of equal trailing shape as one; many small arrays take longer to store."""
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def divided(array: NDArray[Any], lengths: Sequence[int]) -> list[NDArray[Any]]:
    """The arrays of these lengths from which ``joined`` made one, uncopied."""
    parts, begin = [], 0
    for length in lengths:
        parts.append(array[begin : begin + length])
        begin += length
    return parts
