"""The passes over the base model that sampling needs, in either layout.

``ContinuousSampler`` decides which requests are read next and what is sampled from the logits; a
``ModelRunner`` computes them and keeps what the model remembers of each sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from training.engine.sampler.sequence import ActiveRequest, ActiveSequence

Row = tuple[ActiveRequest, ActiveSequence]
"""The request and the sequence of a row of logits."""


class ModelRunner(ABC):
    """Reads prompts and sampled tokens, and knows which requests have room for that.

    Batch-mates do not affect the numbers of a request: to the bit on a CPU.
    """

    @abstractmethod
    def most_tokens(self, num_sequences: int) -> int:
        """The most tokens, of the prompt and sampled, of each of this many sequences of a request
        that has all the room there is."""

    @property
    @abstractmethod
    def pass_keys(self) -> float:
        """The tokens whose keys and values have as many numbers as the base model: reading either
        from memory takes equally long. 0 if unknown."""

    @property
    @abstractmethod
    def num_held(self) -> int:
        """Tokens whose places in the cache are taken by requests that have not ended."""

    @property
    @abstractmethod
    def num_preempted(self) -> int:
        """How often a sequence has given up its places so far, and was to be read again."""

    @abstractmethod
    def start(self, request: ActiveRequest) -> bool:
        """Make room for a request's prompt and for beginning its sequences, if there is now."""

    @abstractmethod
    def resume(self, request: ActiveRequest, sequence: ActiveSequence) -> bool:
        """Make room for a preempted sequence, if there is now; then it is to be read again, or may
        be decoded at once."""

    @abstractmethod
    def read_prompts(self, requests: Sequence[ActiveRequest]) -> dict[ActiveRequest, Tensor]:
        """Read the next part of the prompts, or of sequences to read again, of some of the
        requests, from the first on.

        Returns:
            The prompt's last row (C,) of each request whose prompt was read to its end.
        """

    @abstractmethod
    def first_logits(self, last_hidden: Mapping[ActiveRequest, Tensor]) -> Tensor:
        """(n, V) for the token after each of n prompts, whose last rows are given; padding rows
        may follow. The sequences of these requests may be decoded from then on."""

    @abstractmethod
    def decode(self, requests: Sequence[ActiveRequest]) -> tuple[list[Row], Tensor]:
        """Read the newest token of each decodable sequence: the rows, and the logits (n, V) of
        the next token of each. Sequences for which there is no room are preempted before."""

    @abstractmethod
    def end(self, request: ActiveRequest, sequence: ActiveSequence) -> None:
        """Free what is remembered of a sequence that has ended."""

    @abstractmethod
    def forget(self, request: ActiveRequest) -> None:
        """Free what is remembered of a request that has started, and has ended."""

    @abstractmethod
    def retire(self, version: str) -> None:
        """Free what is remembered of a version of weights that nobody will use any more."""

    @abstractmethod
    def clear(self) -> None:
        """Free all memory, while no request is active."""
