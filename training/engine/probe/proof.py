"""The check, at every start, that the engine computes the loaded model as transformers does.

The engine's assumptions do not hold for all families of models: that attention goes
through transformers' registry, that a row depends only on its own sequence and position, that keys
may be cached. A family that breaks one of them does not fail: it samples and trains, wrongly. So
the engine computes a few short passages in its own ways and compares them with stock transformers,
which computed each alone (``stock_answers``):

- packed beside each other in one stream, forwards and backwards: log-probabilities, and the
  gradient of a LoRA update;
- by chunks of their prompts, and then token by token, over our key-value cache.

Two passages begin at position 0 and one ends at the last allowed position: rotary
factors that depend on the longest sequence of a pass, and tables of positions, then show in the
others. One layer of each kind does all this; all layers compute one passage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from training.engine.probe.near_switches import near_switches
from training.engine.probe.stock_answers import FEWEST_TOKENS, Passage, StockAnswers, ask_stock
from training.engine.sampler.kv_cache import ALIGNMENT_TOKENS, KvCache, Region
from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.attention.backend import SequenceAttention
from training.engine.torch.attention.cached import (
    DecodeAttention,
    DecodeRun,
    PrefillAttention,
    PrefillChunk,
)
from training.engine.torch.attention.variants import PLAIN, Variant
from training.engine.torch.base_model import BaseModel
from training.engine.torch.out_of_memory import is_out_of_memory
from training.engine.torch.packing.ranges import whole_sequences
from training.engine.torch.packing.stream import Attention, PackedContext, Segment, uniform_segments
from training.errors import BaseModelNotFound

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Largest difference that rounding explains: for a passage's log-probabilities, in nats, the mean
over the vocabulary, in float32 at its worst position; for a gradient, relative to it. The
default model differs by 1e-5 in float32 and 0.2 in bfloat16, where single positions are
much noisier than their mean."""


