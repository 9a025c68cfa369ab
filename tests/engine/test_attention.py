"""Sequences of a packed stream see only themselves, and each has the same bits as alone; those
with a shared prefix have the same results as with separate ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from training.engine.torch.attention.arithmetic import TILE_TOKENS
from training.engine.torch.attention.backend import UnsupportedAttention, packed_attention
from training.engine.torch.attention.blocks import KEPT_KEYS
from training.engine.torch.attention.long_sequences import CHUNKED_TILES
from training.engine.torch.attention.sequences import SequenceAttention
from training.engine.torch.attention.variants import PLAIN, Reach, Variant
from training.engine.torch.packing.ranges import RowRange, whole_sequences
from training.engine.torch.packing.stream import PackedContext
from training.engine.torch.thread_team import ThreadTeam

LENGTHS = [3, 16, 17, 1, 30, KEPT_KEYS + 5, 16, 31, 2, KEPT_KEYS + 5, KEPT_KEYS + 5, 90]
SHAPES = {"tiny": (4, 2, 4), "real": (9, 3, 64), "one head": (1, 1, 8), "equal": (8, 8, 16)}
"""Query heads, key heads, head size."""

Numbers = tuple[torch.Tensor, ...]


def random_stream(lengths: Sequence[int], shape: str, dtype: torch.dtype) -> Numbers:
    """Queries, keys, values and the gradient of attention's output."""
    num_heads, num_key_heads, head_size = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(lengths))
    return tuple(
        torch.randn(sum(lengths), heads, head_size, generator=generator).to(dtype)
        for heads in (num_heads, num_key_heads, num_key_heads, num_heads)
    )


def make_tree(*parts: tuple[int, tuple[int, ...]]) -> list[RowRange]:
    """Ranges from their lengths and the numbers of those that come before them."""
    row_ranges: list[RowRange] = []
    start = 0
    for length, before in parts:
        seen = tuple(row_ranges[n] for n in before)
        row_ranges.append(RowRange(start=start, length=length, before=seen))
        start += length
    return row_ranges


LONG = KEPT_KEYS + 5
BRANCHES: list[tuple[int, tuple[int, ...]]] = [
    (32, ()), (5, (0,)), (16, (0,)), (48, (0,)), (3, (0, 3)), (17, (0, 3)), (6, (0,)), (20, ()),
    (LONG, ()), (7, (8,)), (7, (8,)), (16, (8,)), (19, (8, 11)), (7, (0, 3, 5)), (LONG, (0,)),
]  # fmt: skip
"""Prefixes that many share, at several depths, short and long; and a separate sequence."""

TREE = make_tree(*BRANCHES)


WINDOW = KEPT_KEYS // 2
VARIANTS = {
    "window": Variant(reach=Reach(window=WINDOW)),
    "narrow window": Variant(reach=Reach(window=5)),
    "window of one block": Variant(reach=Reach(window=TILE_TOKENS)),
    "chunks": Variant(reach=Reach(chunk=12)),
    "large chunks": Variant(reach=Reach(chunk=TILE_TOKENS + 40)),
    "cap": Variant(softcap=1.5),
    "sinks": Variant(sinks=torch.linspace(-2.0, 3.0, 4)),
    "all": Variant(reach=Reach(window=20), softcap=2.0, sinks=torch.linspace(-2.0, 3.0, 4)),
}


def attend(
    row_ranges: Sequence[RowRange],
    stream: Numbers,
    *,
    as_on_a_gpu: bool = False,
    variant: Variant = PLAIN,
    team: ThreadTeam | None = None,
) -> Numbers:
    """The output and the three gradients."""
    *inputs, grad_output = stream
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    attention = SequenceAttention(row_ranges, fuses=as_on_a_gpu, team=team)
    output = attention.attend(0, q, k, v, 0.3, variant)
    grads = torch.autograd.grad(output, (q, k, v), grad_output)
    return output.detach(), *grads


def positions_of(row_ranges: Sequence[RowRange]) -> list[int]:
    """By row, its place in its sequence."""
    return [n for r in row_ranges for n in range(r.num_before, r.num_keys)]


