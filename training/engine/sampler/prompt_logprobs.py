"""Scores of a prompt: log-probabilities of its tokens and of other tokens.

It is filled from one block of logits after another, so only one block exists at a time.
Everything is of the model's own distribution; only alternative tokens are drawn at the job's
temperature. Position 0 has no prediction and is never scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from training.engine.interface import SampleJob
from training.engine.sampler.logits import UniformNumbers, draw_tokens
from training.engine.torch.to_device import to_device
from training.errors import InvalidRequest
from training.types import NO_DATA_LOGPROB, PromptScores, TopLogprobs

ALTERNATIVES_STREAM = 2**32
"""The sequence number whose random numbers draw alternatives; no sample has it."""


class PromptScorer:
    """One job's scores, as far as its prompt was read."""

    def __init__(self, job: SampleJob, vocab_size: int) -> None:
        """
        Raises:
            InvalidRequest: A token to score is not in the vocabulary.
        """
        self._job = job
        self._targets = job.scoring.target_prompt_logprobs
        self._k = min(job.scoring.topk_prompt_logprobs, vocab_size)
        length = len(job.prompt)
        self._scored_from = length - (job.scoring.prompt_logprobs_last_n or length - 1)
        self.is_finite = True
        self._logprobs = np.full(length, np.nan, np.float32) if job.prompt_logprobs else None
        self._top = _no_data(length, job.scoring.topk_prompt_logprobs)
        self._target_logprobs: NDArray[np.float32] | None = None
        if self._targets is not None:
            if self._targets.max() >= vocab_size:
                raise InvalidRequest(
                    f"target_prompt_logprobs: token {self._targets.max()} is not in the "
                    f"vocabulary of {vocab_size}"
                )
            self._target_logprobs = np.zeros(self._targets.shape, np.float32)
        alternatives = (length - 1, job.scoring.prompt_alt_tokens_k)
        self._alternatives = np.zeros(alternatives, np.int64)
        self._alternative_logprobs = np.zeros(alternatives, np.float32)
        self._uniforms = UniformNumbers(job.sampling_params.seed or 0, ALTERNATIVES_STREAM)
        self.first_position = self._first_position()

    def _first_position(self) -> int:
        """The first prompt position that is scored; the prompt's length if none is."""
        first = length = len(self._job.prompt)
        if self._logprobs is not None or self._top is not None:
            first = self._scored_from
        if self._alternatives.size:
            first = 1
        if self._targets is not None:
            rows = np.flatnonzero((self._targets >= 0).any(axis=1))
            first = min(first, int(rows[0]) + 1 if len(rows) else length)
        return max(first, 1)

    def add(self, position: int, logits: Tensor) -> None:
        """Take the logits (n, V) of the distributions over the prompt's tokens from
        ``position`` on; positions come in order."""
        num_rows = len(logits)
        logprobs = logits.log_softmax(-1)  # (n, V)
        self.is_finite &= bool(logprobs.amax(dim=-1).isfinite().all())
        rows = slice(position, position + num_rows)
        skipped = min(max(self._scored_from - position, 0), num_rows)
        tail = slice(position + skipped, position + num_rows)
        if self._logprobs is not None:
            tokens = to_device(self._job.prompt[rows].astype(np.int64), logits.device)
            self._logprobs[tail] = _numpy(logprobs.gather(1, tokens[:, None])[skipped:, 0])
        if self._top is not None:
            values, tokens = logprobs[skipped:].topk(self._k)
            self._top.token_ids[tail, : self._k] = tokens.cpu().numpy()
            self._top.logprobs[tail, : self._k] = _numpy(values)
        before = slice(position - 1, position - 1 + num_rows)  # row i predicts position i + 1
        if self._targets is not None and self._target_logprobs is not None:
            targets = self._targets[before]
            chosen = to_device(np.maximum(targets, 0), logits.device)
            scores = _numpy(logprobs.gather(1, chosen))
            self._target_logprobs[before] = np.where(targets >= 0, scores, 0.0)
        if k := self._alternatives.shape[1]:
            uniforms = [[self._uniforms.next() for _ in range(k)] for _ in range(num_rows)]
            drawn = draw_tokens(logits, self._job.sampling_params.temperature, uniforms)  # (n, k)
            self._alternatives[before] = drawn.cpu().numpy()
            self._alternative_logprobs[before] = _numpy(logprobs.gather(1, drawn))

    def scores(self) -> PromptScores:
        """All requested scores."""
        return PromptScores(
            logprobs=self._logprobs,
            top=self._top,
            target_logprobs=self._target_logprobs,
            alternatives=(
                (self._alternatives, self._alternative_logprobs)
                if self._job.scoring.prompt_alt_tokens_k
                else None
            ),
        )


def top_logprobs(rows: Sequence[tuple[list[int], list[float]]], k: int) -> TopLogprobs | None:
    """The likeliest tokens of each sampled position, padded if the vocabulary has fewer."""
    top = _no_data(len(rows), k)
    if top is not None:
        for i, (tokens, logprobs) in enumerate(rows):
            top.token_ids[i, : len(tokens)] = tokens
            top.logprobs[i, : len(tokens)] = logprobs
    return top


def _no_data(length: int, k: int) -> TopLogprobs | None:
    if not k:
        return None
    return TopLogprobs(
        token_ids=np.zeros((length, k), np.int32),
        logprobs=np.full((length, k), NO_DATA_LOGPROB, np.float32),
    )


def _numpy(values: Tensor) -> NDArray[np.float32]:
    return values.float().cpu().numpy()
