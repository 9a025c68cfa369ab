"""The terms of the training domain as frozen values: no torch, no Django, no HTTP.

Parsers build them from a request body, services store them in a future's payload, the
worker hands them to the engine. Arrays are numpy, so that the web process needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.conversations import (
    NO_CHAT_OPTIONS,
    ROLES,
    ChatOptions,
    Conversation,
    JsonObject,
    Message,
)
from training.images import Chunks, Image, PlacedImage

__all__ = [
    "MAX_FLOAT32",
    "NO_CHAT_OPTIONS",
    "NO_DATA_LOGPROB",
    "ROLES",
    "AdamParams",
    "ChatOptions",
    "Conversation",
    "Datum",
    "Example",
    "ForwardBackwardOutput",
    "ImageDatum",
    "JsonObject",
    "LoraConfig",
    "LossFnInputs",
    "Message",
    "OptimStepOutput",
    "Prompt",
    "PromptScores",
    "Provenance",
    "ProvenanceSpan",
    "RecordedSequence",
    "SampledSequence",
    "SamplingParams",
    "ScoringParams",
    "TokenIds",
    "TokenPrompt",
    "TokenText",
    "TopLogprobs",
    "Unrendered",
    "images_of",
    "wrong_length",
]

MAX_FLOAT32 = float(np.finfo(np.float32).max)
"""The engine computes in float32: a larger number would be infinity there."""


def wrong_length(values: NDArray[Any], num_tokens: int) -> str:
    """The error for a loss fn input without exactly one row per token, in the sender's terms."""
    if values.ndim == 1:
        return f"{len(values)} values for {num_tokens} tokens"
    shape = list(values.shape)
    return f"shape {shape} for {num_tokens} tokens; expected [{num_tokens}, {shape[-1]}]"


TokenIds = NDArray[np.int32]
"""(T,) token ids of one text; nobody writes into it."""

LossFnInputs = Mapping[str, NDArray[Any]]
"""Per-token inputs of a loss function by name; ``target_tokens`` int64, the rest float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Datum:
    """One training example: N input tokens and the loss function's inputs for each.

    Nothing is shifted by the server: position i of every input belongs to the prediction
    made after reading ``model_input[: i + 1]``, so ``target_tokens[i]`` is token i + 1.
    """

    model_input: TokenIds
    """(N,) token ids, those that stand for an image included."""
    loss_fn_inputs: LossFnInputs
    """Arrays of shape (N,); for cross_entropy ``target_tokens`` and ``weights`` may be (N, K)."""
    images: tuple[PlacedImage, ...] = ()
    """The images among the tokens, in order."""

    @property
    def num_tokens(self) -> int:
        """N"""
        return len(self.model_input)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDatum:
    """A ``Datum`` with images whose tokens are not placed yet."""

    model_input: Chunks
    loss_fn_inputs: LossFnInputs

    @property
    def num_tokens(self) -> int | None:
        """None if only the model's processor knows how many stand for an image."""
        return self.model_input.num_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenPrompt:
    """A prompt in tokens, for sampling."""

    tokens: TokenIds
    """(T,), those that stand for an image included."""
    images: tuple[PlacedImage, ...] = ()
    """The images among the tokens, in order."""


@dataclass(frozen=True, kw_only=True)
class ProvenanceSpan:
    """A client's claim about the origin of consecutive tokens of a datum."""

    sequence_id: str
    """A sampled sequence, by the id that ``asample`` answered."""
    is_sampled: bool
    """True: from its sampled tokens; False: from the prompt of its request."""
    offset: int
    """The offset of the first token there."""
    length: int


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of a datum's tokens: each list covers its field, in order, without gaps."""

    model_input: tuple[ProvenanceSpan, ...]
    loss_fn_inputs: tuple[ProvenanceSpan, ...]
    """The spans of ``target_tokens``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedSequence:
    """The record of one sampled sequence, for training on it."""

    prompt: NDArray[np.int32]
    """(P,) tokens of its request."""
    tokens: NDArray[np.int32]
    """(L,) sampled."""
    logprobs: NDArray[np.float32]
    """(L,) log-probabilities when they were sampled."""


Unrendered = Conversation | ImageDatum
"""A training example with text or images, of which the worker makes tokens."""

Example = Unrendered | Datum
"""A training example as it is submitted."""

Prompt = Conversation | str | TokenIds | Chunks
"""The beginning for sampling: a conversation, plain text, token ids, or token ids and images."""


def images_of(item: Example | Prompt) -> list[Image]:
    """The images of a submitted example or prompt."""
    if isinstance(item, Conversation | Chunks):
        return item.images
    return item.model_input.images if isinstance(item, ImageDatum) else []


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The shape of one adapter."""

    rank: int = 32
    """R, the inner dimension of each pair of LoRA matrices."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    seed: int = 0
    """Seeds the initial A matrices, module by module; B starts at zero."""
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    """Whether the output head gets an adapter too."""
    target_modules: tuple[str, ...] | None = None
    """Module names to adapt, such as ``q_proj``; None means all modules of the train_ flags."""
    share_across_experts: bool = True
    """In a mixture of experts: whether the experts of a layer share, of each pair, the matrix at
    the side of the hidden states (A of gate and up, B of down). False gives each its own two."""


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    """AdamW for one step, decoupled weight decay, as in torch.optim.AdamW."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Largest global gradient norm; 0 means no clipping."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends."""

    max_tokens: int | None = None
    """None means as many as the server's limit and the context allow; 0 only reads the
    prompt."""
    seed: int | None = None
    """Sample i of a request depends on (seed, i) only; None lets the server choose a seed."""
    stop: tuple[str, ...] | tuple[int, ...] | None = None
    """Stop strings or token ids. None stops at the model's own end tokens; () never stops."""
    temperature: float = 1.0
    """0 means greedy. Returned log-probabilities are those of the tempered distribution."""
    top_k: int = -1
    """-1 means no limit."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one's probability are not drawn."""
    stop_token_ids: tuple[int, ...] = ()
    """Further tokens that end a sequence, beside ``stop``; they are not in its text."""
    ignore_eos: bool = False
    """Whether the model's end tokens do not end a sequence."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of a token that was sampled before; see
    ``engine.logit_changes``."""
    frequency_penalty: float = 0.0
    """Also subtracted, for each time that it was sampled."""
    repetition_penalty: float = 1.0
    """Above 1, it makes tokens of the prompt and the completion less likely."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Values added to the logits of some tokens: (token, bias), each token once."""


