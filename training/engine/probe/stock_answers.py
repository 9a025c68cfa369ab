"""Stock transformers' results for a few passages: the reference of the check at the start.

Each passage is computed alone, in one pass, without a cache, with transformers' own attention, and
with a LoRA update by plain autograd on one linear layer of each name (``plain_update``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.engine.probe.called_layers import calls_noted
from training.engine.probe.few_layers import FewLayers
from training.engine.probe.near_switches import near_switches
from training.engine.probe.plain_update import draw_update
from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.logit_shape import PLAIN_LOGITS, LogitShape, find_logit_shape
from training.images import PlacedImage
from training.types import TokenIds

LENGTHS = (4, 20, 6)
"""Tokens of the passages: a short one, a longer one, and one at the end of the context."""

FEWEST_TOKENS = 8
"""A model must accept sequences of this length; every model worth training does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Passage:
    """Some tokens of one sequence, the first of them at ``first_position``."""

    tokens: Tensor
    """(n,) int64"""
    first_position: int
    sequence_tokens: int
    """The sequence's length up to the passage's end; for a part of a passage, that of the whole."""
    whole: TokenIds | None = None
    """(T,) all tokens of a sequence with images."""
    images: tuple[PlacedImage, ...] = ()

    @property
    def position_ids(self) -> Tensor:
        """(n,) int64"""
        numbers = torch.arange(len(self.tokens), device=self.tokens.device)
        return numbers + self.first_position

    def loss(self, logprobs: Tensor) -> Tensor:
        """A sum with weights of both signs over the tokens that follow, given (n, V)."""
        targets = self.tokens.roll(-1)[:, None]
        weights = torch.linspace(-1.0, 2.0, len(targets), device=logprobs.device)
        return (logprobs.gather(1, targets)[:, 0] * weights).sum()


@dataclass(frozen=True, kw_only=True, eq=False)
class StockAnswers:
    """A model's results before any part of it is replaced. ``ask_stock`` makes it."""

    passages: list[Passage]
    logprobs: list[Tensor]
    """By passage, (n, V) float32: from the layers in ``few_layers``, under the update."""
    weights: AdapterTensors
    """The update."""
    grad: Tensor
    """(P,) float32, the gradient of the sum of the passages' losses in the update."""
    few_layers: FewLayers
    crosses_windows: bool
    """Whether the configuration's windows, if any, affect the passages."""
    logit_shape: LogitShape
    """The function from the output head's output to the logits."""
    whole: Tensor
    """(n, V) float32: the longest passage's, from all layers, without the update."""
    called: frozenset[str]
    """``general_name`` of the linear layers that the decoder calls. Of the others it only reads the
    weight, so an adapter on them would have no effect."""

    def __getstate__(self) -> dict[str, object]:
        """Without the model, which stays in its process."""
        return {**self.__dict__, "few_layers": None}

    def on(self, device: torch.device) -> StockAnswers:
        """The same with all tensors on a device."""
        flat = self.weights.flat.to(device)
        return replace(
            self,
            passages=[replace(p, tokens=p.tokens.to(device)) for p in self.passages],
            logprobs=[logprobs.to(device) for logprobs in self.logprobs],
            weights=AdapterTensors(self.weights.layout, flat),
            grad=self.grad.to(device),
            whole=self.whole.to(device),
        )

    @property
    def longest(self) -> Passage:
        return max(self.passages, key=lambda passage: len(passage.tokens))


def ask_stock(
    model: PreTrainedModel, *, vocab_size: int, context_tokens: int, may_widen: bool = True
) -> StockAnswers:
    """Compute the passages with the unmodified model.

    Args:
        may_widen: See ``FewLayers``.
        context_tokens: The longest sequence that the server will accept for it, at least
            ``FEWEST_TOKENS``.

    Raises:
        Exception: Any exception of the model's own code.
    """
    passages = _make_passages(vocab_size, context_tokens, model.device)
    update = draw_update(model)
    few_layers = FewLayers(model, may_widen=may_widen)
    flat = update.weights.flat.clone().requires_grad_()
    logprobs = []
    called: set[str] = set()
    with few_layers.alone(), update.applied(flat), calls_noted(model, called):
        with near_switches(model) as has_far_windows:
            for passage in passages:
                answer = _answer(model, passage)
                passage.loss(answer).backward()
                logprobs.append(answer.detach())
        crosses_windows = not has_far_windows or _differs(model, passages, logprobs)
    answers = StockAnswers(
        passages=passages,
        logprobs=logprobs,
        weights=update.weights,
        grad=torch.zeros_like(flat) if flat.grad is None else flat.grad,
        few_layers=few_layers,
        crosses_windows=crosses_windows,
        logit_shape=_logit_shape(model, passages[0]),
        whole=torch.empty(0),
        called=frozenset(called),
    )
    with torch.no_grad():
        return replace(answers, whole=_answer(model, answers.longest))


@torch.no_grad()
def _differs(model: PreTrainedModel, passages: list[Passage], logprobs: list[Tensor]) -> bool:
    """Whether the model's results for the passages have changed."""
    return any(
        not torch.equal(_answer(model, passage), before)
        for passage, before in zip(passages, logprobs, strict=True)
    )


@torch.no_grad()
def _logit_shape(model: PreTrainedModel, passage: Passage) -> LogitShape:
    head_says: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, output: head_says.append(output.clone()))
    try:
        logits = _logits(model, passage)
    finally:
        hook.remove()
    if not head_says:
        return PLAIN_LOGITS
    return find_logit_shape(model.config.get_text_config(), head_says[0].float(), logits.float())


def _answer(model: PreTrainedModel, passage: Passage) -> Tensor:
    """(n, V) float32 log-probabilities."""
    return _logits(model, passage).float().log_softmax(-1)


def _logits(model: PreTrainedModel, passage: Passage) -> Tensor:
    """(n, V)"""
    output = model(
        input_ids=passage.tokens[None],
        position_ids=passage.position_ids[None],
        use_cache=False,
    )
    logits: Tensor = output.logits[0]
    return logits


def _make_passages(vocab_size: int, context_tokens: int, device: torch.device) -> list[Passage]:
    """Tokens spread over the vocabulary: only special ones would make bfloat16 models very
    noisy."""
    lengths = [min(length, context_tokens) for length in LENGTHS]
    generator = torch.Generator().manual_seed(0)
    return [
        Passage(
            tokens=torch.randint(vocab_size, (length,), generator=generator).to(device),
            first_position=first,
            sequence_tokens=first + length,
        )
        for length, first in zip(lengths, (0, 0, context_tokens - lengths[-1]), strict=True)
    ]
