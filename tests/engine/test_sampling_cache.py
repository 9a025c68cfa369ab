"""Regions of the cache never overlap and are always freed; its views equal the stored values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.engine.sampler.kv_cache import ALIGNMENT_TOKENS, KvCache, Region
from training.engine.torch.attention.cached import (
    DecodeAttention,
    DecodeRun,
    PrefillAttention,
    PrefillChunk,
)

CPU = torch.device("cpu")
CAPACITY = 40 * ALIGNMENT_TOKENS


@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 4), st.integers(1, 160)),  # reserve (sequences, tokens each)
            st.integers(0, 20),  # release one of those held
        ),
        max_size=40,
    )
)
@settings(max_examples=80)
def test_regions_are_apart_and_give_everything_back(
    actions: list[tuple[int, int] | int],
) -> None:
    cache = KvCache(CAPACITY, CPU)
    held: list[Region] = []
    for action in actions:
        if isinstance(action, int):
            if held:
                cache.release(held.pop(action % len(held)))
            continue
        num_sequences, tokens_each = action
        region = cache.reserve(num_sequences, tokens_each)
        if region is None:
            # Only refused where no free stretch is long enough.
            size = num_sequences * -(-tokens_each // ALIGNMENT_TOKENS) * ALIGNMENT_TOKENS
            assert max(_free_stretches(held)) < size
            continue
        assert region.room >= tokens_each
        assert region.start % ALIGNMENT_TOKENS == region.room % ALIGNMENT_TOKENS == 0
        held.append(region)
        rows = [set(range(r.start, r.start + r.size)) for r in held]
        assert len(set().union(*rows)) == sum(map(len, rows))
        assert max(max(r) for r in rows) < CAPACITY
    for region in held:
        cache.release(region)
    assert cache.reserve(1, CAPACITY) == Region(0, 1, CAPACITY)


def _free_stretches(held: list[Region]) -> list[int]:
    edges = [0]
    for region in sorted(held, key=lambda r: r.start):
        edges += [region.start, region.start + region.size]
    edges.append(CAPACITY)
    return [end - start for start, end in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("num_sequences", [1, 3, 7])
def test_tokens_each_is_what_an_empty_cache_can_reserve(num_sequences: int) -> None:
    cache = KvCache(CAPACITY + 5, CPU)
    most = cache.tokens_each(num_sequences)
    assert cache.reserve(num_sequences, most + 1) is None
    assert cache.reserve(num_sequences, most) is not None


def plain_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Causal attention of the last tokens of one sequence, head by head, in float64.

    query (C, Hq, D), keys and values (L, Hkv, D) -> (C, Hq, D).
    """
    num_new, num_heads, _ = query.shape
    length, num_key_heads, _ = keys.shape
    output = torch.empty_like(query)
    for head in range(num_heads):
        shared = head * num_key_heads // num_heads
        for i in range(num_new):
            seen = length - num_new + i + 1
            scores = keys[:seen, shared].double() @ query[i, head].double() * scaling
            output[i, head] = (scores.softmax(0) @ values[:seen, shared].double()).float()
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_attention_is_plain_attention_over_what_was_stored(dtype: torch.dtype) -> None:
    """Prefill in two chunks, share the prompt, decode two tokens of all sequences but one."""
    torch.manual_seed(0)
    cache = KvCache(CAPACITY, CPU)
    cache.reserve(1, 20)  # so that the region does not begin at row 0
    region = cache.reserve(3, 12)
    assert region is not None

    def new(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return tuple(torch.randn(num_tokens, h, 8).to(dtype) for h in (4, 2, 2))  # type: ignore[return-value]  # a generator's length is unknown

    def chunk(start: int, num_tokens: int) -> PrefillChunk:
        return PrefillChunk(first_row=0, region=region, start=start, num_tokens=num_tokens)

    def check(got: torch.Tensor, *expected: torch.Tensor) -> None:
        tolerance = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got, torch.cat(expected), atol=tolerance, rtol=tolerance)

    q1, k1, v1 = new(5)
    check(
        PrefillAttention(cache, [chunk(0, 5)]).attend(0, q1, k1, v1, 0.3),
        plain_attention(q1, k1, v1, 0.3),
    )
    q2, k2, v2 = new(3)
    prompt_keys, prompt_values = torch.cat([k1, k2]), torch.cat([v1, v2])
    check(
        PrefillAttention(cache, [chunk(5, 3)]).attend(0, q2, k2, v2, 0.3),
        plain_attention(q2, prompt_keys, prompt_values, 0.3),
    )
    cache.share_prompt(region, 8)
    keys, values = [prompt_keys] * 3, [prompt_values] * 3
    for length in (9, 10):
        # Rows: sequence 0, padding, sequences 1 and 2.
        query, key, value = new(4)
        runs = [
            DecodeRun(first_row=0, region=region, first_sequence=0, count=1, length=length),
            DecodeRun(first_row=2, region=region, first_sequence=1, count=2, length=length),
        ]
        got = DecodeAttention(cache, runs, 4).attend(0, query, key, value, 0.3)
        for sequence, row in enumerate((0, 2, 3)):
            keys[sequence] = torch.cat([keys[sequence], key[row : row + 1]])
            values[sequence] = torch.cat([values[sequence], value[row : row + 1]])
            check(
                got[row : row + 1],
                plain_attention(query[row : row + 1], keys[sequence], values[sequence], 0.3),
            )
        assert not got[1].any()