NO_DATA_LOGPROB = -99999.0
"""With token id 0: marks an empty cell of ``TopLogprobs``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringParams:
    """The log-probabilities to return besides those of sampled tokens and of prompt tokens.

    P is the prompt's length. Arrays of P - 1 rows begin at
    position 1, since the first token is not predicted.
    """

    prompt_logprobs_last_n: int | None = None
    """Score only this many of the prompt's last tokens; None: all except the first."""
    topk_prompt_logprobs: int = 0
    """The number of likeliest tokens at each scored prompt position."""
    topk_sample_logprobs: int = 0
    """The same at each sampled position, of the tempered distribution."""
    target_prompt_logprobs: NDArray[np.int64] | None = None
    """(P - 1, K) token ids to score; -1 for none."""
    target_indices: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    """(P,) crow and (n,) col indices, if the answer is to be a CSR array like the request."""
    prompt_alt_tokens_k: int = 0
    """The number of tokens to draw at each prompt position, at the request's temperature."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TopLogprobs:
    """The k likeliest tokens at each of L positions, likeliest first."""

    token_ids: NDArray[np.int32]
    """(L, k); 0 where there is no data."""
    logprobs: NDArray[np.float32]
    """(L, k); ``NO_DATA_LOGPROB`` where there is no data."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptScores:
    """The scores of a prompt of P tokens that ``ScoringParams`` requested; the others are None."""

    logprobs: NDArray[np.float32] | None = None
    """(P,) of its own tokens; NaN where not scored, and at the first always."""
    top: TopLogprobs | None = None
    """(P, k)"""
    target_logprobs: NDArray[np.float32] | None = None
    """(P - 1, K); 0 for cells that were not requested."""
    alternatives: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    """(P - 1, k) drawn tokens and their log-probabilities."""


class TokenText(NamedTuple):
    """One token of a text."""

    text: str
    """Special tokens are written out; U+FFFD stands for bytes that are a part of a character."""
    offset: int
    """Its offset in the whole text, in characters."""
    utf8: bytes | None
    """Its bytes; None if the vocabulary does not give them."""


@dataclass(frozen=True, kw_only=True)
class SampledSequence:
    """One completion."""

    tokens: list[int]
    """Sampled token ids, the end token included when one was sampled."""
    logprobs: list[float]
    """Log-probability of each sampled token, in nats."""
    stop_reason: str
    """``stop`` or ``length``."""
    text: str = ""
    """The tokens as text, without special tokens and without a matched stop string."""
    top: TopLogprobs | None = None
    """The likeliest tokens at each position, if requested."""


@dataclass(frozen=True, kw_only=True)
class PassMemory:
    """The memory of a large pass, above what the worker used before it."""

    planned_bytes: int
    """The estimate that was made before the pass."""
    peak_bytes: int | None
    """The most that was seen; None if it was not measured."""
    recomputed: bool
    """Whether layers kept only their input, and computed the rest again in the backward pass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBackwardOutput:
    """The result of a pass over some data."""

    loss: float
    """Sum over tokens and datums of the loss function."""
    logprobs: list[NDArray[np.float32]]
    """Log-probability of each datum's target tokens, in nats, shaped like ``target_tokens``."""
    metrics: dict[str, float] = field(default_factory=dict)
    """``loss:sum`` and the loss function's own metrics; keys are ``name:reduction``."""
    memory: PassMemory | None = None
    """The memory of the pass, which other requests may have shared; None if it was small."""


@dataclass(frozen=True, kw_only=True)
class OptimStepOutput:
    """The result of one optimizer step."""

    step: int
    """The adapter's number of steps, this one included."""
    grad_norm: float
    """Global L2 norm of the accumulated gradient before clipping."""
