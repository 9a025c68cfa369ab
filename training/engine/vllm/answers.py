"""The server's answers as values of ours, checked as far as they can be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from training.engine.interface import SampleJob
from training.engine.sampler.logits import Choice
from training.engine.vllm.client import ServerLost, WrongAnswer
from training.errors import NonFiniteResult
from training.types import NO_DATA_LOGPROB, PromptScores, TopLogprobs

LEAST_LOGPROB = -9999.0
"""What the server writes for minus infinity, and for NaN."""


def check_model(content: Mapping[str, Any], expected: str) -> None:
    """Refuse the answer of another model than the requested one.

    Raises:
        WrongAnswer: The message names both.
    """
    if content.get("model") != expected:
        raise WrongAnswer(f"the answer is of {content.get('model')!r}, not of {expected!r}")


def only_choice(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one choice of an answer or of a chunk.

    Raises:
        ServerLost: The server ended it without being asked to.
        WrongAnswer: There is not exactly one.
    """
    choices = content.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise WrongAnswer("expected one choice")
    if choices[0].get("finish_reason") in ("abort", "error"):
        raise ServerLost(f"the server ended a request: {choices[0]['finish_reason']}")
    return choices[0]


def read_choices(choice: Mapping[str, Any], num_top: int) -> list[Choice]:
    """The tokens of a choice, each with its log-probability and the likeliest ones.

    Raises:
        WrongAnswer: Tokens and log-probabilities do not belong together.
    """
    try:
        tokens = choice["token_ids"]
        entries = choice["logprobs"]["content"] if tokens else []
        if [entry["token_id"] for entry in entries] != tokens:
            raise WrongAnswer("log-probabilities of other tokens than the sampled ones")
        return [
            Choice(
                token=entry["token_id"],
                logprob=float(entry["logprob"]),
                is_finite=math.isfinite(entry["logprob"]) and entry["logprob"] > LEAST_LOGPROB,
                top=_top(
                    {each["token_id"]: each["logprob"] for each in entry["top_logprobs"]}, num_top
                ),
            )
            for entry in entries
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise WrongAnswer(f"a choice cannot be read: {error!r}") from error


def _top(logprobs: Mapping[int, float], k: int) -> tuple[list[int], list[float]]:
    """The k likeliest tokens, or all of them if there are fewer."""
    if not k:
        return [], []
    best = sorted(logprobs.items(), key=lambda item: -item[1])[:k]
    return [token for token, _ in best], [_restored(logprob) for _, logprob in best]


def _restored(logprob: float) -> float:
    return -math.inf if logprob <= LEAST_LOGPROB else float(logprob)


def read_scores(content: Mapping[str, Any], job: SampleJob) -> PromptScores:
    """The prompt's scores in an answer, those that the job asks for.

    Raises:
        WrongAnswer: There is not one entry for each token of the prompt.
        NonFiniteResult: One of them is NaN.
    """
    rows, length, k = content.get("prompt_logprobs"), len(job.prompt), job.scoring
    if not isinstance(rows, list) or len(rows) != length:
        raise WrongAnswer("expected an entry for each token of the prompt")
    first = max(length - (k.prompt_logprobs_last_n or length - 1), 1)
    logprobs = np.full(length, np.nan, np.float32)
    num_top = k.topk_prompt_logprobs
    ids = np.zeros((length, num_top), np.int32)
    values = np.full((length, num_top), NO_DATA_LOGPROB, np.float32)
    try:
        for position in range(first, length):
            row = {int(token): each["logprob"] for token, each in rows[position].items()}
            own = row[int(job.prompt[position])]
            if any(value is None or math.isnan(value) for value in row.values()):
                raise NonFiniteResult
            logprobs[position] = _restored(own)
            top_ids, top_values = _top(row, num_top)
            ids[position, : len(top_ids)] = top_ids
            values[position, : len(top_values)] = top_values
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WrongAnswer(f"prompt_logprobs cannot be read: {error!r}") from error
    top = TopLogprobs(token_ids=ids, logprobs=values) if num_top else None
    return PromptScores(logprobs=logprobs if job.prompt_logprobs else None, top=top)


def cached_tokens(content: Mapping[str, Any]) -> int:
    """The prompt's tokens that the server did not read again."""
    usage = content.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)