def plain(row_ranges: Sequence[RowRange], stream: Numbers, variant: Variant = PLAIN) -> Numbers:
    """The same by its formula, over all rows at once, in float64."""
    *inputs, grad_output = (x.double() for x in stream)
    q, k, v = (x.requires_grad_() for x in inputs)
    sees = torch.zeros(len(q), len(q), dtype=torch.bool)
    for row_range in row_ranges:
        rows = slice(row_range.start, row_range.end)
        sees[rows, rows] = torch.ones(row_range.length, row_range.length).tril().bool()
        for before in row_range.before:
            sees[rows, before.start : before.end] = True
    places = torch.tensor(positions_of(row_ranges))
    if variant.reach.window is not None:
        sees &= places[:, None] - places[None] < variant.reach.window
    if variant.reach.chunk is not None:
        chunks = places // variant.reach.chunk
        sees &= chunks[:, None] == chunks[None]
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * 0.3
    if variant.softcap is not None:
        scores = (scores / variant.softcap).tanh() * variant.softcap
    scores = scores.masked_fill(~sees, float("-inf"))
    if variant.sinks is not None:
        sinks = variant.sinks.double()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat([scores, sinks], dim=-1)
    shares = scores.softmax(-1)[..., : len(q)]
    output = torch.einsum("hqk,khd->qhd", shares, v.repeat_interleave(group, 1))
    return output.detach(), *torch.autograd.grad(output, (q, k, v), grad_output)


