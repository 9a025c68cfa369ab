"""The sampled sequences of a request, and the scores of its prompts.

The arrays of all sequences are stored as one, and so are those of all prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from training.kinds.result import Result, divided, joined
from training.payloads import Payload
from training.types import TopLogprobs


@dataclass(frozen=True, kw_only=True, eq=False)
class WrittenTokens:
    """The L tokens of a text, each by itself."""

    texts: Sequence[str]
    """See ``TokenText.text``."""
    offsets: Sequence[int]
    """Each token's offset in the text, in characters."""
    utf8: Sequence[bytes | None] | None = None
    """Each token's bytes, None where the vocabulary does not give them; None as a whole if they
    are those of ``texts``."""
    top_texts: Sequence[Sequence[str]] | None = None
    """(L, k) texts of the likeliest tokens at each position, if they were requested."""
    top_utf8: Sequence[Sequence[bytes | None]] | None = None
    """(L, k), as ``utf8``."""

    def to_payload(self) -> Payload:
        rare = {"utf8": self.utf8, "top_texts": self.top_texts, "top_utf8": self.top_utf8}
        given = {name: value for name, value in rare.items() if value is not None}
        return {"texts": self.texts, "offsets": self.offsets, **given}


@dataclass(frozen=True, kw_only=True, eq=False)
class SequenceResult:
    """One sampled sequence of L tokens."""

    stop_reason: str
    """``stop`` or ``length``."""
    text: str
    """The tokens as text, without special tokens and without a matched stop string."""
    tokens: NDArray[np.int32]
    """(L,), a sampled end token included."""
    logprobs: NDArray[np.float32]
    """(L,) in nats."""
    top: TopLogprobs | None = None
    """(L, k), if requested."""
    written: WrittenTokens | None = None
    """If requested."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EchoedPrompt:
    """A prompt of P tokens in the form of a sequence."""

    text: str
    written: WrittenTokens
    logprobs: NDArray[np.float32] | None = None
    """(P,); NaN where not scored."""
    top: TopLogprobs | None = None
    """(P, k)"""

    def to_payload(self) -> Payload:
        payload = {"text": self.text, "written": self.written.to_payload()}
        if self.logprobs is not None:
            payload["logprobs"] = self.logprobs
        return payload if self.top is None else {**payload, "top": top_to_payload(self.top)}

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(
            text=payload["text"],
            written=WrittenTokens(**payload["written"]),
            logprobs=payload.get("logprobs"),
            top=top_from_payload(payload.get("top")),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseLogprobs:
    """Log-probabilities of some cells of a matrix, as a CSR array."""

    values: NDArray[np.float32]
    """(n,)"""
    crow_indices: NDArray[np.int64]
    """(rows + 1,)"""
    col_indices: NDArray[np.int64]
    """(n,)"""
    shape: Sequence[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleResult(Result):
    """Sequences, those of the first prompt first, and the scores of the prompts."""

    model_id: str | None
    """The name of the sampled run; None if the weights were not a run's."""
    sequences: Sequence[SequenceResult]
    prompt_logprobs: Sequence[NDArray[np.float32] | None]
    """Of each prompt: (P,) in nats, NaN where not scored; None if not requested."""
    top_prompt_logprobs: TopLogprobs | None = None
    """(P, k) of the only prompt, as are the two scores below."""
    target_prompt_logprobs: NDArray[np.float32] | SparseLogprobs | None = None
    """(P - 1, K), 0 where the request had -1; sparse if the request was."""
    prompt_alternatives: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    """(P - 1, k) drawn tokens and their log-probabilities."""
    echo: Sequence[EchoedPrompt] = ()
    """The prompts, if they are to be repeated."""
    cached_prompt_tokens: int = 0
    """Tokens of all prompts that were not read, because earlier requests had read them."""

    def to_payload(self) -> Payload:
        sequences = self.sequences
        payload: Payload = {
            "model_id": self.model_id,
            "stop_reasons": [sequence.stop_reason for sequence in sequences],
            "texts": [sequence.text for sequence in sequences],
            "lengths": [len(sequence.tokens) for sequence in sequences],
            "tokens": joined([sequence.tokens for sequence in sequences], np.int32),
            "logprobs": joined([sequence.logprobs for sequence in sequences], np.float32),
            # -1 stands for a prompt that was not scored.
            "prompt_lengths": [
                -1 if scored is None else len(scored) for scored in self.prompt_logprobs
            ],
        }
        if scored := [scored for scored in self.prompt_logprobs if scored is not None]:
            payload["prompt_logprobs"] = joined(scored, np.float32)
        if tops := [sequence.top for sequence in sequences if sequence.top is not None]:
            payload["top"] = {
                "token_ids": joined([top.token_ids for top in tops], np.int32),
                "logprobs": joined([top.logprobs for top in tops], np.float32),
            }
        if any(sequence.written is not None for sequence in sequences):
            payload["written"] = [
                sequence.written.to_payload() for sequence in sequences if sequence.written
            ]
        if self.top_prompt_logprobs is not None:
            payload["top_prompt_logprobs"] = top_to_payload(self.top_prompt_logprobs)
        if self.target_prompt_logprobs is not None:
            payload["target_prompt_logprobs"] = _target_to_payload(self.target_prompt_logprobs)
        if self.prompt_alternatives is not None:
            payload["prompt_alternatives"] = list(self.prompt_alternatives)
        if self.echo:
            payload["echo"] = [prompt.to_payload() for prompt in self.echo]
        if self.cached_prompt_tokens:
            payload["cached_prompt_tokens"] = self.cached_prompt_tokens
        return payload

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        alternatives = payload.get("prompt_alternatives")
        return cls(
            model_id=payload["model_id"],
            sequences=_sequences_from_payload(payload),
            prompt_logprobs=_prompt_logprobs_from_payload(payload),
            top_prompt_logprobs=top_from_payload(payload.get("top_prompt_logprobs")),
            target_prompt_logprobs=_target_from_payload(payload.get("target_prompt_logprobs")),
            prompt_alternatives=None if alternatives is None else tuple(alternatives),
            echo=[EchoedPrompt.from_payload(item) for item in payload.get("echo", ())],
            cached_prompt_tokens=payload.get("cached_prompt_tokens", 0),
        )


