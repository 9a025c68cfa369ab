"""Results as earlier versions stored them: the quick reference's answers.

Rows keep this form for as long as they are kept, and every version reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from training.kinds.compare_runs import CompareRunsResult
from training.kinds.create_custom_loss import CreateCustomLossResult
from training.kinds.create_run import CreateRunResult
from training.kinds.forward_backward import ForwardBackwardResult
from training.kinds.load_weights import LoadWeightsResult
from training.kinds.optim_step import OptimStepResult
from training.kinds.remove_run import RemoveRunResult
from training.kinds.request import Kind
from training.kinds.result import Result
from training.kinds.sample_result import (
    EchoedPrompt,
    SampleResult,
    SequenceResult,
    SparseLogprobs,
    WrittenTokens,
    top_from_payload,
)
from training.kinds.save_weights import SaveWeightsResult

First = Mapping[str, Any]

_COUNTS = ("num_tokens", "num_weighted_tokens")
"""Among the metrics of a pass, these are no metrics of the loss."""


def _create_run(first: First) -> CreateRunResult:
    return CreateRunResult.from_payload({"path": None, **first})


def _save_weights(first: First) -> SaveWeightsResult:
    none = {"path": None, "size_bytes": None, "sampling_session_id": None}
    return SaveWeightsResult.from_payload({**none, **first})


def _optim_step(first: First) -> OptimStepResult:
    return OptimStepResult.from_payload({**first, **first["metrics"]})


def _pass(first: First) -> ForwardBackwardResult:
    metrics = first["metrics"]
    return ForwardBackwardResult(
        model_id=first["model_id"],
        backend=first["backend"],
        loss=first["loss"],
        num_tokens=first["num_tokens"],
        num_weighted_tokens=metrics["num_weighted_tokens"],
        metrics={name: value for name, value in metrics.items() if name not in _COUNTS},
        logprobs=[output["logprobs"] for output in first["loss_fn_outputs"]],
    )


def _sample(first: First) -> SampleResult:
    prompt_logprobs = first["prompt_logprobs"]
    target = first.get("target_prompt_logprobs")
    alternatives = first.get("prompt_alt_tokens")
    return SampleResult(
        model_id=first["model_id"],
        sequences=[_sequence(sequence) for sequence in first["sequences"]],
        prompt_logprobs=(
            prompt_logprobs if isinstance(prompt_logprobs, list) else [prompt_logprobs]
        ),
        top_prompt_logprobs=top_from_payload(first.get("topk_prompt_logprobs")),
        target_prompt_logprobs=SparseLogprobs(**target) if isinstance(target, Mapping) else target,
        prompt_alternatives=(
            None if alternatives is None else (alternatives["tokens"], alternatives["logprobs"])
        ),
        echo=[_echo(prompt) for prompt in first.get("echo", ())],
    )


def _sequence(first: First) -> SequenceResult:
    return SequenceResult(
        stop_reason=first["stop_reason"],
        text=first["text"],
        tokens=first["tokens"],
        logprobs=first["logprobs"],
        top=top_from_payload(first.get("topk_logprobs")),
        written=_written(first) if "token_texts" in first else None,
    )


def _echo(first: First) -> EchoedPrompt:
    return EchoedPrompt(
        text=first["text"],
        written=_written(first),
        logprobs=first.get("logprobs"),
        top=top_from_payload(first.get("topk_logprobs")),
    )


def _written(first: First) -> WrittenTokens:
    utf8, top_utf8 = first.get("token_bytes"), first.get("topk_bytes")
    return WrittenTokens(
        texts=first["token_texts"],
        offsets=first["text_offsets"],
        utf8=None if utf8 is None else _bytes(utf8),
        top_texts=first.get("topk_texts"),
        top_utf8=None if top_utf8 is None else [_bytes(row) for row in top_utf8],
    )


def _bytes(of_tokens: list[list[int] | None]) -> list[bytes | None]:
    return [None if numbers is None else bytes(numbers) for numbers in of_tokens]


FIRST_RESULTS: Mapping[str, Callable[[First], Result]] = {
    Kind.CREATE_RUN: _create_run,
    Kind.REMOVE_RUN: RemoveRunResult.from_payload,
    Kind.FORWARD: _pass,
    Kind.FORWARD_BACKWARD: _pass,
    Kind.OPTIM_STEP: _optim_step,
    Kind.SAMPLE: _sample,
    Kind.SAVE_WEIGHTS: _save_weights,
    Kind.LOAD_WEIGHTS: LoadWeightsResult.from_payload,
    Kind.COMPARE_RUNS: CompareRunsResult.from_payload,
    Kind.CREATE_CUSTOM_LOSS: CreateCustomLossResult.from_payload,
}
