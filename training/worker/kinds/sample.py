"""sample: completions of prompts, as the future stores them.

The sampler computes them beside other work (``training.worker.samples``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from futures.finishing import Outcome
from futures.models import Future
from training.engine.interface import SampleOutput
from training.types import PromptScores, ScoringParams, TokenText, TopLogprobs
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
    """All sequences, those of the first prompt first; ``prompt_logprobs`` per prompt.

    With one prompt ``prompt_logprobs`` is that prompt's list; None if not requested. The scores
    that ``scoring`` requests, for one prompt, have the names of the SDK's answer.

    Args:
        prompt_tokens: Tokens of all prompts, for the summary.
        token_texts: The renderer's; if given, each sequence also has its tokens' texts and offsets.
        prompt_texts: The text of each prompt and its tokens'; if given, the result has them, with
            the prompts' log-probabilities, under ``echo``.
    """
    sequences: list[dict[str, Any]] = [
        {
            "stop_reason": sequence.stop_reason,
            "tokens": np.asarray(sequence.tokens, dtype=np.int32),
            "logprobs": np.asarray(sequence.logprobs, dtype=np.float32),
            "text": sequence.text,
            **_top("topk_logprobs", sequence.top),
        }
        for output in outputs
        for sequence in output.sequences
    ]
    if token_texts is not None:
        prompt_ends = [output.prompt_end for output in outputs for _ in output.sequences]
        for sequence, prompt_end in zip(sequences, prompt_ends, strict=True):
            sequence |= _written(token_texts(sequence["tokens"].tolist(), prompt_end))
            if "topk_logprobs" in sequence:
                top_ids = sequence["topk_logprobs"]["token_ids"]
                sequence |= _top_written(top_ids, token_texts)
    prompt_logprobs = [
        None
        if output.prompt_logprobs is None
        else np.asarray(output.prompt_logprobs, dtype=np.float32)
        for output in outputs
    ]
    completions = [sequence["text"] for sequence in sequences]
    result = {
        "generated_text": completions[0],
        "completions": completions,
        "sequences": sequences,
        "prompt_logprobs": prompt_logprobs[0] if len(outputs) == 1 else prompt_logprobs,
        "model_id": model_id,
        **_scores(outputs[0].scores, scoring),
    }
    if prompt_texts and token_texts is not None:
        result["echo"] = [
            _echo(output, text, placed, token_texts)
            for output, (text, placed) in zip(outputs, prompt_texts, strict=True)
        ]
    return outcomes.ready(
        future,
        result,
        tokens=sum(len(sequence["tokens"]) for sequence in sequences),
        prompt_tokens=prompt_tokens,
    )


def _scores(scores: PromptScores, scoring: ScoringParams) -> dict[str, Any]:
    result = _top("topk_prompt_logprobs", scores.top)
    if scores.target_logprobs is not None:
        result["target_prompt_logprobs"] = scores.target_logprobs
        if scoring.target_indices is not None:
            crow, col = scoring.target_indices
            rows = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
            result["target_prompt_logprobs"] = {
                "values": scores.target_logprobs[rows, col],
                "crow_indices": crow,
                "col_indices": col,
                "shape": list(scores.target_logprobs.shape),
            }
    if scores.alternatives is not None:
        tokens, logprobs = scores.alternatives
        result["prompt_alt_tokens"] = {"tokens": tokens, "logprobs": logprobs}
    return result


def _echo(
    output: SampleOutput,
    text: str,
    placed: Sequence[TokenText],
    token_texts: TokenTexts,
) -> dict[str, Any]:
    """A prompt in the form of a sequence: its text, its tokens and their scores."""
    echo: dict[str, Any] = {"text": text, **_written(placed)}
    if output.prompt_logprobs is not None:
        echo["logprobs"] = np.asarray(output.prompt_logprobs, dtype=np.float32)
    if output.scores.top is not None:
        echo |= _top("topk_logprobs", output.scores.top)
        echo |= _top_written(output.scores.top.token_ids, token_texts)
    return echo


def _written(placed: Sequence[TokenText]) -> dict[str, Any]:
    """The tokens' texts and offsets, and the bytes of those that are parts of characters."""
    written: dict[str, Any] = {
        "token_texts": [token.text for token in placed],
        "text_offsets": [token.offset for token in placed],
    }
    if any(token.utf8 != token.text.encode() for token in placed):
        written["token_bytes"] = [_own_bytes(token) for token in placed]
    return written


def _top_written(token_ids: NDArray[np.int32], token_texts: TokenTexts) -> dict[str, Any]:
    """Every token's own text, and bytes as above, in the array's shape."""
    ids = np.unique(token_ids).tolist()
    of = dict(zip(ids, token_texts(ids, ()), strict=True))
    rows = token_ids.tolist()
    written: dict[str, Any] = {"topk_texts": [[of[token].text for token in row] for row in rows]}
    if any(token.utf8 != token.text.encode() for token in of.values()):
        written["topk_bytes"] = [[_own_bytes(of[token]) for token in row] for row in rows]
    return written


def _own_bytes(token: TokenText) -> list[int] | None:
    return None if token.utf8 is None else list(token.utf8)


def _top(name: str, top: TopLogprobs | None) -> dict[str, Any]:
    return {} if top is None else {name: {"token_ids": top.token_ids, "logprobs": top.logprobs}}
