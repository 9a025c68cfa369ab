"""The options of ``asample`` for more log-probabilities, and their limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinkerapi.api.fields.field import Custom, Field, Integer
from tinkerapi.api.fields.tokens import MAX_TOKEN_ID
from tinkerapi.api.sdk.parse.json_bodies import parse_tensor_data
from training.errors import InvalidRequest, LimitExceeded
from training.types import ScoringParams

MAX_CELLS = 4_000_000
"""Most numbers for one option, 8 to 12 bytes each in the answer."""

Indices = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _check_targets(value: Any, where: str) -> tuple[np.ndarray[Any, Any], Indices | None]:
    """(rows, K) int64 with -1 for cells that are not requested, and the indices of a CSR array."""
    tokens = parse_tensor_data(value, where, pad=-1)
    if tokens.dtype != np.int64 or tokens.ndim != 2:
        raise InvalidRequest(f"{where}: expected an int64 array [len(prompt) - 1, K]")
    if tokens.min() < -1 or tokens.max() > MAX_TOKEN_ID:
        raise InvalidRequest(f"{where}: a value is neither a token id nor -1")
    if value.get("sparse_crow_indices") is None:
        return tokens, None
    crow = np.asarray(value["sparse_crow_indices"], np.int64)
    return tokens, (crow, np.asarray(value["sparse_col_indices"], np.int64))


SCORING_FIELDS: Mapping[str, Field] = {
    "topk_prompt_logprobs": Integer(description="Likeliest tokens of the prompt.", default=0),
    "topk_sample_logprobs": Integer(description="Likeliest tokens of the samples.", default=0),
    "target_prompt_logprobs": Custom(
        description="Tokens to score in the prompt.", checker=_check_targets, json={}
    ),
    "prompt_alt_tokens_k": Integer(description="Draws at each prompt position.", default=0),
    "prompt_logprobs_last_n": Integer(description="Score the end of the prompt only.", minimum=1),
}


def check_scoring(
    body: Mapping[str, Any],
    *,
    num_prompt_tokens: int | None,
    prompt_logprobs: bool,
    num_sampled_tokens: int,
) -> ScoringParams:
    """The checked options for a prompt of this length.

    Args:
        num_prompt_tokens: None if the prompt has an image and its client does not say of how many
            tokens.

    Raises:
        InvalidRequest: An option does not fit the prompt. (400)
        LimitExceeded: The answer would be too large. (400)
    """
    targets, indices = body["target_prompt_logprobs"] or (None, None)
    last_n = body["prompt_logprobs_last_n"]
    if num_prompt_tokens is None:
        for name in SCORING_FIELDS:
            if body[name] and name != "topk_sample_logprobs":
                raise InvalidRequest(
                    f"{name}: the prompt has an image; say its expected_tokens, so that the "
                    "prompt's length is known"
                )
        num_prompt_tokens = 0
    if last_n is not None and not prompt_logprobs:
        raise InvalidRequest("prompt_logprobs_last_n: needs prompt_logprobs")
    if last_n is not None and last_n >= num_prompt_tokens:
        raise InvalidRequest(
            f"prompt_logprobs_last_n: {last_n} of a prompt of {num_prompt_tokens} tokens; the "
            "first one follows nothing"
        )
    if targets is not None and len(targets) != num_prompt_tokens - 1:
        raise InvalidRequest(
            f"target_prompt_logprobs: {len(targets)} rows for a prompt of {num_prompt_tokens} "
            "tokens; expected one less than tokens"
        )
    if targets is not None and not (targets >= 0).any():
        raise InvalidRequest("target_prompt_logprobs: names no token")
    for name, cells in (
        ("topk_prompt_logprobs", num_prompt_tokens * body["topk_prompt_logprobs"]),
        ("topk_sample_logprobs", num_sampled_tokens * body["topk_sample_logprobs"]),
        ("prompt_alt_tokens_k", num_prompt_tokens * body["prompt_alt_tokens_k"]),
        ("target_prompt_logprobs", 0 if targets is None else targets.size),
    ):
        if cells > MAX_CELLS:
            raise LimitExceeded(
                f"{name}: {cells} numbers to answer; this server gives {MAX_CELLS} of one kind"
            )
    return ScoringParams(
        prompt_logprobs_last_n=last_n,
        topk_prompt_logprobs=body["topk_prompt_logprobs"],
        topk_sample_logprobs=body["topk_sample_logprobs"],
        target_prompt_logprobs=targets,
        target_indices=indices,
        prompt_alt_tokens_k=body["prompt_alt_tokens_k"],
    )
