"""Engine answers as what a future stores: the quick reference's answers, word for word.

The numbers stay numpy arrays; ``futures.payload`` stores them as bytes and the HTTP side
renders them in whichever dialect the client speaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from futures.finishing import Outcome
from futures.models import Future
from futures.payload import encode
from training.engine.interface import SampleOutput
from training.errors import TrainingError
from training.loss_checks import inputs_not_read
from training.loss_fns import ADVANTAGES, LOSS_FNS, STABLE_REINFORCE, TARGET_TOKENS, LossSpec
from training.types import (
    AdamParams,
    Datum,
    ForwardBackwardOutput,
    OptimStepOutput,
    PromptScores,
    ScoringParams,
    TokenText,
    TopLogprobs,
)

TokenTexts = Callable[[Sequence[int], Sequence[int]], list[TokenText]]
"""``Renderer.token_texts``: the texts of some tokens, sampled after those of the second list."""


def ready(future: Future, result: Mapping[str, Any], **summary: Any) -> Outcome:
    """The future's result, and a few facts of it for lists and charts."""
    return Outcome(request_id=future.id, result=encode(dict(result)), summary=summary)


def failed(future: Future, error: TrainingError) -> Outcome:
    """The future's error, as its owner will read it."""
    return Outcome(
        request_id=future.id,
        error=str(error),
        category=error.category,
        error_code=type(error).__name__,
    )


def forward_backward_ready(
    future: Future,
    *,
    model_id: str,
    backend: str,
    loss_fn: str,
    data: Sequence[Datum],
    output: ForwardBackwardOutput,
) -> Outcome:
    """``loss`` is a mean per trained token, in nats; ``loss:sum`` is what the gradient is of.

    A trained token is one whose weight (cross_entropy) or advantage (the others) is not zero.
    The mean of cross_entropy is weighted: sum(-w * lp) / sum(w), or per trained token where
    the weights do not sum to something positive. An input that the loss does not read is told by
    the metric ``not_read/<name>:sum``, the number of datums that brought it.
    """
    num_tokens = sum(len(datum.model_input) for datum in data)
    spec = LOSS_FNS.get(loss_fn)
    factors = [_factor(datum, spec) for datum in data]
    num_weighted = sum(int(np.count_nonzero(factor)) for factor in factors)
    total = sum(float(factor.sum(dtype=np.float64)) for factor in factors)
    divisor = total if spec and spec.mean_is_weighted and total > 0 else max(num_weighted, 1)
    loss = output.loss / divisor
    metrics = {
        **output.metrics,
        "loss:sum": output.loss,
        "num_tokens": num_tokens,
        "num_weighted_tokens": num_weighted,
    }
    if spec:
        not_read = inputs_not_read(spec, data).items()
        metrics |= {f"not_read/{name}:sum": count for name, count in not_read}
    if loss_fn == STABLE_REINFORCE:
        # Two names: of a call's metrics the SDK shows only those whose reduction it knows.
        metrics |= {"stable_reinforce:ours": 1, "stable_reinforce/ours:min": 1}
    if loss_fn == "cross_entropy":
        metrics["perplexity"] = math.exp(min(loss, 700.0))  # exp(710) is no float
    result = {
        "loss": loss,
        "num_samples": len(data),
        "num_tokens": num_tokens,
        "model_id": model_id,
        "backend": backend,
        "metrics": metrics,
        "loss_fn_outputs": [{"logprobs": logprobs} for logprobs in output.logprobs],
    }
    return ready(future, result, tokens=num_tokens, loss=loss)


def _factor(datum: Datum, spec: LossSpec | None) -> NDArray[Any]:
    """What each target counts, 1 where the datum does not say; of a custom loss each token."""
    name = spec.factor if spec else ADVANTAGES
    inputs = datum.loss_fn_inputs
    if name in inputs:
        return np.asarray(inputs[name])
    return np.ones(inputs[TARGET_TOKENS].shape if spec else len(datum.model_input), np.float32)


def optim_step_ready(
    future: Future, *, model_id: str, backend: str, params: AdamParams, output: OptimStepOutput
) -> Outcome:
    """What the step did, with the learning rate it did it with."""
    metrics = {
        "learning_rate": params.learning_rate,
        "grad_norm": output.grad_norm,
        "step": output.step,
    }
    return ready(
        future,
        {"metrics": metrics, "model_id": model_id, "backend": backend},
        step=output.step,
        grad_norm=output.grad_norm,
    )


def sample_ready(
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

    With one prompt ``prompt_logprobs`` is that prompt's list; None when not asked for. What
    ``scoring`` asked for, of one prompt, is there under the names of the SDK's answer.

    Args:
        prompt_tokens: Tokens of all prompts; noted in the summary.
        token_texts: The renderer's; given, each sequence also says its tokens' texts and offsets.
        prompt_texts: Of each prompt, its text and its tokens'; given, the result has them, with
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
    return ready(
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
    """A prompt in the form of a sequence: its text, its tokens and what is known of them."""
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
