"""What a model remembers of the sequences of one sampling job, in transformers' own cache.

Keys and values, recurrent states, convolution states: the model's classes keep them. All sequences
of a cache have the same length, so no padding is in it, which recurrent states would read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.base_model import BaseModel
from training.engine.torch.packing.stream import SingleContext
from training.engine.torch.to_device import to_device
from training.engine.torch.vision.placement import SequenceRows, place
from training.types import TokenPrompt


class ModelCache:
    """The cache of B sequences of equal length; first of one, a prompt."""

    def __init__(
        self,
        base_model: BaseModel,
        weights: AdapterTensors | None,
        *,
        enough_rows: Callable[[int], int],
    ) -> None:
        """
        Args:
            enough_rows: See ``SingleContext``.
        """
        self._base_model = base_model
        self._context = SingleContext(weights=weights, enough_rows=enough_rows)
        self._cache: Any = None
        self.numbers: list[int] = [0]
        """The caller's number of each of the B sequences."""

    def read(
        self,
        tokens: Sequence[Sequence[int]],
        first_position: int,
        *,
        prompt: TokenPrompt | None = None,
    ) -> Tensor:
        """Read the next n tokens of each sequence.

        Args:
            tokens: B times n.
            first_position: The number of tokens that were read before, or the rotary position of
                sampled ones.
            prompt: The whole prompt to which they belong, if it has images.

        Returns:
            (B * n, C), the input of the output head.
        """
        device = self._base_model.device
        input_ids = to_device(tokens, device, torch.int64)  # (B, n)
        count, length = input_ids.shape
        positions = torch.arange(first_position, first_position + length, device=device)
        images, positions = place(
            self._base_model.vision, _rows_of(prompt, first_position, length), positions
        )
        hidden, self._cache = self._base_model.grid_states(
            input_ids,
            positions[..., None, :].expand(*positions.shape[:-1], count, -1),
            self._context,
            images=images,
            caches=True,
            cache=self._cache,
        )
        return hidden

    @property
    def num_bytes(self) -> int:
        """The memory of all that it remembers."""
        return sum(x.numel() * x.element_size() for x in _tensors(self._cache, set()))

    def keep(self, numbers: Sequence[int]) -> None:
        """Replace the sequences by copies of those with these numbers."""
        if numbers != self.numbers:
            self._reorder([self.numbers.index(number) for number in numbers])
            self.numbers = list(numbers)

    def repeat(self, count: int) -> None:
        """Make the first sequence ``count`` sequences, numbered from 0."""
        if count > 1:
            self._reorder([0] * count)
            self.numbers = list(range(count))

    def _reorder(self, rows: Sequence[int]) -> None:
        self._cache.reorder_cache(to_device(rows, self._base_model.device))


def bytes_remembered(base_model: BaseModel, enough_rows: Callable[[int], int]) -> tuple[int, int]:
    """The bytes of a sequence of no tokens, recurrent states and convolutions, and of each
    token."""
    cache = ModelCache(base_model, None, enough_rows=enough_rows)
    sizes = []
    with torch.no_grad():
        for position in range(2):
            cache.read([[0]], position)
            sizes.append(cache.num_bytes)
    of_token = sizes[1] - sizes[0]
    return sizes[0] - of_token, of_token


def _tensors(of: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors of transformers' cache, each once."""
    if id(of) in seen:
        return
    seen.add(id(of))
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, dict | list | tuple):
        for each in of.values() if isinstance(of, dict) else of:
            yield from _tensors(each, seen)
    elif isinstance(of, PreTrainedConfig) or not hasattr(of, "__dict__"):
        return
    elif type(of).__module__.startswith("transformers."):
        yield from _tensors(vars(of), seen)


def _rows_of(prompt: TokenPrompt | None, start: int, length: int) -> list[SequenceRows]:
    """A part of a prompt with images, as rows from 0 on."""
    if prompt is None or not prompt.images:
        return []
    rows = np.arange(length)
    return [SequenceRows(tokens=prompt.tokens, images=prompt.images, start=start, rows=rows)]
