"""A sequence of a job as the body of one request.

Each sequence is a request of its own. vLLM gives sample i of a request the seed ``seed + i``, so
sample 1 of seed 3 would be sample 0 of seed 4; here the seeds are hashed from (seed, number).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from training.engine.interface import SampleJob


def sequence_seed(seed: int, number: int) -> int:
    """The seed of sequence ``number`` of a job: from 0 to 2**63 - 1."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def request_body(
    job: SampleJob,
    number: int,
    *,
    request_id: str,
    model: str,
    max_tokens: int,
    end_token_ids: Iterable[int],
    salt: str,
) -> dict[str, Any]:
    """The body of ``POST /inference/v1/generate``.

    Args:
        number: Of the sequence in the job; only the first asks for scores of the prompt.
        model: The name of the base model or of an adapter.
        max_tokens: At least 1: the server cannot only read a prompt.
        end_token_ids: All tokens that end the sequence; the server's own do not.
        salt: Requests share the keys of a prompt only with those of the same salt.
    """
    params, scoring = job.sampling_params, job.scoring
    sampling: dict[str, Any] = {
        "n": 1,
        "temperature": params.temperature,
        "seed": sequence_seed(params.seed or 0, number),
        "max_tokens": max_tokens,
        "stop_token_ids": sorted(end_token_ids),
        "ignore_eos": True,
        "detokenize": False,
        # Of k entries it drops the last if the sampled token is not among them.
        "logprobs": scoring.topk_sample_logprobs and scoring.topk_sample_logprobs + 1,
    }
    if number == 0 and asks_for_scores(job):
        sampling["prompt_logprobs"] = scoring.topk_prompt_logprobs
    return {
        "model": model,
        "request_id": request_id,
        "token_ids": job.prompt.tolist(),
        "sampling_params": sampling,
        "cache_salt": salt,
    }


def asks_for_scores(job: SampleJob) -> bool:
    """Whether a job asks for scores of its prompt that the server computes."""
    return job.prompt_logprobs or bool(job.scoring.topk_prompt_logprobs)