def _sequences_from_payload(payload: Mapping[str, Any]) -> list[SequenceResult]:
    lengths = payload["lengths"]
    tops: list[TopLogprobs | None] = [None] * len(lengths)
    if (top := payload.get("top")) is not None:
        tops = [
            TopLogprobs(token_ids=token_ids, logprobs=logprobs)
            for token_ids, logprobs in zip(
                divided(top["token_ids"], lengths), divided(top["logprobs"], lengths), strict=True
            )
        ]
    written: list[WrittenTokens | None] = [None] * len(lengths)
    if "written" in payload:
        written = [WrittenTokens(**item) for item in payload["written"]]
    return [
        SequenceResult(
            stop_reason=stop_reason,
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            top=likely,
            written=by_token,
        )
        for stop_reason, text, tokens, logprobs, likely, by_token in zip(
            payload["stop_reasons"],
            payload["texts"],
            divided(payload["tokens"], lengths),
            divided(payload["logprobs"], lengths),
            tops,
            written,
            strict=True,
        )
    ]


def _prompt_logprobs_from_payload(
    payload: Mapping[str, Any],
) -> list[NDArray[np.float32] | None]:
    lengths = payload["prompt_lengths"]
    if "prompt_logprobs" not in payload:
        return [None] * len(lengths)
    parts = iter(divided(payload["prompt_logprobs"], [n for n in lengths if n >= 0]))
    return [None if length < 0 else next(parts) for length in lengths]


def top_to_payload(top: TopLogprobs) -> Payload:
    return {"token_ids": top.token_ids, "logprobs": top.logprobs}


def top_from_payload(payload: Mapping[str, Any] | None) -> TopLogprobs | None:
    return None if payload is None else TopLogprobs(**payload)


def _target_to_payload(target: NDArray[np.float32] | SparseLogprobs) -> Any:
    if not isinstance(target, SparseLogprobs):
        return target
    return {
        "values": target.values,
        "crow_indices": target.crow_indices,
        "col_indices": target.col_indices,
        "shape": list(target.shape),
    }


def _target_from_payload(payload: Any) -> NDArray[np.float32] | SparseLogprobs | None:
    return SparseLogprobs(**payload) if isinstance(payload, Mapping) else payload
