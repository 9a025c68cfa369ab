"""Completions of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from futures.payload import EncodedPayload, encode_payload
from training import payloads
from training.kinds.request import Kind, Order, Request
from training.payloads import Payload
from training.types import Prompt, SamplingParams, ScoringParams


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample(Request):
    """Sample completions of each prompt, with a run's, a checkpoint's or the base model's
    weights."""

    kind: ClassVar = Kind.SAMPLE
    order: ClassVar = Order.SAMPLE
    is_interruptible: ClassVar = True

    prompts: Sequence[Prompt]
    num_samples: int
    sampling_params: SamplingParams
    """With a seed and a length, so that a repeat after a crash gives the same result."""
    prompt_logprobs: bool = False
    scoring: ScoringParams = field(default_factory=ScoringParams)
    checkpoint: int | None = None
    """The checkpoint with the weights, if the lane is no run's; None for the base model."""
    token_texts: bool = False
    """The result has each token's text and its offset."""
    echo: bool = False
    """The result has the prompts as well, token by token; needs ``token_texts``."""
    stream: bool = False
    """The worker sends the texts while they grow (``training.text_pieces``)."""
    record_for: str | None = None
    """The session whose models may train on the sequences; None if they are not to be kept."""

    def to_payload(self) -> Payload:
        asked = {
            "scoring": payloads.scoring_params_to_payload(self.scoring),
            "token_texts": self.token_texts,
            "echo": self.echo,
            "stream": self.stream,
            "record": self.record_for,
        }
        return {
            "prompts": [payloads.prompt_to_payload(prompt) for prompt in self.prompts],
            "num_samples": self.num_samples,
            "sampling_params": payloads.sampling_params_to_payload(self.sampling_params),
            "prompt_logprobs": self.prompt_logprobs,
            "checkpoint": self.checkpoint,
            **{name: value for name, value in asked.items() if value},
        }

    def encoded(self) -> EncodedPayload:
        """The digest is that of the first version, which stored token ids as a list."""
        payload = self.to_payload()
        named = None
        if any("tokens" in item for item in payload["prompts"]):
            prompts = [payloads.prompt_payload_named(item) for item in payload["prompts"]]
            named = {**payload, "prompts": prompts}
        return encode_payload(self.kind, payload, named=named)

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> Self:
        return cls(
            prompts=[payloads.prompt_from_payload(item) for item in payload["prompts"]],
            num_samples=payload["num_samples"],
            sampling_params=payloads.sampling_params_from_payload(payload["sampling_params"]),
            prompt_logprobs=payload["prompt_logprobs"],
            scoring=payloads.scoring_params_from_payload(payload.get("scoring", {})),
            checkpoint=payload["checkpoint"],
            token_texts=payload.get("token_texts", False),
            echo=payload.get("echo", False),
            stream=payload.get("stream", False),
            record_for=payload.get("record"),
        )

    @property
    def cost(self) -> int:
        return sum(payloads.prompt_cost(prompt) for prompt in self.prompts)

    @property
    def most_tokens(self) -> int:
        each = self.sampling_params.max_tokens or 0
        return self.cost + len(self.prompts) * self.num_samples * each

    @property
    def has_text(self) -> bool:
        return any(not isinstance(prompt, np.ndarray) for prompt in self.prompts)

    @property
    def summary(self) -> dict[str, Any]:
        return {"prompts": len(self.prompts), "samples": self.num_samples}
