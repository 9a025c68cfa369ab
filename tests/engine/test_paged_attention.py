"""Attention over the blocks of a cache: what it computes, and what its bits do not depend on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_frozen_products import CountingTeam
from training.engine.sampler.kv_cache import KvCache
from training.engine.torch.attention.arithmetic import BLOCK_TOKENS, blocks_for
from training.engine.torch.attention.paged import PagedAttention
from training.engine.torch.attention.paged_parts import Part
from training.engine.torch.attention.variants import PLAIN, Reach, Variant
from training.engine.torch.thread_team import ThreadTeam

CPU = torch.device("cpu")
NUM_BLOCKS = 40
SHAPES = [(3, 3, 64), (2, 1, 16), (1, 4, 8), (2, 7, 80), (1, 2, 4)]
"""Key heads, query heads that share each, and the size of a head."""

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def variants(num_heads: int) -> list[Variant]:
    sinks = torch.randn(num_heads, generator=torch.Generator().manual_seed(1))
    return [
        PLAIN,
        Variant(reach=Reach(window=37)),
        Variant(reach=Reach(chunk=50), softcap=20.0),
        Variant(sinks=sinks),
        Variant(reach=Reach(window=300), sinks=sinks),
    ]


def rows_of(length: int, shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Rows:
    """Queries, keys and values of one sequence."""
    num_key_heads, heads_each, head_size = shape
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(length, heads, head_size, generator=generator).to(dtype)
        for heads in (num_key_heads * heads_each, num_key_heads, num_key_heads)
    )
    return query, key, value


def by_formula(rows: Rows, variant: Variant, scaling: float) -> torch.Tensor:
    """(T, Hq, D) in float64."""
    query, key, value = (x.double() for x in rows)
    heads_each = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(heads_each, 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    if variant.softcap is not None:
        scores = variant.softcap * (scores / variant.softcap).tanh()
    positions = torch.arange(len(query))
    scores = scores.masked_fill(~variant.reach.sees(positions, positions), -math.inf)
    if variant.sinks is not None:
        sinks = variant.sinks.double().view(-1, 1, 1).expand(-1, len(query), 1)
        scores = torch.cat([scores, sinks], dim=-1)
    shares = scores.softmax(-1)[..., : len(query)]
    return torch.einsum("hqk,khd->qhd", shares, value)


def parts_of(sequences: Iterable[tuple[Sequence[int], slice]]) -> tuple[list[Part], int]:
    """The parts of a pass over some tokens of each sequence, from its blocks; and the rows."""
    parts, row = [], 0
    for blocks, cut in sequences:
        size = cut.stop - cut.start
        parts.append(Part(first_row=row, start=cut.start, num_tokens=size, blocks=blocks))
        row += size
    return parts, row


def attend(
    cache: KvCache,
    sequences: Sequence[tuple[Rows, Sequence[int], slice]],
    variant: Variant,
    scaling: float,
) -> list[torch.Tensor]:
    """One pass over a part of each sequence, with the blocks of each."""
    parts, num_rows = parts_of((blocks, cut) for _, blocks, cut in sequences)
    query, key, value = (torch.cat([rows[i][cut] for rows, _, cut in sequences]) for i in range(3))
    output = PagedAttention(cache, parts, num_rows).attend(0, query, key, value, scaling, variant)
    return list(output.split([part.num_tokens for part in parts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("number", range(5))
@given(data=st.data())
@settings(max_examples=10)
def test_a_row_has_the_same_bits_however_its_sequence_is_read(
    dtype: torch.dtype, shape: tuple[int, int, int], number: int, data: st.DataObject
) -> None:
    """In one pass or in any parts, token by token, over any blocks, with any other sequences."""
    variant = variants(shape[0] * shape[1])[number]
    scaling = shape[2] ** -0.5
    length = data.draw(st.sampled_from([1, 2, 5, 33, 64, 100, 290, 700]))
    rows = rows_of(length, shape, dtype, seed=length)
    alone = KvCache(NUM_BLOCKS, CPU)
    (expected,) = attend(
        alone, [(rows, range(blocks_for(length)), slice(0, length))], variant, scaling
    )
    tolerance = 3e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        expected.double(), by_formula(rows, variant, scaling), atol=tolerance, rtol=tolerance
    )

    rng = random.Random(data.draw(st.integers(0, 2**32)))  # noqa: S311 - no secret
    cache = KvCache(NUM_BLOCKS, CPU)
    blocks = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    own, others = blocks[: blocks_for(length)], blocks[blocks_for(length) :]
    cuts = sorted({0, length, max(length - 1, 0), *(rng.randrange(length) for _ in range(5))})
    other_length = rng.randrange(1, len(others) * BLOCK_TOKENS)
    other = rows_of(other_length, shape, dtype, seed=7)
    read = 0
    for start, end in pairwise(cuts):
        together = [(rows, own, slice(start, end))]
        if read < other_length:
            size = rng.choice([1, min(9, other_length - read)])
            together.insert(rng.randrange(2), (other, others, slice(read, read + size)))
            read += size
        for (each, _, cut), got in zip(
            together, attend(cache, together, variant, scaling), strict=True
        ):
            if each is rows:
                assert torch.equal(got, expected[cut])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("num_shared", [1, 5, 11])
def test_a_row_has_the_same_bits_if_others_share_its_first_blocks(
    dtype: torch.dtype, shape: tuple[int, int, int], number: int, num_shared: int
) -> None:
    variant = variants(shape[0] * shape[1])[number]
    prompt = num_shared * BLOCK_TOKENS
    first = rows_of(prompt, shape, dtype, seed=0)
    lengths = [prompt + 1, prompt + 7, prompt + 31, prompt + BLOCK_TOKENS + 3]
    whole = []
    for seed, length in enumerate(lengths, start=1):
        rest = rows_of(length - prompt, shape, dtype, seed)
        query, key, value = (torch.cat(pair) for pair in zip(first, rest, strict=True))
        whole.append((query, key, value))

    cache = KvCache(NUM_BLOCKS, CPU)
    shared = list(range(num_shared))
    tables = [[*shared, num_shared + 2 * n, num_shared + 2 * n + 1] for n in range(4)]
    attend(cache, [(whole[0], tables[0], slice(0, prompt))], variant, 0.25)
    for rows, blocks, length in zip(whole, tables, lengths, strict=True):
        if length - 1 > prompt:
            attend(cache, [(rows, blocks, slice(prompt, length - 1))], variant, 0.25)
    newest = [
        (rows, blocks[: blocks_for(length)], slice(length - 1, length))
        for rows, blocks, length in zip(whole, tables, lengths, strict=True)
    ]
    for rows, got in zip(whole, attend(cache, newest, variant, 0.25), strict=True):
        length = len(rows[0])
        alone = [(rows, range(blocks_for(length)), slice(0, length))]
        (expected,) = attend(KvCache(NUM_BLOCKS, CPU), alone, variant, 0.25)
        assert torch.equal(got[0], expected[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("start", [0, 30, 64, 300])
def test_a_row_has_the_same_bits_if_many_prompts_are_read_together(
    dtype: torch.dtype, shape: tuple[int, int, int], number: int, start: int
) -> None:
    """From one position on, to any other: those that end in one block share products."""
    variant = variants(shape[0] * shape[1])[number]
    scaling = shape[2] ** -0.5
    lengths = [start + more for more in (1, 2, 3, 5, 5, 31, 32, 33, 34, 40, 64, 70)]
    every = [rows_of(length, shape, dtype, seed) for seed, length in enumerate(lengths)]
    cache = KvCache(sum(map(blocks_for, lengths)), CPU)
    ids, sequences = iter(range(cache.num_blocks)), []
    for rows, length in zip(every, lengths, strict=True):
        blocks = [next(ids) for _ in range(blocks_for(length))]
        if start:
            attend(cache, [(rows, blocks, slice(0, start))], variant, scaling)
        sequences.append((rows, blocks, slice(start, length)))

    together = attend(cache, sequences, variant, scaling)

    for (rows, _, cut), output in zip(sequences, together, strict=True):
        alone = KvCache(blocks_for(cut.stop), CPU)
        whole = (rows, range(blocks_for(cut.stop)), slice(0, cut.stop))
        (expected,) = attend(alone, [whole], variant, scaling)
        assert torch.equal(output, expected[start:])


def passes_of_newest(
    lengths: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype, variant: Variant
) -> Callable[[ThreadTeam], list[torch.Tensor]]:
    """The outputs of two layers for the newest token of each of some sequences, by a team."""
    every = [
        [rows_of(length, shape, dtype, seed) for seed, length in enumerate(lengths, 100 * layer)]
        for layer in range(2)
    ]
    cache = KvCache(sum(map(blocks_for, lengths)), CPU)
    ids = iter(range(cache.num_blocks))
    tables = [[next(ids) for _ in range(blocks_for(length))] for length in lengths]
    scaling = shape[2] ** -0.5

    def one_pass(layers: Sequence[int], newest: bool, team: ThreadTeam) -> list[torch.Tensor]:
        cuts = [slice(n - 1 if newest else 0, n if newest else n - 1) for n in lengths]
        parts, num_rows = parts_of(zip(tables, cuts, strict=True))
        attention = PagedAttention(cache, parts, num_rows, team=team)
        outputs = []
        for layer in layers:
            rows = (
                torch.cat([own[i][cut] for own, cut in zip(every[layer], cuts, strict=True)])
                for i in range(3)
            )
            outputs.append(attention.attend(layer, *rows, scaling, variant))
        return outputs

    one_pass((0, 1), newest=False, team=ThreadTeam())
    return lambda team: one_pass((0, 1), newest=True, team=team)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("number", range(5))
def test_no_bit_shows_that_several_threads_computed_parts(
    dtype: torch.dtype, shape: tuple[int, int, int], number: int
) -> None:
    variant = variants(shape[0] * shape[1])[number]
    newest = passes_of_newest([700, 690, 301, 40, 700, 2, 650] * 3, shape, dtype, variant)
    expected = newest(ThreadTeam())
    for size in (2, 3):
        team = CountingTeam(size)
        for ours, theirs in zip(newest(team), expected, strict=True):
            assert torch.equal(ours, theirs)
        sees_little = variant.reach.limit is not None and variant.reach.limit < 100
        assert bool(team.num_shared) is not sees_little


def test_few_blocks_are_computed_in_one_thread() -> None:
    team = CountingTeam(2)
    passes_of_newest([40, 70, 100, 2], SHAPES[0], torch.float32, PLAIN)(team)
    assert team.num_shared == 0


@pytest.mark.parametrize("number", [0, 2])
def test_the_fused_kernel_of_other_devices_computes_the_same(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is called on the CPU here."""
    shape = (2, 3, 16)
    variant = variants(6)[number]
    rows = rows_of(100, shape, torch.float32, seed=0)
    monkeypatch.setattr("training.engine.torch.attention.variants.FUSES_PLAIN_ON", ("cpu",))
    cache = KvCache(NUM_BLOCKS, CPU)
    got = [
        attend(cache, [(rows, [5, 3, 4, 9], cut)], variant, 0.25)[0]
        for cut in (slice(0, 40), slice(40, 99), slice(99, 100))
    ]
    torch.testing.assert_close(
        torch.cat(got).double(), by_formula(rows, variant, 0.25), atol=3e-6, rtol=3e-6
    )