def lengths_of(row_ranges: Sequence[RowRange]) -> list[int]:
    return [row_range.length for row_range in row_ranges]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("as_on_a_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("row_ranges", [whole_sequences(LENGTHS), TREE], ids=["whole", "tree"])
def test_it_is_the_formula_forwards_and_backwards(
    row_ranges: list[RowRange], as_on_a_gpu: bool, shape: str
) -> None:
    stream = random_stream(lengths_of(row_ranges), shape, torch.float32)
    got = attend(row_ranges, stream, as_on_a_gpu=as_on_a_gpu)
    for ours, expected in zip(got, plain(row_ranges, stream), strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=5e-5, rtol=2e-5)


MANY_TILES = TILE_TOKENS * (CHUNKED_TILES + 1) + 21


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("variant", [None, "window", "all"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_a_sequence_of_many_tiles_is_the_formula(
    dtype: torch.dtype, tolerance: float, variant: str | None
) -> None:
    sequences = whole_sequences([MANY_TILES])
    stream = random_stream([MANY_TILES], "tiny", dtype)
    chosen = PLAIN if variant is None else VARIANTS[variant]
    got = attend(sequences, stream, variant=chosen)
    for ours, expected in zip(got, plain(sequences, stream, chosen), strict=True):
        error = (ours.double() - expected).norm() / expected.norm()
        assert error < tolerance


def test_how_many_parts_are_computed_at_once_shows_in_no_bit_of_a_long_sequence() -> None:
    lengths = [MANY_TILES, 7, KEPT_KEYS + 50]
    stream = random_stream(lengths, "real", torch.bfloat16)
    sequences = whole_sequences(lengths)
    alone = attend(sequences, stream)
    for ours, expected in zip(attend(sequences, stream, team=ThreadTeam(3)), alone, strict=True):
        assert torch.equal(ours, expected)


def test_a_layer_that_is_called_again_gets_what_was_computed() -> None:
    """Only for long sequences; others are computed again, as without keeping."""
    for length in (LONG, 16):
        q, k, v, _ = random_stream([length], "tiny", torch.float32)
        attention = SequenceAttention(whole_sequences([length]), keeps_outputs=True)
        first = attention.attend(0, q, k, v, 0.3)
        again = attention.attend(0, q + 1, k, v - 1, 0.3)
        assert torch.equal(first, again) == (length == LONG)
        assert not torch.equal(attention.attend(0, q + 1, k, v - 1, 0.3), first)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("row_ranges", [whole_sequences(LENGTHS), TREE], ids=["whole", "tree"])
def test_windows_chunks_caps_and_sinks_are_the_formula_too(
    row_ranges: list[RowRange], variant: str
) -> None:
    stream = random_stream(lengths_of(row_ranges), "tiny", torch.float32)
    got = attend(row_ranges, stream, variant=VARIANTS[variant])
    for ours, expected in zip(got, plain(row_ranges, stream, VARIANTS[variant]), strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=5e-5, rtol=2e-5)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sequences_bits_are_those_it_has_alone_in_every_variant(
    variant: str, dtype: torch.dtype
) -> None:
    stream = random_stream(LENGTHS, "tiny", dtype)
    together = attend(whole_sequences(LENGTHS), stream, variant=VARIANTS[variant])
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        own = tuple(x[rows] for x in stream)
        alone = attend(whole_sequences([length]), own, variant=VARIANTS[variant])
        for ours, expected in zip(together, alone, strict=True):
            assert torch.equal(ours[rows], expected), length
        start += length


def test_a_sequence_within_the_window_has_the_bits_of_one_without() -> None:
    stream = random_stream(LENGTHS, "real", torch.float32)
    sequences = whole_sequences(LENGTHS)
    windowed = attend(sequences, stream, variant=VARIANTS["window"])
    for ours, expected in zip(windowed, attend(sequences, stream), strict=True):
        for sequence in sequences:
            rows = slice(sequence.start, sequence.end)
            assert torch.equal(ours[rows], expected[rows]) == (sequence.length <= WINDOW)


@pytest.mark.parametrize("length", [16, LONG], ids=["short", "long"])
def test_a_row_that_many_read_gets_the_whole_sum_of_their_gradients_in_bfloat16(
    length: int,
) -> None:
    """512 equal parts: a bfloat16 sum would stop growing half way."""
    row_ranges = make_tree((length, ()), *((1, (0,)),) * 512)
    q, k, v, grad_output = random_stream(lengths_of(row_ranges), "one head", torch.float32)
    q[:] = 0  # every query attends to all keys equally
    grad_output[:length] = 0
    grad_output[length:] = 1
    stream = tuple(x.to(torch.bfloat16) for x in (q, k, v, grad_output))
    *_, grad_value = attend(row_ranges, stream)
    expected = torch.full((1, 8), 512 / (length + 1))
    torch.testing.assert_close(grad_value[0].float(), expected, rtol=1e-2, atol=0)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sequences_bits_are_those_it_has_alone(shape: str, dtype: torch.dtype) -> None:
    stream = random_stream(LENGTHS, shape, dtype)
    together = attend(whole_sequences(LENGTHS), stream)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        alone = attend(whole_sequences([length]), tuple(x[rows] for x in stream))
        for ours, expected in zip(together, alone, strict=True):
            assert torch.equal(ours[rows], expected), length
        start += length


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_of_those_that_share_a_beginning_are_those_without_others(
    shape: str, dtype: torch.dtype
) -> None:
    stream = random_stream(lengths_of(TREE), shape, dtype)
    once = attend(TREE, stream)
    doubled = make_tree(
        *BRANCHES, *((n, tuple(b + len(TREE) for b in before)) for n, before in BRANCHES)
    )
    twice = attend(doubled, tuple(torch.cat([x, x]) for x in stream))
    for alone, both in zip(once, twice, strict=True):
        assert torch.equal(both[: len(alone)], alone)
        assert torch.equal(both[len(alone) :], alone)


@pytest.mark.parametrize("variant", [PLAIN, *VARIANTS.values()], ids=["plain", *VARIANTS])
def test_a_sequence_that_is_not_finite_spares_the_others(variant: Variant) -> None:
    lengths = [5, 9, 7]
    sequences = whole_sequences(lengths)
    stream = random_stream(lengths, "tiny", torch.float32)
    expected = attend(sequences, stream, variant=variant)
    for x in stream:
        x[5:14] = float("nan")
    for ours, before in zip(attend(sequences, stream, variant=variant), expected, strict=True):
        assert ours[5:14].isnan().any()
        assert torch.equal(ours[:5], before[:5])
        assert torch.equal(ours[14:], before[14:])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "uses position_bias"),
        ({"indices": torch.zeros(1)}, "uses indices"),
        ({"dropout": 0.1}, "uses dropout"),
        ({"is_causal": False}, "reads later tokens"),
        ({"output_attentions": True}, "uses output_attentions"),
    ],
)
def test_an_argument_that_could_change_the_attention_is_refused(
    argument: dict[str, Any], message: str
) -> None:
    heads = torch.randn(1, 2, 3, 4)  # (1, H, T, D)
    layer = torch.nn.Module()
    layer.layer_idx = 0
    context = PackedContext(segments=(), attention=SequenceAttention([RowRange(start=0, length=3)]))
    harmless = {"position_ids": torch.arange(3), "use_cache": False, "dropout": 0.0, "x": None}
    packed_attention(layer, heads, heads, heads, None, packed_context=context, **harmless)

    with pytest.raises(UnsupportedAttention, match=message):
        packed_attention(
            layer, heads, heads, heads, None, packed_context=context, **{**harmless, **argument}
        )
