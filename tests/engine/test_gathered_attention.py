"""The newest tokens of many sequences are computed together, and each has the same result as
alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.engine.test_attention import VARIANTS
from training.engine.sampler.kv_cache import KvCache, Region
from training.engine.torch.attention.cached import (
    DecodeAttention,
    DecodeRun,
    PrefillAttention,
    PrefillChunk,
)
from training.engine.torch.attention.gathered import SHORT_CACHE_TOKENS
from training.engine.torch.attention.variants import PLAIN, Variant

LENGTHS = [3, 32, 33, 1, 60, SHORT_CACHE_TOKENS, SHORT_CACHE_TOKENS + 1, 31, 2, 100, 64]
SHAPES = {"tiny": (4, 2, 4), "real": (9, 3, 64), "one head": (1, 1, 8), "equal": (8, 8, 16)}
"""Query heads, key heads, head size."""


class Cached:
    """Sequences in a cache, all but their newest token."""

    def __init__(self, shape: str, dtype: torch.dtype, lengths: Sequence[int] = LENGTHS) -> None:
        num_heads, num_key_heads, head_size = SHAPES[shape]
        generator = torch.Generator().manual_seed(len(lengths))

        def random(rows: int, heads: int) -> torch.Tensor:
            return torch.randn(rows, heads, head_size, generator=generator).to(dtype)

        self.lengths = lengths
        self.keys = [random(length, num_key_heads) for length in lengths]
        self.values = [random(length, num_key_heads) for length in lengths]
        self.query = random(len(lengths), num_heads)
        self.cache = KvCache(4096, torch.device("cpu"))
        self.regions: list[Region] = []
        for length, keys, values in zip(lengths, self.keys, self.values, strict=True):
            region = self.cache.reserve(1, length + 7)
            assert region is not None
            rows = torch.arange(region.start, region.start + length)
            self.cache.store(0, rows, keys, values)
            self.regions.append(region)

    def attend(self, chosen: Sequence[int], variant: Variant = PLAIN) -> torch.Tensor:
        """One decode step of these sequences, in this order."""
        runs = [
            DecodeRun(
                first_row=row,
                region=self.regions[i],
                first_sequence=0,
                count=1,
                length=self.lengths[i],
            )
            for row, i in enumerate(chosen)
        ]
        key, value = (torch.stack([x[i][-1] for i in chosen]) for x in (self.keys, self.values))
        attention = DecodeAttention(self.cache, runs, len(runs))
        return attention.attend(0, self.query[list(chosen)], key, value, 0.3, variant)

    def prefill(self, i: int, variant: Variant) -> torch.Tensor:
        """A sequence's last tokens as the last chunk of its prompt: their newest row."""
        length = self.lengths[i]
        start = length // 2
        num_heads = self.query.shape[1]
        query = torch.zeros(length - start, num_heads, self.query.shape[2], dtype=self.query.dtype)
        query[-1] = self.query[i]
        chunk = PrefillChunk(
            first_row=0, region=self.regions[i], start=start, num_tokens=length - start
        )
        attention = PrefillAttention(self.cache, [chunk])
        key, value = self.keys[i][start:], self.values[i][start:]
        return attention.attend(0, query, key, value, 0.3, variant)[-1]

    def plain(self, i: int, variant: Variant = PLAIN) -> torch.Tensor:
        """The formula, in float64."""
        group = self.query.shape[1] // self.keys[i].shape[1]
        keys, values = (x[i].double().repeat_interleave(group, 1) for x in (self.keys, self.values))
        scores = torch.einsum("hd,khd->hk", self.query[i].double(), keys) * 0.3
        if variant.softcap is not None:
            scores = (scores / variant.softcap).tanh() * variant.softcap
        newest, places = len(keys) - 1, torch.arange(len(keys))
        if variant.reach.window is not None:
            scores[:, newest - places >= variant.reach.window] = float("-inf")
        if variant.reach.chunk is not None:
            scores[:, places < newest // variant.reach.chunk * variant.reach.chunk] = float("-inf")
        if variant.sinks is not None:
            scores = torch.cat([scores, variant.sinks.double()[:, None]], dim=-1)
        return torch.einsum("hk,khd->hd", scores.softmax(-1)[:, : len(keys)], values)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula(shape: str) -> None:
    cached = Cached(shape, torch.float32)
    got = cached.attend(range(len(LENGTHS)))
    for i in range(len(LENGTHS)):
        torch.testing.assert_close(got[i].double(), cached.plain(i), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_windows_chunks_caps_and_sinks_are_the_formula_too(variant: str) -> None:
    cached = Cached("tiny", torch.float32)
    got = cached.attend(range(len(LENGTHS)), VARIANTS[variant])
    for i in range(len(LENGTHS)):
        expected = cached.plain(i, VARIANTS[variant])
        torch.testing.assert_close(got[i].double(), expected, atol=1e-5, rtol=1e-5)
        prefilled = cached.prefill(i, VARIANTS[variant])
        torch.testing.assert_close(prefilled.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", [PLAIN, *VARIANTS.values()], ids=["plain", *VARIANTS])
@pytest.mark.parametrize("length", [20, SHORT_CACHE_TOKENS + 9], ids=["short", "long"])
def test_samples_of_one_job_are_each_what_they_are_in_a_job_of_their_own(
    variant: Variant, length: int
) -> None:
    lengths = [length] * 3
    cached = Cached("tiny", torch.float32, lengths)
    expected = cached.attend([0, 1, 2], variant)
    region = cached.cache.reserve(3, length)
    assert region is not None
    for n in range(3):
        rows = torch.arange(region.row(n, 0), region.row(n, length))
        cached.cache.store(0, rows, cached.keys[n], cached.values[n])
    run = DecodeRun(first_row=0, region=region, first_sequence=0, count=3, length=length)
    newest = [torch.stack([x[n][-1] for n in range(3)]) for x in (cached.keys, cached.values)]
    attention = DecodeAttention(cached.cache, [run], 3)
    got = attention.attend(0, cached.query, *newest, 0.3, variant)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sequences_bits_are_those_it_has_alone_in_every_variant(
    variant: str, dtype: torch.dtype
) -> None:
    cached = Cached("tiny", dtype)
    everything = list(range(len(LENGTHS)))
    together = cached.attend(everything, VARIANTS[variant])
    for i in everything:
        alone = cached.attend([i], VARIANTS[variant])[0]
        assert torch.equal(together[i], alone), LENGTHS[i]


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_sequences_bits_are_those_it_has_alone(shape: str, dtype: torch.dtype) -> None:
    cached = Cached(shape, dtype)
    everything = list(range(len(LENGTHS)))
    together, reversed_ = cached.attend(everything), cached.attend(everything[::-1]).flip(0)
    for i in everything:
        alone = cached.attend([i])[0]
        assert torch.equal(together[i], alone), LENGTHS[i]
        assert torch.equal(reversed_[i], alone), LENGTHS[i]


def test_a_sequence_that_is_not_finite_spares_the_others() -> None:
    cached = Cached("tiny", torch.float32, [5, 9, 7])
    expected = cached.attend([0, 1, 2])
    region = cached.regions[1]
    broken = torch.full((region.size, 2, 4), float("nan"))
    cached.cache.store(0, torch.arange(region.start, region.start + region.size), broken, broken)
    got = cached.attend([0, 1, 2])
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
