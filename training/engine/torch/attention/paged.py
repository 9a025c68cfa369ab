"""Attention while sampling: over keys and values in the blocks of a cache.

A pass has the next tokens of several sequences: some of a prompt, or the newest of each. This
module stores their keys and values and plans which rows share products; the arithmetic, and what
it promises, is in ``arithmetic``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from training.engine.sampler.kv_cache import KvCache
from training.engine.torch.attention.arithmetic import (
    BLOCK_TOKENS,
    GROUP_BLOCKS,
    Workspace,
    blocks_for,
)
from training.engine.torch.attention.interface import Attention
from training.engine.torch.attention.newest_tokens import NewestTokens
from training.engine.torch.attention.paged_parts import (
    Part,
    Rows,
    num_seen,
    num_shared,
    seen_blocks,
)
from training.engine.torch.attention.prompt_tokens import PromptTokens
from training.engine.torch.attention.variants import EVERYTHING, PLAIN, Reach, Variant
from training.engine.torch.packing.stream import round_up
from training.engine.torch.thread_team import ThreadTeam
from training.engine.torch.to_device import to_device

GATHERED_BLOCKS = 256
"""Most blocks of keys that are copied for a product, unless one sequence has more: a copy should
fit into a processor's cache."""

PART_BLOCKS = 64
"""Fewest blocks of a thread's part: with fewer, handing it over takes a large part of its time."""

PROMPT_BLOCKS = 64
"""Most blocks of prompts that are read together: longer ones gain nothing by it."""


class PagedAttention(Attention):
    """The next tokens of each of some sequences; other rows are padding and get zeros."""

    def __init__(
        self,
        cache: KvCache,
        parts: Sequence[Part],
        num_rows: int,
        *,
        team: ThreadTeam | None = None,
    ) -> None:
        """``team``: computes parts of many newest tokens; None does it in this thread."""
        self._cache = cache
        self._team = team or ThreadTeam()
        self._workspaces = [Workspace() for _ in range(self._team.size)]
        self._parts = parts
        self._longest = max((part.end for part in parts), default=0)
        self._plans: dict[Reach, _Plan] = {}
        rows = [part.first_row + n for part in parts for n in range(part.num_tokens)]
        self._stored = Rows(rows, cache.device)
        self.real_rows = None if len(rows) == num_rows else self._stored.numbers
        """The rows that are not padding, (n,) int64; None if all are real, in order."""
        places = [
            (part.blocks[n // BLOCK_TOKENS], n % BLOCK_TOKENS)
            for part in parts
            for n in range(part.start, part.end)
        ]
        self._places = to_device(places, cache.device)  # (n, 2)
        self._places_by_heads: dict[int, Tensor] = {}

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        variant: Variant = PLAIN,
    ) -> Tensor:
        key, value = self._stored.of(key), self._stored.of(value)
        self._cache.store(layer_idx, self._places_of(key.shape[1]), key, value)
        keys, values = self._cache.blocks(layer_idx)
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        plan = self._plan(variant.reach)
        for chunk in plan.chunks:
            chunk.attend(keys, values, query, scaling, variant, output)

        def compute(newest: Sequence[NewestTokens]) -> None:
            for some in newest:
                some.attend(keys, values, query, scaling, variant, output)

        if len(plan.newest) == 1:
            compute(plan.newest[0])
        else:
            self._team.run([partial(compute, newest) for newest in plan.newest])
        return output  # (T, Hq, D)

    def _places_of(self, num_key_heads: int) -> Tensor:
        """Where the cache stores the rows: see ``KvCache.store``."""
        if num_key_heads not in self._places_by_heads:
            heads = torch.arange(num_key_heads, device=self._cache.device)
            block, token = self._places.unbind(1)
            places = (block[:, None] * num_key_heads + heads) * BLOCK_TOKENS + token[:, None]
            self._places_by_heads[num_key_heads] = places.flatten()
        return self._places_by_heads[num_key_heads]

    def _plan(self, reach: Reach) -> _Plan:
        if reach.covers(self._longest):
            reach = EVERYTHING
        if reach not in self._plans:
            self._plans[reach] = _Plan.of(self._parts, reach, self._cache.device, self._workspaces)
        return self._plans[reach]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """The computation of a pass in the layers of one reach."""

    chunks: list[PromptTokens]
    newest: list[list[NewestTokens]]
    """What may be computed at the same time: a list for each workspace."""

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        reach: Reach,
        device: torch.device,
        workspaces: Sequence[Workspace],
    ) -> _Plan:
        chunks = [PromptTokens(some, reach, device) for some in _prompts_together(parts)]
        alike: dict[tuple[int, int], list[Part]] = {}
        for part in parts:
            if part.num_tokens == 1:
                # The samples of a prompt have the same first block.
                key = (_padded(num_seen(part, reach)), part.blocks[0])
                alike.setdefault(key, []).append(part)
        together: list[tuple[int, list[Part]]] = []
        num_blocks = 0
        for (size, _), some in _merge_single(alike).items():
            num_own = size - num_shared([seen_blocks(part, reach) for part in some])
            num_blocks += num_own * len(some)
            at_once = _at_once(len(some), num_own, len(workspaces))
            together += [(size, some[i : i + at_once]) for i in range(0, len(some), at_once)]
        # The largest first, so that the others fit into its memory.
        together.sort(key=lambda each: each[0] * len(each[1]), reverse=True)
        num_lists = min(len(workspaces), len(together), max(1, num_blocks // PART_BLOCKS))
        newest: list[list[NewestTokens]] = [[] for _ in range(num_lists)]
        for number, (size, some) in enumerate(together):
            slot = number % num_lists
            newest[slot].append(NewestTokens(some, reach, size, device, workspaces[slot]))
        return cls(chunks=chunks, newest=newest)


def _at_once(num_sequences: int, num_own: int, num_threads: int) -> int:
    """How many sequences, which have so many blocks each that they do not share, are computed in
    the same products."""
    num_blocks = num_sequences * num_own
    at_once = num_sequences
    if num_blocks > GATHERED_BLOCKS:
        at_once = max(1, GATHERED_BLOCKS // num_own)
    num_parts = min(num_threads, num_blocks // PART_BLOCKS)
    return min(at_once, -(-num_sequences // num_parts)) if num_parts > 1 else at_once


def _prompts_together(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts of several tokens, those that begin at one position and end in one block together:
    many short prompts take no more operations than one."""
    alike: dict[tuple[int, int], list[Part]] = {}
    for part in parts:
        if part.num_tokens > 1:
            alike.setdefault((part.start, blocks_for(part.end)), []).append(part)
    together = []
    for (_, num_blocks), some in alike.items():
        at_once = max(1, PROMPT_BLOCKS // num_blocks)
        together += [some[i : i + at_once] for i in range(0, len(some), at_once)]
    return together


def _merge_single(alike: dict[tuple[int, int], list[Part]]) -> dict[tuple[int, int], list[Part]]:
    """The groups, those of a single sequence together if they have as many blocks."""
    merged: dict[tuple[int, int], list[Part]] = {}
    for (size, first), some in alike.items():
        merged.setdefault((size, -1 if len(some) == 1 else first), []).extend(some)
    return merged


def _padded(num_blocks: int) -> int:
    """Sequences of so many blocks share products."""
    return num_blocks if num_blocks <= GROUP_BLOCKS else round_up(num_blocks, GROUP_BLOCKS)
