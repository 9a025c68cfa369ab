"""Sampling in the packed layout: all sequences of a pass are one stream over one cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from training.engine.sampler.decode import decode
from training.engine.sampler.kv_cache import KvCache
from training.engine.sampler.model_runner import ModelRunner, Row
from training.engine.sampler.model_step import ModelStep
from training.engine.sampler.prefill import Prefill
from training.engine.sampler.sequence import ActiveRequest
from training.engine.torch.base_model import BaseModel


class PackedRunner(ModelRunner):
    """Passes of many requests at once, over our key-value cache."""

    def __init__(self, base_model: BaseModel, cache: KvCache, *, chunk_tokens: int) -> None:
        """``chunk_tokens``: most prompt tokens in one pass."""
        self._step = ModelStep(base_model, cache)
        self._prefill = Prefill(self._step, chunk_tokens=chunk_tokens)

    def read_prompts(self, requests: Iterable[ActiveRequest]) -> dict[ActiveRequest, Tensor]:
        return self._prefill.run(requests)

    def first_logits(self, last_hidden: Mapping[ActiveRequest, Tensor]) -> Tensor:
        return self._prefill.first_logits(last_hidden)

    def decode(self, requests: Sequence[ActiveRequest]) -> tuple[list[Row], Tensor]:
        return decode(self._step, requests)

    def forget(self, request: ActiveRequest) -> None:
        """Nothing: its rows of the cache are the sampler's."""
