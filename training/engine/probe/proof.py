"""The check, at every start, that the engine computes the loaded model as transformers does.

The engine's assumptions do not hold for all families of models: that attention goes
through transformers' registry, that a row depends only on its own sequence and position, that keys
may be cached. A family that breaks one of them does not fail: it samples and trains, wrongly. So
the engine computes a few short passages in a layout's own ways and compares them with stock
transformers, which computed each alone (``stock_answers``):

- beside each other in one pass, forwards and backwards: log-probabilities, and the
  gradient of a LoRA update;
- by parts of their prompts, and then token by token, over the layout's cache.

Two passages begin at position 0 and one ends at the last allowed position: rotary
factors that depend on the longest sequence of a pass, and tables of positions, then show in the
others. One layer of each kind does all this; all layers compute one passage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.engine.error_text import error_text
from training.engine.probe.comparison import logprob_difference, relative_difference, tolerance
from training.engine.probe.near_switches import near_switches
from training.engine.probe.passes import PackedPasses, PaddedPasses, ProbePasses, Unproven
from training.engine.probe.shared_rectangles import longest_shared
from training.engine.probe.stock_answers import FEWEST_TOKENS, StockAnswers, ask_stock
from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.base_model import BaseModel
from training.engine.torch.out_of_memory import is_out_of_memory
from training.engine.torch.packing.stream import Segment
from training.errors import BaseModelNotFound


def stock_answers(
    model: PreTrainedModel,
    *,
    name: str,
    vocab_size: int,
    context_tokens: int,
    may_widen: bool = True,
) -> StockAnswers:
    """``ask_stock``, with its failures turned into refusals.

    Raises:
        BaseModelNotFound: The model cannot compute the passages.
    """
    if context_tokens < FEWEST_TOKENS:
        raise BaseModelNotFound(
            f"{name} cannot be served: it takes sequences of at most {context_tokens} tokens."
        )
    try:
        return ask_stock(
            model, vocab_size=vocab_size, context_tokens=context_tokens, may_widen=may_widen
        )
    except Exception as error:  # a model's own code may raise everything
        if is_out_of_memory(error):
            raise
        raise BaseModelNotFound(
            f"{name} cannot be served: transformers itself cannot compute a sequence of tokens and"
            f" positions with it ({error_text(error)}); choose another base model."
        ) from error


def prove(base_model: BaseModel, stock: StockAnswers, *, num_layers: int) -> BaseModel:
    """Compute the same with the engine, in the base model's layout, and compare.

    Returns:
        The base model, which reads prompts by parts only if its cache allows that, and whose
        requests share rectangles up to the length that keeps their bits.

    Raises:
        Unproven: A result differs by more than rounding.
    """
    with stock.few_layers.alone(), near_switches(stock.few_layers.model):
        prover = _Prover(base_model, stock, num_layers=stock.few_layers.num_layers)
        prover.check_beside()
        base_model = _proven_cache(base_model, stock)
    _Prover(base_model, stock, num_layers=num_layers).check_whole()
    return replace(base_model, shared_tokens=longest_shared(base_model, stock))


def _proven_cache(base_model: BaseModel, stock: StockAnswers) -> BaseModel:
    """Some models' caches are wrong after a prompt in parts, and right after a whole one."""
    num_layers = stock.few_layers.num_layers
    try:
        _Prover(base_model, stock, num_layers=num_layers).check_cached()
    except Unproven:
        if not (base_model.is_padded and base_model.reads_chunks):
            raise
        base_model = replace(base_model, reads_chunks=False)
        _Prover(base_model, stock, num_layers=num_layers).check_cached()
    return base_model


class _Prover:
    def __init__(self, base_model: BaseModel, stock: StockAnswers, *, num_layers: int) -> None:
        self._base_model = base_model
        self._stock = stock
        self._passes: ProbePasses = (
            PaddedPasses(base_model)
            if base_model.is_padded
            else PackedPasses(base_model, num_layers=num_layers)
        )

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype in which the model currently computes."""
        return self._base_model.head_weight.dtype

    @property
    def _tolerance(self) -> float:
        return tolerance(self._dtype)

    def check_beside(self) -> None:
        """Compare passages beside each other, and the gradient of the update."""
        weights = self._stock.weights
        grad = AdapterTensors(weights.layout, torch.zeros_like(weights.flat))
        what = f"sequences {self._base_model.info.layout} beside each other"
        self._check(what, lambda: self._trained(weights, grad), self._stock.logprobs)
        group = self._base_model.group
        if group is not None and group.splits_layers:
            group.add_up(grad.flat)
        self._check_grad(grad.flat)

    def _trained(self, weights: AdapterTensors, grad: AdapterTensors) -> list[Tensor]:
        """All passages in one pass, with the gradient of the update added to ``grad``."""
        passages = self._stock.passages
        num_rows = sum(len(passage.tokens) for passage in passages)
        segment = Segment(start=0, end=num_rows, weights=weights, grad=grad)
        answers = self._passes.beside(passages, segment)
        losses = [p.loss(answer) for p, answer in zip(passages, answers, strict=True)]
        torch.stack(losses).sum().backward()
        return [answer.detach() for answer in answers]

    def check_cached(self) -> None:
        """Compare passages that are read over a cache."""

        def compute() -> Sequence[Tensor]:
            return self._passes.cached(self._stock.passages, self._stock.weights)

        self._check("sampling over a cache", compute, self._stock.logprobs)

    def check_whole(self) -> None:
        """Compare the longest passage, without the update."""
        passage = self._stock.longest
        segment = Segment(start=0, end=len(passage.tokens), weights=None)

        @torch.no_grad()
        def compute() -> Sequence[Tensor]:
            return self._passes.beside([passage], segment)

        self._check("a sequence that passes all layers", compute, [self._stock.whole])

    def _check(
        self, what: str, compute: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]
    ) -> None:
        """Compare the results of ``compute``, (n, V) by passage, with the expected ones."""
        try:
            answers = compute()
        except Unproven:
            raise
        except Exception as error:  # a model's own code may raise everything
            if is_out_of_memory(error):
                raise
            raise Unproven(f"{what} cannot be computed ({error_text(error)})") from error
        for ours, theirs in zip(answers, expected, strict=True):
            worst = logprob_difference(ours, theirs, self._dtype)
            if not worst <= self._tolerance:  # NaN too
                raise Unproven(
                    f"log-probabilities of {what} differ by {worst:.2g} nats from those of each"
                    f" alone in stock transformers, and rounding explains {self._tolerance:g}"
                )

    def _check_grad(self, flat: Tensor) -> None:
        """Compare a gradient (P,) with autograd's."""
        layout = self._stock.weights.layout
        for name in layout.places:
            pairs = (layout.pair(numbers, name) for numbers in (flat, self._stock.grad))
            for a_or_b, ours, expected in zip("AB", *pairs, strict=True):
                share = relative_difference(ours, expected)
                if not share <= self._tolerance:
                    raise Unproven(
                        f"the gradient of LoRA's {a_or_b} at {name} differs by {share:.2g} of"
                        " itself from autograd's in stock transformers, and rounding explains"
                        f" {self._tolerance:g}"
                    )