def test_what_another_sequence_left_in_a_block_reaches_nobody() -> None:
    shape = (2, 2, 16)
    cache = KvCache(NUM_BLOCKS, CPU)
    broken = tuple(torch.full_like(x, math.nan) for x in rows_of(32, shape, torch.float32, 0))
    attend(cache, [(broken, [3], slice(0, 32))], PLAIN, 0.25)  # type: ignore[list-item]  # three of them
    cache.wipe([3])
    rows = rows_of(20, shape, torch.float32, seed=1)
    got = [
        attend(cache, [(rows, [3], cut)], PLAIN, 0.25)[0] for cut in (slice(0, 19), slice(19, 20))
    ]
    torch.testing.assert_close(
        torch.cat(got).double(), by_formula(rows, PLAIN, 0.25), atol=3e-6, rtol=3e-6
    )


def test_padding_rows_are_zero_and_stored_nowhere() -> None:
    rows = rows_of(4, (1, 1, 8), torch.float32, seed=2)
    cache = KvCache(2, CPU)
    parts = [
        Part(first_row=0, start=0, num_tokens=1, blocks=[0]),
        Part(first_row=2, start=0, num_tokens=1, blocks=[1]),
    ]
    output = PagedAttention(cache, parts, 4).attend(0, *rows, 0.3)
    assert not output[[1, 3]].any()
    keys, _ = cache.blocks(0)
    assert keys.flatten(0, 2).any(-1).sum() == 2
