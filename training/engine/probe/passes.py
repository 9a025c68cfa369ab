"""The passes that the check at the start makes in each layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from training.engine.probe.stock_answers import Passage
from training.engine.sampler.kv_cache import KvCache
from training.engine.sampler.row_padding import RowPadding
from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.attention.arithmetic import blocks_for
from training.engine.torch.attention.interface import Attention
from training.engine.torch.attention.paged import PagedAttention
from training.engine.torch.attention.paged_parts import Part
from training.engine.torch.attention.sequences import SequenceAttention
from training.engine.torch.attention.variants import PLAIN, Variant
from training.engine.torch.base_model import BaseModel
from training.engine.torch.packing.ranges import whole_sequences
from training.engine.torch.packing.stream import PackedContext, Segment, uniform_segments
from training.engine.torch.padded.model_cache import ModelCache
from training.engine.torch.vision.placement import ImageRows, SequenceRows, place
from training.types import TokenPrompt


class Unproven(Exception):
    """A layout does not compute what transformers computes; the message says what differs."""


class ProbePasses(ABC):
    """The engine's passes over some passages; results are log-probabilities (n, V) by passage."""

    def __init__(self, base_model: BaseModel) -> None:
        self.base_model = base_model

    @abstractmethod
    def beside(self, passages: Sequence[Passage], segment: Segment) -> list[Tensor]:
        """All passages in one pass, as whole sequences under one adapter."""

    @abstractmethod
    def cached(self, passages: Sequence[Passage], weights: AdapterTensors | None) -> list[Tensor]:
        """Each passage's prompt in two parts and its last token separately, over a cache."""

    def _logprobs(self, hidden: Tensor, passages: Sequence[Passage]) -> list[Tensor]:
        logits = self.base_model.logits(hidden, uniform_segments(len(hidden), None))  # (T, V)
        return list(logits.log_softmax(-1).split([len(passage.tokens) for passage in passages]))

    def _placed(self, passages: Sequence[Passage]) -> tuple[ImageRows | None, Tensor]:
        """The images and positions of a stream of passages."""
        position_ids = torch.cat([passage.position_ids for passage in passages])
        sequences, row = [], 0
        for passage in passages:
            rows = np.arange(row, row + len(passage.tokens))
            row += len(rows)
            if passage.whole is not None:
                sequences.append(
                    SequenceRows(
                        tokens=passage.whole,
                        images=passage.images,
                        start=passage.first_position,
                        rows=rows,
                    )
                )
        return place(self.base_model.vision, sequences, position_ids)

    def _is_long(self, passages: Sequence[Passage]) -> Tensor | None:
        """(T,) whether a row's passage is longer in all than the rotary switch."""
        switch = self.base_model.rotary_switch
        if switch is None:
            return None
        rows = [
            torch.full((len(passage.tokens),), passage.sequence_tokens > switch)
            for passage in passages
        ]
        return torch.cat(rows).to(self.base_model.device)


