"""Results as the quick reference's bodies.

The fields of each object are in alphabetical order, as in every version. Arrays stay numpy
arrays, for the JSON writer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from training.kinds import (
    CompareRunsResult,
    CreateCustomLossResult,
    CreateRunResult,
    ForwardBackwardResult,
    LoadWeightsResult,
    OptimStepResult,
    RemoveRunResult,
    Result,
    SampleResult,
    SaveWeightsResult,
)
from training.kinds.sample_result import (
    EchoedPrompt,
    SequenceResult,
    SparseLogprobs,
    WrittenTokens,
)
from training.types import TopLogprobs

Body = dict[str, Any]


def result_body(result: Result) -> Body:
    """The body of a ready future's answer."""
    return _RENDERERS[type(result)](result)


def _create_run(result: CreateRunResult) -> Body:
    path = {} if result.path is None else {"path": result.path}
    return {
        "alpha": result.alpha,
        "base_model": result.base_model,
        "model_id": result.model_id,
        **path,
        "rank": result.rank,
    }


def _remove_run(result: RemoveRunResult) -> Body:
    return {"model_id": result.model_id, "status": "deleted"}


def _pass(result: ForwardBackwardResult) -> Body:
    metrics = {
        **result.metrics,
        "num_tokens": result.num_tokens,
        "num_weighted_tokens": result.num_weighted_tokens,
    }
    return {
        "backend": result.backend,
        "loss": result.loss,
        "loss_fn_outputs": [{"logprobs": logprobs} for logprobs in result.logprobs],
        "metrics": dict(sorted(metrics.items())),
        "model_id": result.model_id,
        "num_samples": len(result.logprobs),
        "num_tokens": result.num_tokens,
    }


def _optim_step(result: OptimStepResult) -> Body:
    metrics = {
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "step": result.step,
    }
    return {"backend": result.backend, "metrics": metrics, "model_id": result.model_id}


def _save_weights(result: SaveWeightsResult) -> Body:
    if result.sampling_session_id is not None:
        return {"model_id": result.model_id, "sampling_session_id": result.sampling_session_id}
    return {"model_id": result.model_id, "path": result.path, "size_bytes": result.size_bytes}


def _load_weights(result: LoadWeightsResult) -> Body:
    return {"model_id": result.model_id, "path": result.path}


def _compare_runs(result: CompareRunsResult) -> Body:
    return {
        "identical": result.is_identical,
        "largest_difference": dict(sorted(result.largest_difference.items())),
        "steps": result.steps,
    }


def _create_custom_loss(result: CreateCustomLossResult) -> Body:
    return {"loss_id": result.loss_id}


def _sample(result: SampleResult) -> Body:
    """``prompt_logprobs`` is the only prompt's list, or a list of one for each prompt."""
    completions = [sequence.text for sequence in result.sequences]
    scored = result.prompt_logprobs
    body: Body = {"completions": completions}
    if result.echo:
        body["echo"] = [_echo(prompt) for prompt in result.echo]
    body |= {"generated_text": completions[0], "model_id": result.model_id}
    if result.prompt_alternatives is not None:
        tokens, logprobs = result.prompt_alternatives
        body["prompt_alt_tokens"] = {"logprobs": logprobs, "tokens": tokens}
    body |= {
        "prompt_logprobs": scored[0] if len(scored) == 1 else scored,
        "sequences": [_sequence(sequence) for sequence in result.sequences],
    }
    if result.target_prompt_logprobs is not None:
        body["target_prompt_logprobs"] = _target_logprobs(result.target_prompt_logprobs)
    if result.top_prompt_logprobs is not None:
        body["topk_prompt_logprobs"] = _top(result.top_prompt_logprobs)
    return body


def _sequence(sequence: SequenceResult) -> Body:
    body = {
        "logprobs": sequence.logprobs,
        "stop_reason": sequence.stop_reason,
        "text": sequence.text,
        "tokens": sequence.tokens,
    }
    return _with_details(body, sequence.written, sequence.top)


def _echo(prompt: EchoedPrompt) -> Body:
    body: Body = {"text": prompt.text}
    if prompt.logprobs is not None:
        body["logprobs"] = prompt.logprobs
    return _with_details(body, prompt.written, prompt.top)


def _with_details(body: Body, written: WrittenTokens | None, top: TopLogprobs | None) -> Body:
    """The body of a sequence with what was requested of each token."""
    if written is None and top is None:
        return body
    if top is not None:
        body["topk_logprobs"] = _top(top)
    if written is not None:
        body |= {"text_offsets": written.offsets, "token_texts": written.texts}
        if written.utf8 is not None:
            body["token_bytes"] = _numbers(written.utf8)
        if written.top_texts is not None:
            body["topk_texts"] = written.top_texts
        if written.top_utf8 is not None:
            body["topk_bytes"] = [_numbers(row) for row in written.top_utf8]
    return dict(sorted(body.items()))


def _numbers(of_tokens: Sequence[bytes | None]) -> list[list[int] | None]:
    return [None if utf8 is None else list(utf8) for utf8 in of_tokens]


def _top(top: TopLogprobs) -> Body:
    return {"logprobs": top.logprobs, "token_ids": top.token_ids}


def _target_logprobs(target: Any) -> Any:
    if not isinstance(target, SparseLogprobs):
        return target
    return {
        "col_indices": target.col_indices,
        "crow_indices": target.crow_indices,
        "shape": target.shape,
        "values": target.values,
    }


_RENDERERS: Mapping[type[Result], Callable[[Any], Body]] = {
    CreateRunResult: _create_run,
    RemoveRunResult: _remove_run,
    ForwardBackwardResult: _pass,
    OptimStepResult: _optim_step,
    SampleResult: _sample,
    SaveWeightsResult: _save_weights,
    LoadWeightsResult: _load_weights,
    CompareRunsResult: _compare_runs,
    CreateCustomLossResult: _create_custom_loss,
}