def stock_answers(
    model: PreTrainedModel, *, name: str, vocab_size: int, context_tokens: int
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
        return ask_stock(model, vocab_size=vocab_size, context_tokens=context_tokens)
    except Exception as error:  # a model's own code may raise everything
        if is_out_of_memory(error):
            raise
        raise BaseModelNotFound(
            f"{name} cannot be served: transformers itself cannot compute a sequence of tokens and"
            f" positions with it ({_in_short(error)}); choose another base model."
        ) from error


def prove(base_model: BaseModel, stock: StockAnswers, *, num_layers: int) -> None:
    """Compute the same with the engine and compare.

    Raises:
        BaseModelNotFound: A result differs by more than rounding; the message says which.
    """
    prover = _Prover(base_model, stock)
    with stock.few_layers.alone(), near_switches(stock.few_layers.model):
        prover.check("sequences packed beside each other", prover.packed, stock.logprobs)
        prover.check_grad()
        prover.check("sampling over a key-value cache", prover.cached, stock.logprobs)
    prover.num_layers = num_layers
    prover.check("a sequence that passes all layers", prover.whole, [stock.whole])


class _Prover:
    def __init__(self, base_model: BaseModel, stock: StockAnswers) -> None:
        self._base_model = base_model
        self._stock = stock
        self._grad = stock.grad
        self.num_layers = stock.few_layers.num_layers

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype in which the model currently computes."""
        return self._base_model.head_weight.dtype

    @property
    def _tolerance(self) -> float:
        return TOLERANCE.get(self._dtype, TOLERANCE[torch.bfloat16])

    def check(
        self, what: str, compute: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor]
    ) -> None:
        """Refuse the model if the results of ``compute``, (n, V) by passage, are not as
        expected."""
        try:
            answers = compute()
        except BaseModelNotFound:
            raise
        except Exception as error:  # a model's own code may raise everything
            if is_out_of_memory(error):
                raise
            raise self._refusal(f"{what} cannot be computed ({_in_short(error)})") from error
        for ours, theirs in zip(answers, expected, strict=True):
            by_position = (ours - theirs).abs().mean(-1)  # (n,)
            is_exact = self._dtype == torch.float32
            worst = (by_position.max() if is_exact else by_position.mean()).item()
            if not worst <= self._tolerance:  # NaN too
                raise self._refusal(
                    f"log-probabilities of {what} differ by {worst:.2g} nats from those of each"
                    f" alone in stock transformers, and rounding explains {self._tolerance:g}"
                )

    def packed(self) -> list[Tensor]:
        """All passages in one stream, and the gradient of the update."""
        passages, weights = self._stock.passages, self._stock.weights
        grad = AdapterTensors(weights.layout, torch.zeros_like(weights.flat))
        num_rows = sum(len(passage.tokens) for passage in passages)
        segment = Segment(start=0, end=num_rows, weights=weights, grad=grad)
        attention = SequenceAttention(whole_sequences(len(p.tokens) for p in passages))
        answers = self._run(passages, segment, attention)
        losses = [p.loss(answer) for p, answer in zip(passages, answers, strict=True)]
        torch.stack(losses).sum().backward()
        self._grad = grad.flat
        return [answer.detach() for answer in answers]

    def check_grad(self) -> None:
        """Refuse the model if the gradient of ``packed`` is not autograd's."""
        layout = self._stock.weights.layout
        for name in layout.places:
            pairs = (layout.pair(flat, name) for flat in (self._grad, self._stock.grad))
            for a_or_b, ours, expected in zip("AB", *pairs, strict=True):
                size, difference = expected.norm().item(), (ours - expected).norm().item()
                share = difference / size if size else difference
                if not share <= self._tolerance:
                    raise self._refusal(
                        f"the gradient of LoRA's {a_or_b} at {name} differs by {share:.2g} of"
                        " itself from autograd's in stock transformers, and rounding explains"
                        f" {self._tolerance:g}"
                    )

    def cached(self) -> list[Tensor]:
        """Each prompt in two chunks and its last token separately, all passages side by side."""
        passages = self._stock.passages
        room = max(len(passage.tokens) for passage in passages) + ALIGNMENT_TOKENS
        cache = KvCache(len(passages) * room, self._base_model.device)
        regions = [_reserved(cache, len(passage.tokens)) for passage in passages]
        ends = [len(passage.tokens) - 1 for passage in passages]
        bounds = [(0, end // 2, end) for end in ends]
        pieces: list[list[Tensor]] = []
        with torch.no_grad():
            for n in range(2):
                cuts = [slice(*bound[n : n + 2]) for bound in bounds]
                attention = PrefillAttention(cache, _chunks(cuts, regions))
                pieces.append(self._run_parts(cuts, attention))
            runs = [
                DecodeRun(first_row=i, region=region, first_sequence=0, count=1, length=end + 1)
                for i, (region, end) in enumerate(zip(regions, ends, strict=True))
            ]
            newest = [slice(end, end + 1) for end in ends]
            pieces.append(self._run_parts(newest, DecodeAttention(cache, runs, len(runs))))
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def whole(self) -> list[Tensor]:
        """The longest passage, without the update."""
        passage = self._stock.longest
        num_rows = len(passage.tokens)
        attention = SequenceAttention(whole_sequences([num_rows]))
        with torch.no_grad():
            return self._run([passage], Segment(start=0, end=num_rows, weights=None), attention)

    def _run_parts(self, cuts: Sequence[slice], attention: Attention) -> list[Tensor]:
        """The log-probabilities (n, V) of a part of each passage, under the update."""
        parts = [
            replace(
                passage,
                tokens=passage.tokens[cut],
                first_position=passage.first_position + cut.start,
            )
            for passage, cut in zip(self._stock.passages, cuts, strict=True)
        ]
        num_rows = sum(len(part.tokens) for part in parts)
        segment = Segment(start=0, end=num_rows, weights=self._stock.weights)
        return self._run(parts, segment, attention)

    def _run(
        self, passages: Sequence[Passage], segment: Segment, attention: Attention
    ) -> list[Tensor]:
        """The log-probabilities (n, V) of the passages in one stream."""
        calls = _Counted(attention)
        hidden = self._base_model.hidden_states(
            torch.cat([passage.tokens for passage in passages]),
            torch.cat([passage.position_ids for passage in passages]),
            PackedContext(segments=[segment], attention=calls, is_long=self._is_long(passages)),
        )  # (T, C)
        if len(calls.layers) != self.num_layers or len(set(calls.layers)) != self.num_layers:
            raise self._refusal(
                f"attention is asked for {len(calls.layers)} times in a pass over"
                f" {self.num_layers} layers, not once in each"
            )
        logits = self._base_model.logits(hidden, uniform_segments(len(hidden), None))  # (T, V)
        return list(logits.log_softmax(-1).split([len(passage.tokens) for passage in passages]))

    def _is_long(self, passages: Sequence[Passage]) -> Tensor | None:
        """(T,) whether a row's passage is longer in all than the rotary switch."""
        switch = self._base_model.rotary_switch
        if switch is None:
            return None
        rows = [
            torch.full((len(passage.tokens),), passage.sequence_tokens > switch)
            for passage in passages
        ]
        return torch.cat(rows).to(self._base_model.device)

    def _refusal(self, what: str) -> BaseModelNotFound:
        other = "" if self._dtype == torch.float32 else " or TINKERAPI_DTYPE=float32"
        return BaseModelNotFound(
            f"{self._base_model.info.name} cannot be served: {what}. Its family needs something"
            f" that this server does not compute; choose another base model{other}."
        )


class _Counted(Attention):
    """Another attention, with a record of the layers that called it."""

    def __init__(self, inner: Attention) -> None:
        self._inner = inner
        self.layers: list[int] = []

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        variant: Variant = PLAIN,
    ) -> Tensor:
        self.layers.append(layer_idx)
        return self._inner.attend(layer_idx, query, key, value, scaling, variant)


def _in_short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _reserved(cache: KvCache, num_tokens: int) -> Region:
    region = cache.reserve(1, num_tokens)
    assert region is not None  # noqa: S101 - the cache was made for all of them
    return region


def _chunks(cuts: Iterable[slice], regions: Iterable[Region]) -> list[PrefillChunk]:
    chunks, row = [], 0
    for cut, region in zip(cuts, regions, strict=True):
        num_tokens = cut.stop - cut.start
        chunks.append(
            PrefillChunk(first_row=row, region=region, start=cut.start, num_tokens=num_tokens)
        )
        row += num_tokens
    return chunks
