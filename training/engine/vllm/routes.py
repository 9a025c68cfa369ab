"""Decides which jobs a vLLM server computes by our definitions; the others stay here.

``tinkerapi/docs/vllm.md`` has the same table for people.
"""

from __future__ import annotations

from training.engine.interface import SampleJob
from training.types import SamplingParams
from training.vllm_server import MAX_LOGPROBS

LEAST_TEMPERATURE = 0.01
"""vLLM raises a smaller one to this, except 0."""


def why_built_in(job: SampleJob, *, context_tokens: int) -> str | None:
    """Why the built-in sampler must compute a job, in a few words; None if the server can.

    Args:
        job: One that the built-in sampler would accept.
        context_tokens: The longest sequence of the server.
    """
    params, scoring = job.sampling_params, job.scoring
    if job.images:
        return "images"
    if _is_cut(params):
        return "top_k, top_p or min_p: the server's log-probabilities would be of the cut set"
    if _changes_logits(params):
        return "penalties or logit_bias: the server's log-probabilities would include them"
    if 0 < params.temperature < LEAST_TEMPERATURE:
        return "a temperature that the server would raise"
    if scoring.target_prompt_logprobs is not None or scoring.prompt_alt_tokens_k:
        return "log-probabilities of given or drawn tokens of the prompt"
    if max(scoring.topk_sample_logprobs, scoring.topk_prompt_logprobs) > MAX_LOGPROBS:
        return "more likely tokens than the server returns"
    if len(job.prompt) + 1 > context_tokens:
        return "a prompt without room for one more token"
    return None


def _is_cut(params: SamplingParams) -> bool:
    """Whether less than the whole distribution is drawn from; greedy choice draws nothing."""
    is_limited = params.top_k != -1 or params.top_p < 1 or params.min_p > 0
    return is_limited and params.temperature > 0


def _changes_logits(params: SamplingParams) -> bool:
    return bool(
        params.logit_bias
        or params.presence_penalty
        or params.frequency_penalty
        or params.repetition_penalty != 1
    )
