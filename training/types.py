"""The words of the training domain as frozen values: no torch, no Django, no HTTP.

Parsers build them from a request body, services store them in a future's payload, the
worker hands them to the engine. Arrays are numpy, so that the web process needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_FLOAT32 = float(np.finfo(np.float32).max)
"""The engine computes in float32: a larger number would be infinity there."""


def wrong_length(values: NDArray[Any], num_tokens: int) -> str:
    """What is wrong with a loss fn input that has not one row per token, in the sender's terms."""
    if values.ndim == 1:
        return f"{len(values)} values for {num_tokens} tokens"
    shape = list(values.shape)
    return f"shape {shape} for {num_tokens} tokens; expected [{num_tokens}, {shape[-1]}]"


LossFnInputs = Mapping[str, NDArray[Any]]
"""Per-token inputs of a loss function by name; ``target_tokens`` int64, the rest float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Datum:
    """One training example: N input tokens and what the loss function needs at each.

    Nothing is shifted by the server: position i of every input speaks about the prediction
    made after reading ``model_input[: i + 1]``, so ``target_tokens[i]`` is token i + 1.
    """

    model_input: NDArray[np.int32]
    """(N,) token ids."""
    loss_fn_inputs: LossFnInputs
    """Arrays of shape (N,); for cross_entropy ``target_tokens`` and ``weights`` may be (N, K)."""


JsonObject = Mapping[str, Any]
"""A JSON object as a client sent it: text, numbers, booleans, None, lists and objects."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may speak in a conversation. Whether a model knows a role, its chat template says."""


