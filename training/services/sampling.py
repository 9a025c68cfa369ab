"""Completions: of a live model, in its order, or of frozen weights, without an order."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from django.conf import settings

from training.errors import InvalidRequest
from training.kinds import Sample
from training.paths import TinkerPath
from training.selectors import checkpoint_get
from training.services.checkpoints import checkpoint_audit_read
from training.services.images import images_check
from training.services.submission import Submission, Target, run_asked, run_target, submit
from training.types import Prompt, SamplingParams, ScoringParams, images_of

_SEED_BITS = 31  # valid for every client and every generator


def sample_submit(
    *,
    owner_id: int,
    model_id: str | None,
    base_model: str | None,
    model_path: str | None,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling_params: SamplingParams,
    prompt_logprobs: bool = False,
    topk_sample_logprobs: int = 0,
    topk_prompt_logprobs: int = 0,
    token_texts: bool = False,
    echo: bool = False,
    stream: bool = False,
    lender_id: int | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    """Submit a sample of one or more prompts.

    With ``model_id`` the sample has its place in the run's order: it sees the steps
    submitted before it and none after. Samples of a path or a base model have no order.
    A seed and a length are chosen here if the client sent none, so that a repeat after a
    crash gives the same result.

    Args:
        topk_sample_logprobs: The number of likeliest tokens at each sampled position.
        topk_prompt_logprobs: The same at each position of the prompts.
        token_texts: The result has each token's text and its offset.
        echo: The result has the prompts as well, token by token; needs ``token_texts``.
        stream: The worker sends the texts while they grow (``training.text_pieces``).
        lender_id: Another user whose checkpoints may be read too; their audit log records it.

    Raises:
        InvalidRequest: Not exactly one of model_id, base_model and model_path. (400)
        RunNotFound, CheckpointNotFound, BaseModelNotFound: (404)
    """
    if sum(value is not None for value in (model_id, base_model, model_path)) != 1:
        raise InvalidRequest(
            "model_id, base_model, model_path: give exactly one of them to say what to sample from"
        )
    request = sample_request(
        prompts=prompts,
        num_samples=num_samples,
        sampling_params=sampling_params,
        prompt_logprobs=prompt_logprobs,
        request_name=idempotency_key,
        scoring=ScoringParams(
            topk_sample_logprobs=topk_sample_logprobs, topk_prompt_logprobs=topk_prompt_logprobs
        ),
        token_texts=token_texts,
        echo=echo,
        stream=stream,
    )
    if model_id is not None:
        run = run_asked(owner_id=owner_id, model_id=model_id, idempotency_key=idempotency_key)
        return submit(request, run_target(run), idempotency_key=idempotency_key)
    summary = {}
    if model_path is not None:
        path = TinkerPath.parse(model_path, field="model_path")
        checkpoint = checkpoint_get(
            owner_id=owner_id, path=path, lender_id=lender_id, field="model_path"
        )
        if lender_id is not None:
            checkpoint_audit_read(checkpoint, reader_id=owner_id, purpose="sample")
        request = replace(request, checkpoint=checkpoint.pk)
        base_model = checkpoint.run.base_model
        summary["path"] = str(path)
    target = Target(owner_id=owner_id, base_model=base_model)
    return submit(request, target, summary=summary, idempotency_key=idempotency_key)


def sample_request(
    *,
    prompts: Sequence[Prompt],
    sampling_params: SamplingParams,
    request_name: str | None,
    **fields: Any,
) -> Sample:
    """A sample with a seed and a length, chosen here if the client sent none.

    Args:
        request_name: The client's key of this request, which determines the seed if the client sent
            none:
            a repeat must be the same request.
        fields: The other fields of ``Sample``.

    Raises:
        LimitExceeded: The prompts have more images than one request may. (400)
    """
    sampling_params = replace(
        sampling_params,
        seed=_new_seed(request_name) if sampling_params.seed is None else sampling_params.seed,
        max_tokens=(
            settings.DEFAULT_MAX_TOKENS
            if sampling_params.max_tokens is None
            else sampling_params.max_tokens
        ),
    )
    images_check(chain.from_iterable(map(images_of, prompts)), "prompt")
    return Sample(sampling_params=sampling_params, prompts=prompts, **fields)


def _new_seed(request_name: str | None) -> int:
    """31 random bits, or the same ones for the same name."""
    if request_name is None:
        return secrets.randbits(_SEED_BITS)
    digest = hashlib.sha256(request_name.encode()).digest()
    return int.from_bytes(digest[:4], "little") >> (32 - _SEED_BITS)
