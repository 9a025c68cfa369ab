"""sample: completions of prompts, as a result.

The sampler computes them beside other work (``training.worker.samples``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from futures.finishing import Outcome
from futures.models import Future
from training.engine.interface import SampleOutput
from training.kinds import SampleResult
from training.kinds.sample_result import (
    EchoedPrompt,
    SequenceResult,
    SparseLogprobs,
    WrittenTokens,
)
from training.types import (
    PromptScores,
    SampledSequence,
    ScoringParams,
    TokenText,
    TopLogprobs,
)
from training.worker import outcomes

TokenTexts = Callable[[Sequence[int], Sequence[int]], list[TokenText]]
"""``Renderer.token_texts``: the texts of some tokens, sampled after those of the second list."""


def ready(
    future: Future,
    *,
    model_id: str | None,
    outputs: Sequence[SampleOutput],
    prompt_tokens: int,
    scoring: ScoringParams,
    token_texts: TokenTexts | None = None,
    prompt_texts: Sequence[tuple[str, list[TokenText]]] = (),
) -> Outcome:
    """The result of all prompts' outputs.

    Args:
        prompt_tokens: Tokens of all prompts, for the summary.
        token_texts: The renderer's; if given, each sequence also has its tokens' texts and offsets.
        prompt_texts: The text of each prompt and its tokens'; if given, the result echoes them.
    """
    scores = outputs[0].scores
    echo: list[EchoedPrompt] = []
    if prompt_texts and token_texts is not None:
        echo = [
            _echo(output, text, placed, token_texts)
            for output, (text, placed) in zip(outputs, prompt_texts, strict=True)
        ]
    result = SampleResult(
        model_id=model_id,
        sequences=[
            _sequence(sequence, output.prompt_end, token_texts)
            for output in outputs
            for sequence in output.sequences
        ],
        prompt_logprobs=[_scored(output.prompt_logprobs) for output in outputs],
        top_prompt_logprobs=scores.top,
        target_prompt_logprobs=_target_logprobs(scores, scoring),
        prompt_alternatives=scores.alternatives,
        echo=echo,
        cached_prompt_tokens=sum(output.cached_prompt_tokens for output in outputs),
    )
    return outcomes.ready(
        future,
        result,
        tokens=sum(len(sequence.tokens) for sequence in result.sequences),
        prompt_tokens=prompt_tokens,
        cached_prompt_tokens=result.cached_prompt_tokens,
    )


def _sequence(
    sequence: SampledSequence, prompt_end: Sequence[int], token_texts: TokenTexts | None
) -> SequenceResult:
    written = None
    if token_texts is not None:
        written = _written(token_texts(sequence.tokens, prompt_end), sequence.top, token_texts)
    return SequenceResult(
        stop_reason=sequence.stop_reason,
        text=sequence.text,
        tokens=np.asarray(sequence.tokens, np.int32),
        logprobs=np.asarray(sequence.logprobs, np.float32),
        top=sequence.top,
        written=written,
    )


def _echo(
    output: SampleOutput,
    text: str,
    placed: Sequence[TokenText],
    token_texts: TokenTexts,
) -> EchoedPrompt:
    return EchoedPrompt(
        text=text,
        written=_written(placed, output.scores.top, token_texts),
        logprobs=_scored(output.prompt_logprobs),
        top=output.scores.top,
    )


def _scored(prompt_logprobs: Sequence[float] | None) -> NDArray[np.float32] | None:
    return None if prompt_logprobs is None else np.asarray(prompt_logprobs, np.float32)


def _target_logprobs(
    scores: PromptScores, scoring: ScoringParams
) -> NDArray[np.float32] | SparseLogprobs | None:
    if scores.target_logprobs is None or scoring.target_indices is None:
        return scores.target_logprobs
    crow, col = scoring.target_indices
    rows = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
    return SparseLogprobs(
        values=scores.target_logprobs[rows, col],
        crow_indices=crow,
        col_indices=col,
        shape=scores.target_logprobs.shape,
    )


def _written(
    placed: Sequence[TokenText], top: TopLogprobs | None, token_texts: TokenTexts
) -> WrittenTokens:
    """The tokens' texts and offsets, and the texts of the likeliest tokens."""
    top_texts: list[list[str]] | None = None
    top_utf8: list[list[bytes | None]] | None = None
    if top is not None:
        ids = np.unique(top.token_ids).tolist()
        of = dict(zip(ids, token_texts(ids, ()), strict=True))
        rows = top.token_ids.tolist()
        top_texts = [[of[token].text for token in row] for row in rows]
        if _has_own_bytes(of.values()):
            top_utf8 = [[of[token].utf8 for token in row] for row in rows]
    return WrittenTokens(
        texts=[token.text for token in placed],
        offsets=[token.offset for token in placed],
        utf8=[token.utf8 for token in placed] if _has_own_bytes(placed) else None,
        top_texts=top_texts,
        top_utf8=top_utf8,
    )


def _has_own_bytes(tokens: Iterable[TokenText]) -> bool:
    """Whether one of the tokens is a part of a character."""
    return any(token.utf8 != token.text.encode() for token in tokens)