class PaddedPasses(ProbePasses):
    """The passes of the padded layout."""

    def beside(self, passages: Sequence[Passage], segment: Segment) -> list[Tensor]:
        images, position_ids = self._placed(passages)
        hidden = self.base_model.sequence_states(
            torch.cat([passage.tokens for passage in passages]),
            position_ids,
            [segment],
            whole_sequences(len(passage.tokens) for passage in passages),
            self._is_long(passages),
            images,
        )  # (T, C)
        return self._logprobs(hidden, passages)

    def cached(self, passages: Sequence[Passage], weights: AdapterTensors | None) -> list[Tensor]:
        padding = RowPadding(self.base_model)
        answers = []
        for passage in passages:
            cache = ModelCache(self.base_model, weights, enough_rows=padding.enough)
            tokens = passage.tokens.tolist()
            end = len(tokens) - 1
            cuts = (0, end // 2, end) if self.base_model.reads_chunks else (0, end)
            prompt, skipped = None, 0
            if passage.whole is not None:
                prompt = TokenPrompt(tokens=passage.whole, images=passage.images)
                skipped = self.base_model.skipped_positions(prompt.tokens, prompt.images)
            with torch.no_grad():
                parts = [
                    cache.read([tokens[start:stop]], passage.first_position + start, prompt=prompt)
                    for start, stop in pairwise(cuts)
                ]
                cache.repeat(2)
                newest = cache.read([tokens[end:]] * 2, passage.first_position + end + skipped)
                answers += self._logprobs(torch.cat([*parts, newest[1:]]), [passage])
        return answers


class PackedPasses(ProbePasses):
    """The passes of the packed layout, in which attention must be called once in each layer."""

    def __init__(self, base_model: BaseModel, *, num_layers: int) -> None:
        """``num_layers``: of the model while it is checked."""
        super().__init__(base_model)
        self._num_layers = num_layers

    def beside(self, passages: Sequence[Passage], segment: Segment) -> list[Tensor]:
        attention = SequenceAttention(whole_sequences(len(p.tokens) for p in passages))
        return self._run(passages, segment, attention)

    def cached(self, passages: Sequence[Passage], weights: AdapterTensors | None) -> list[Tensor]:
        """All passages side by side."""
        tables = _block_tables(len(passage.tokens) for passage in passages)
        cache = KvCache(sum(map(len, tables)), self.base_model.device)
        ends = [len(passage.tokens) - 1 for passage in passages]
        bounds = [(0, end // 2, end, end + 1) for end in ends]
        pieces: list[list[Tensor]] = []
        with torch.no_grad():
            for n in range(3):
                cuts = [slice(*bound[n : n + 2]) for bound in bounds]
                parts = _parts(cuts, tables)
                attention = PagedAttention(cache, parts, sum(part.num_tokens for part in parts))
                pieces.append(self._run_parts(passages, weights, cuts, attention))
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _run_parts(
        self,
        passages: Sequence[Passage],
        weights: AdapterTensors | None,
        cuts: Sequence[slice],
        attention: Attention,
    ) -> list[Tensor]:
        """The log-probabilities (n, V) of a part of each passage, under the update."""
        parts = [
            replace(
                passage,
                tokens=passage.tokens[cut],
                first_position=passage.first_position + cut.start,
            )
            for passage, cut in zip(passages, cuts, strict=True)
        ]
        num_rows = sum(len(part.tokens) for part in parts)
        return self._run(parts, Segment(start=0, end=num_rows, weights=weights), attention)

    def _run(
        self, passages: Sequence[Passage], segment: Segment, attention: Attention
    ) -> list[Tensor]:
        """The log-probabilities (n, V) of the passages in one stream."""
        calls = _Counted(attention)
        images, position_ids = self._placed(passages)
        hidden = self.base_model.hidden_states(
            torch.cat([passage.tokens for passage in passages]),
            position_ids,
            PackedContext(segments=[segment], attention=calls, is_long=self._is_long(passages)),
            images,
        )  # (T, C)
        if len(calls.layers) != self._num_layers or len(set(calls.layers)) != self._num_layers:
            raise Unproven(
                f"attention is asked for {len(calls.layers)} times in a pass over"
                f" {self._num_layers} layers, not once in each"
            )
        return self._logprobs(hidden, passages)


class _Counted(Attention):
    """Another attention, with a record of the layers that called it."""

    def __init__(self, inner: Attention) -> None:
        self._inner = inner
        self.layers: list[int] = []

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        variant: Variant = PLAIN,
    ) -> Tensor:
        self.layers.append(layer_idx)
        return self._inner.attend(layer_idx, query, key, value, scaling, variant)


def _block_tables(lengths: Iterable[int]) -> list[list[int]]:
    """Blocks for sequences of these lengths, each sequence's in descending order."""
    tables, first = [], 0
    for length in lengths:
        end = first + blocks_for(length)
        tables.append(list(range(end - 1, first - 1, -1)))
        first = end
    return tables


def _parts(cuts: Iterable[slice], tables: Iterable[Sequence[int]]) -> list[Part]:
    parts, row = [], 0
    for cut, blocks in zip(cuts, tables, strict=True):
        num_tokens = cut.stop - cut.start
        parts.append(Part(first_row=row, start=cut.start, num_tokens=num_tokens, blocks=blocks))
        row += num_tokens
    return parts