@dataclass(frozen=True, kw_only=True)
class ProvenanceSpan:
    """A client's claim: this run of a datum's tokens comes from there."""

    sequence_id: str
    """A sampled sequence, by the id that ``asample`` answered."""
    is_sampled: bool
    """From its sampled tokens; if not, from the prompt of its request."""
    offset: int
    """Where the run begins there."""
    length: int


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a datum's tokens come from: each list tiles its field, in order."""

    model_input: tuple[ProvenanceSpan, ...]
    loss_fn_inputs: tuple[ProvenanceSpan, ...]
    """Of ``target_tokens``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedSequence:
    """What was kept of one sampled sequence for training on it."""

    prompt: NDArray[np.int32]
    """(P,) of its request."""
    tokens: NDArray[np.int32]
    """(L,) sampled."""
    logprobs: NDArray[np.float32]
    """(L,) of those, as they were sampled."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. What is None is not there for the template."""

    role: str
    """One of ``ROLES``."""
    content: str | None
    """None, for a message that is nothing but ``tool_calls``, is to the template as if it were
    not there: so transformers has it, since many templates would write the word None."""
    _: KW_ONLY
    name: str | None = None
    """Who of several speaks, or which tool answers."""
    tool_calls: tuple[JsonObject, ...] | None = None
    """What the assistant calls: ``{"id", "type": "function", "function": {"name", "arguments"}}``
    each. Templates expect ``arguments`` as an object; a text of JSON is for the parser to read."""
    tool_call_id: str | None = None
    """Which call a message of the role ``tool`` answers."""
    reasoning_content: str | None = None
    """What the assistant thought before it spoke; templates of thinking models place it."""

    def to_dict(self) -> dict[str, Any]:
        """The message by name: role and content, and of the rest what is set."""
        extras = {
            "name": self.name,
            "tool_calls": None if self.tool_calls is None else list(self.tool_calls),
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        given = {name: value for name, value in extras.items() if value is not None}
        return {"role": self.role, "content": self.content, **given}


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What a template is told beside the messages.

    A conversation to train takes ``tools`` and ``template_kwargs``; the other two say how a prompt
    ends and are refused there.
    """

    tools: tuple[JsonObject, ...] | None = None
    """Functions the assistant may call, as OpenAI writes them; None offers none."""
    add_generation_prompt: bool = True
    """Whether a prompt ends with the header after which the assistant speaks."""
    continue_final_message: bool = False
    """The prompt ends with the last message's own text, which sampling goes on with. Needs
    ``add_generation_prompt=False``."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the model's own template, such as ``enable_thinking``. One that the template
    does not read is refused."""


NO_CHAT_OPTIONS = ChatOptions()


@dataclass(frozen=True)
class Conversation:
    """Messages in order; the worker renders them with the model's own chat template."""

    messages: tuple[Message, ...]
    options: ChatOptions = NO_CHAT_OPTIONS

    def to_dicts(self) -> list[dict[str, Any]]:
        """``[{"role", "content", ...}, ...]``, as chat templates take them."""
        return [message.to_dict() for message in self.messages]


Prompt = Conversation | str | tuple[int, ...]
"""What sampling continues: a conversation, plain text, or token ids."""


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
    """Module names to adapt, such as ``q_proj``; None means all that the train_ flags name."""


@dataclass(frozen=True, kw_only=True)
class AdamParams:
    """AdamW for one step, decoupled weight decay, as torch.optim.AdamW computes it."""

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
    """None means as many as the server's limit and the context leave room for; 0 only reads the
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
    """Tokens that end a sequence beside what ``stop`` says; they are not in its text."""
    ignore_eos: bool = False
    """Whether the model's own end tokens end nothing."""
    presence_penalty: float = 0.0
    """Taken off the logit of a token that was sampled before; see ``engine.logit_changes``."""
    frequency_penalty: float = 0.0
    """As above, once for each time that it was sampled."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and of what was sampled less likely, above 1."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """What is added to the logits of some tokens: (token, bias), each token once."""


NO_DATA_LOGPROB = -99999.0
"""With token id 0: a cell of ``TopLogprobs`` that holds nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringParams:
    """Which log-probabilities a sample returns besides those of its tokens and of its prompt's.

    P is the prompt's length. What speaks of the P - 1 positions after the first begins at
    position 1.
    """

    prompt_logprobs_last_n: int | None = None
    """Score only so many of the prompt's last tokens; None all but the first."""
    topk_prompt_logprobs: int = 0
    """So many of the likeliest tokens at each scored prompt position."""
    topk_sample_logprobs: int = 0
    """And at each sampled position, of the tempered distribution."""
    target_prompt_logprobs: NDArray[np.int64] | None = None
    """(P - 1, K) token ids to score; -1 asks for nothing."""
    target_indices: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    """(P,) crow and (n,) col indices, if the answer is to be a CSR array like the request."""
    prompt_alt_tokens_k: int = 0
    """So many tokens drawn at each prompt position, at the request's temperature."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TopLogprobs:
    """The k likeliest tokens at each of L positions, likeliest first."""

    token_ids: NDArray[np.int32]
    """(L, k); 0 where there is no data."""
    logprobs: NDArray[np.float32]
    """(L, k); ``NO_DATA_LOGPROB`` where there is no data."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptScores:
    """What ``ScoringParams`` asked of a prompt of P tokens; None what was not asked for."""

    logprobs: NDArray[np.float32] | None = None
    """(P,) of its own tokens; NaN where not scored, and at the first always."""
    top: TopLogprobs | None = None
    """(P, k)"""
    target_logprobs: NDArray[np.float32] | None = None
    """(P - 1, K); 0 where nothing was asked for."""
    alternatives: tuple[NDArray[np.int64], NDArray[np.float32]] | None = None
    """(P - 1, k) drawn tokens and their log-probabilities."""


class TokenText(NamedTuple):
    """One token of a text."""

    text: str
    """Special tokens are written out; U+FFFD stands for bytes that are a part of a character."""
    offset: int
    """Where it begins in the whole text, in characters."""
    utf8: bytes | None
    """The true bytes; None if the vocabulary does not tell."""


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
    """The likeliest tokens at each position, if asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBackwardOutput:
    """What a pass over some data says."""

    loss: float
    """Sum over tokens and datums of the loss function."""
    logprobs: list[NDArray[np.float32]]
    """Log-probability of each datum's target tokens, in nats, shaped like ``target_tokens``."""
    metrics: dict[str, float] = field(default_factory=dict)
    """``loss:sum`` and whatever the loss function adds; keys are ``name:reduction``."""


@dataclass(frozen=True, kw_only=True)
class OptimStepOutput:
    """What one optimizer step did."""

    step: int
    """How many steps this adapter has taken, this one included."""
    grad_norm: float
    """Global L2 norm of the accumulated gradient before clipping."""
