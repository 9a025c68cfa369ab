"""The passes over the base model that sampling needs, in either layout.

``ContinuousSampler`` decides which requests are read next and what is sampled from the logits; a
``ModelRunner`` computes them and keeps what the model remembers of each sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from training.engine.sampler.sequence import ActiveRequest, ActiveSequence

Row = tuple[ActiveRequest, ActiveSequence]
"""The request and the sequence of a row of logits."""


class ModelRunner(ABC):
    """Reads prompts and sampled tokens of requests that have their place in the cache.

    Batch-mates do not affect the numbers of a request: to the bit on a CPU.
    """

    @abstractmethod
    def read_prompts(self, requests: Iterable[ActiveRequest]) -> dict[ActiveRequest, Tensor]:
        """Read the next part of the prompts of some of the requests, from the first on.

        Returns:
            The prompt's last row (C,) of each request whose prompt was read to its end.
        """

    @abstractmethod
    def first_logits(self, last_hidden: Mapping[ActiveRequest, Tensor]) -> Tensor:
        """(n, V) for the token after each of n prompts, whose last rows are given; padding rows
        may follow. The sequences of these requests may be decoded from then on."""

    @abstractmethod
    def decode(self, requests: Sequence[ActiveRequest]) -> tuple[list[Row], Tensor]:
        """Read the newest token of each unfinished sequence: the rows, and the logits (n, V) of
        the next token of each."""

    @abstractmethod
    def forget(self, request: ActiveRequest) -> None:
        """Free what is remembered of a request that has ended."""
