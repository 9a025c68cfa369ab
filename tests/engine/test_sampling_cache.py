"""Which blocks of the cache are used, kept, found again and given to others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.families import save_random, small_config
from training.engine.sampler.block_pool import BlockPool
from training.engine.sampler.cache_size import (
    FEWEST_TOKENS,
    SHARE,
    bytes_per_token,
    default_cache_tokens,
)
from training.engine.sampler.kv_cache import KvCache
from training.engine.sampler.prefix_keys import next_key, root_key
from training.engine.torch.attention.arithmetic import BLOCK_TOKENS
from training.engine.torch.loading import load_base_model
from training.engine.torch.memory import free_bytes
from training.images import Image, PlacedImage

NUM_BLOCKS = 6


@given(actions=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 11)), max_size=60))
@settings(max_examples=200)
def test_a_block_has_as_many_users_as_were_given_it(actions: list[tuple[int, int]]) -> None:
    """Against a model of three plain collections."""
    pool = BlockPool(NUM_BLOCKS)
    used: list[int] = []  # a block once for each user
    keys: dict[int, bytes] = {}
    kept: list[int] = []  # the least recently used first
    for action, number in actions:
        if action == 0 and len(set(used)) < NUM_BLOCKS:
            had_free = len(set(used)) + len(kept) < NUM_BLOCKS
            block, _ = pool.take()
            assert block not in used
            if not had_free:
                assert block == kept.pop(0)
                del keys[block]
            assert block not in kept
            used.append(block)
        elif action == 1 and used:
            block = used.pop(number % len(used))
            pool.release(block)
            if block not in used and block in keys:
                kept.append(block)
        elif action == 2 and used:
            block = used[number % len(used)]
            key = bytes([number])
            pool.name(block, key, "even" if number % 2 == 0 else "odd")
            if block not in keys and key not in keys.values():
                keys[block] = key
        elif action == 3:
            found = pool.find(bytes([number]))
            assert found == next((b for b, key in keys.items() if key[0] == number), None)
            if found is not None:
                pool.share(found)
                used.append(found)
                if found in kept:
                    kept.remove(found)
        elif action == 4 and number > 8:
            pool.drop("odd")
            keys = {block: key for block, key in keys.items() if key[0] % 2 == 0}
            kept = [block for block in kept if block in keys]
        assert pool.num_available == NUM_BLOCKS - len(set(used))
        assert pool.num_kept == len(kept)
        assert [pool.num_users(block) for block in range(NUM_BLOCKS)] == [
            used.count(block) for block in range(NUM_BLOCKS)
        ]


def test_only_blocks_that_were_used_need_wiping() -> None:
    pool = BlockPool(2)
    assert [pool.take(), pool.take()] == [(0, False), (1, False)]
    pool.release(1)
    assert pool.take() == (1, True)
    with pytest.raises(IndexError):
        pool.take()


def test_blocks_that_were_never_used_take_no_memory() -> None:
    pool = BlockPool(10**15)
    assert [pool.take(), pool.take()] == [(0, False), (1, False)]
    pool.release(0)
    assert pool.num_available == 10**15 - 1
    assert pool.take() == (0, True)


def key_of(tokens: list[int], *, images: tuple[PlacedImage, ...] = (), **root: object) -> bytes:
    """The key of the last of the full blocks of these tokens."""
    key = root_key(**{"group": "anna", "version": "v", "is_long": False, **root})  # type: ignore[arg-type]
    for start in range(0, len(tokens), BLOCK_TOKENS):
        key = next_key(key, tokens[start : start + BLOCK_TOKENS], start, images)
    return key


def image_at(start: int, data: bytes = b"cat") -> PlacedImage:
    return PlacedImage(image=Image(data=data, format="png"), start=start, num_tokens=4)


def test_a_key_stands_for_everything_the_contents_depend_on_and_for_the_owner() -> None:
    tokens = list(range(2 * BLOCK_TOKENS))
    different = [
        key_of(tokens),
        key_of(tokens, group="berta"),
        key_of(tokens, version=None),
        key_of(tokens, version="w"),
        key_of(tokens, is_long=True),
        key_of([9, *tokens[1:]]),
        key_of([*tokens[:-1], 9]),
        key_of(tokens[BLOCK_TOKENS:]),
        key_of(tokens, images=(image_at(3),)),
        key_of(tokens, images=(image_at(4),)),
        key_of(tokens, images=(image_at(3, b"dog"),)),
        key_of(tokens, images=(image_at(BLOCK_TOKENS + 3),)),
    ]
    assert len(set(different)) == len(different)
    assert key_of(tokens) == key_of(list(np.array(tokens, np.int32)))
    assert key_of(tokens) == key_of(tokens, images=(image_at(2 * BLOCK_TOKENS),))  # after them


@pytest.mark.parametrize(("family", "layers"), [("llama", 2 * 2), ("gemma3_text", 2 * 2)])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_a_tokens_bytes_are_those_of_its_keys_and_values(
    family: str, layers: int, dtype: str, size: int, tmp_path: Path
) -> None:
    folder = save_random(small_config(family), tmp_path / family)
    base_model = load_base_model(folder, device="cpu", dtype=dtype, layout="packed")
    heads, head_size = 2, 4
    assert bytes_per_token(base_model) == layers * heads * head_size * size
    assert default_cache_tokens(base_model) >= FEWEST_TOKENS
    share = free_bytes(base_model.device) // SHARE
    half = default_cache_tokens(base_model, num_sharing=2) * bytes_per_token(base_model)
    assert half <= max(share, FEWEST_TOKENS * bytes_per_token(base_model))


def test_blocks_are_copied_and_wiped_in_all_layers() -> None:
    cache = KvCache(3, torch.device("cpu"))
    for layer_idx in range(2):
        new = torch.full((2 * BLOCK_TOKENS, 1, 4), float(layer_idx + 1))
        cache.store(layer_idx, torch.arange(2 * BLOCK_TOKENS), new, -new)
    cache.copy([0], [2])
    cache.wipe([1])
    for layer_idx in range(2):
        keys, values = cache.blocks(layer_idx)
        assert [keys[n].unique().tolist() for n in range(3)] == [
            [layer_idx + 1],
            [0],
            [layer_idx + 1],
        ]
        assert torch.equal(values, -keys)
    cache.clear()
    assert cache.is_empty
