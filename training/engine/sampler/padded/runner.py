"""Sampling in the padded layout: each request has transformers' cache of its own.

The sequences of a request have equal lengths and share its passes, with copies of the prompt's
cache. Those of different requests have different lengths, and recurrent states must not read
padding. So each request has a pass for each token, but the passes run side by side and share the
products of linear layers (``side_by_side``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from training.engine.sampler.decode import rows_by_weights
from training.engine.sampler.model_runner import ModelRunner, Row
from training.engine.sampler.prefill import prompt_logits, score_prompt
from training.engine.sampler.row_padding import RowPadding
from training.engine.sampler.sequence import ActiveRequest, ActiveSequence
from training.engine.torch.base_model import BaseModel
from training.engine.torch.padded.model_cache import ModelCache, bytes_remembered
from training.engine.torch.padded.side_by_side import SideBySide
from training.engine.torch.to_device import to_device
from training.types import TokenPrompt


class PaddedRunner(ModelRunner):
    """A pass for each request, over its own cache."""

    def __init__(self, base_model: BaseModel, *, cache_tokens: int, chunk_tokens: int) -> None:
        """
        Args:
            cache_tokens: Most prompt and sampled tokens, of all sequences, in the caches.
            chunk_tokens: Most prompt tokens in one pass, if the model's cache allows parts.
        """
        self._base_model = base_model
        self._padding = RowPadding(base_model)
        self._chunk_tokens = chunk_tokens if base_model.reads_chunks else None
        # Passes side by side are in different layers, whose weights must all be here.
        self._beside = None if base_model.collects_weights else SideBySide(base_model.holder)
        self._caches: dict[ActiveRequest, ModelCache] = {}
        self._cache_tokens = cache_tokens
        self._reserved: dict[ActiveRequest, int] = {}
        of_states, of_token = bytes_remembered(base_model, self._padding.enough)
        self._states_tokens = of_states // of_token if of_token else 0
        """The tokens that take as much memory as the recurrent states of a sequence; without
        attention there is no such number, and ``max_sequences`` is the only limit."""

    def most_tokens(self, num_sequences: int) -> int:
        return self._cache_tokens // num_sequences

    @property
    def pass_keys(self) -> float:
        return 0.0

    @property
    def num_held(self) -> int:
        return sum(self._reserved.values())

    @property
    def num_preempted(self) -> int:
        return 0

    def start(self, request: ActiveRequest) -> bool:
        """Reserve its whole sequences, so that it can always finish.

        Recurrent states count as the tokens that take their memory. A request whose tokens fit, but
        not with its states, starts alone.
        """
        # The last token of a sequence is never read.
        each = len(request.job.prompt) + max(request.max_tokens, 1) - 1
        size = (each + self._states_tokens) * len(request.sequences)
        if self._reserved and sum(self._reserved.values()) + size > self._cache_tokens:
            return False
        self._reserved[request] = size
        return True

    def resume(self, request: ActiveRequest, sequence: ActiveSequence) -> bool:
        raise AssertionError("no sequence of the padded layout is preempted")

    def read_prompts(self, requests: Sequence[ActiveRequest]) -> dict[ActiveRequest, Tensor]:
        last_hidden: dict[ActiveRequest, Tensor] = {}
        num_tokens = 0
        for request in requests:
            prompt, start = request.job.prompt, request.num_read
            end = len(prompt)
            if self._chunk_tokens is not None:
                end = min(start + self._chunk_tokens, end)
                if num_tokens and num_tokens + end - start > self._chunk_tokens:
                    break
            elif num_tokens:
                break
            num_tokens += end - start
            hidden = self._cache(request).read(
                [prompt[start:end].tolist()],
                start,
                prompt=TokenPrompt(tokens=prompt, images=request.job.images),
            )  # (n, C)
            score_prompt(self._base_model, request, start, hidden)
            if end == len(prompt):
                last_hidden[request] = hidden[-1]
            request.note_read(end)
        return last_hidden

    def _cache(self, request: ActiveRequest) -> ModelCache:
        if request not in self._caches:
            self._caches[request] = ModelCache(
                self._base_model, request.weights, enough_rows=self._padding.enough
            )
        return self._caches[request]

    def first_logits(self, last_hidden: Mapping[ActiveRequest, Tensor]) -> Tensor:
        for request in last_hidden:
            self._caches[request].repeat(len(request.sequences))
        return prompt_logits(self._base_model, self._padding, last_hidden)

    def decode(self, requests: Sequence[ActiveRequest]) -> tuple[list[Row], Tensor]:
        rows, segments = rows_by_weights(self._padding, requests)
        passes = [partial(self._read_newest, request) for request in _in_order(rows)]
        hidden = torch.cat(self._run(passes))  # (n, C)
        real = [i for i, row in enumerate(rows) if row is not None]
        places = to_device(real, hidden.device)
        spread = hidden.new_zeros((len(rows), hidden.shape[1])).index_copy(0, places, hidden)
        logits = self._base_model.logits(spread, segments)  # (T, V)
        return [row for row in rows if row is not None], logits[places]

    def _run(self, passes: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        return [run() for run in passes] if self._beside is None else self._beside.run(passes)

    def _read_newest(self, request: ActiveRequest) -> Tensor:
        """(n, C) of the newest tokens of the request's unfinished sequences."""
        unfinished = list(request.decodable())
        cache = self._caches[request]
        cache.keep([sequence.number for sequence in unfinished])
        position = len(request.job.prompt) + len(unfinished[0].tokens) - 1
        position += request.skipped_positions
        return cache.read([[sequence.tokens[-1]] for sequence in unfinished], position)

    def end(self, request: ActiveRequest, sequence: ActiveSequence) -> None:
        """Nothing: the cache of its request leaves it out of the next pass."""

    def forget(self, request: ActiveRequest) -> None:
        self._caches.pop(request, None)
        del self._reserved[request]

    def retire(self, version: str) -> None:
        """Nothing: nothing is kept of requests that have ended."""

    def clear(self) -> None:
        """Nothing: likewise."""


def _in_order(rows: Sequence[Row | None]) -> list[ActiveRequest]:
    """The requests of the rows, each once."""
    return list(dict.fromkeys(row[0] for row in rows if row is not None))
