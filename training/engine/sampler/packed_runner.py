"""Sampling in the packed layout: all sequences of a pass are one stream over one cache.

A sequence gets blocks of the cache as its tokens come. If none is left, sequences are preempted:
their blocks are given up, and their tokens are read again later. Blocks of ended sequences stay
until their memory is needed, for requests that begin in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from training.engine.sampler.block_table import BlockTable, BlockTables
from training.engine.sampler.decode import decode
from training.engine.sampler.kv_cache import KvCache
from training.engine.sampler.model_runner import ModelRunner, Row
from training.engine.sampler.model_step import ModelStep
from training.engine.sampler.preemption import choose_victim, held_by
from training.engine.sampler.prefill import Prefill
from training.engine.sampler.prefix_keys import root_key
from training.engine.sampler.sequence import ActiveRequest, ActiveSequence
from training.engine.torch.attention.arithmetic import BLOCK_TOKENS, blocks_for
from training.engine.torch.base_model import BaseModel


class PackedRunner(ModelRunner):
    """Passes of many requests at once, over our key-value cache."""

    def __init__(self, base_model: BaseModel, cache: KvCache, *, chunk_tokens: int) -> None:
        """``chunk_tokens``: most prompt tokens in one pass."""
        self._switch = base_model.rotary_switch
        self._num_parameters = base_model.info.num_parameters
        self._cache = cache
        self._step = ModelStep(base_model, cache)
        self._tables = BlockTables(cache)
        self._prefill = Prefill(self._step, self._tables, chunk_tokens=chunk_tokens)
        self._started: dict[ActiveRequest, None] = {}
        """In the order of their starts."""
        self._num_preempted = 0

    @property
    def tables(self) -> BlockTables:
        """For tests: which blocks are in use."""
        return self._tables

    def most_tokens(self, num_sequences: int) -> int:
        """All of the cache: other sequences of the request may be preempted meanwhile."""
        return self._cache.num_blocks * BLOCK_TOKENS

    @property
    def pass_keys(self) -> float:
        return self._num_parameters / self._cache.numbers_each if self._cache.numbers_each else 0.0

    @property
    def num_held(self) -> int:
        pool = self._tables.pool
        return (pool.num_blocks - pool.num_available) * BLOCK_TOKENS

    @property
    def num_preempted(self) -> int:
        return self._num_preempted

    def start(self, request: ActiveRequest) -> bool:
        prompt, first = request.job.prompt, request.sequences[0]
        # The last row is needed for the first token, and scored rows for their scores.
        end = min(len(prompt), request.scorer.first_position) - 1
        first_blocks = request.job.num_samples if request.max_tokens else 0
        table = self._place(request, first, len(prompt), find=end, spare=first_blocks)
        if table is None:
            return False
        self._started[request] = None
        request.cached_tokens = table.num_stored
        request.note_read(table.num_stored)
        return True

    def resume(self, request: ActiveRequest, sequence: ActiveSequence) -> bool:
        # So that it is not preempted again soon.
        num_running = sum(1 for each in self._started for _ in each.decodable())
        length = request.length(sequence)
        table = self._place(request, sequence, length, find=length - 1, spare=num_running)
        if table is None:
            return False
        request.preempted.remove(sequence)
        if table.num_stored < length - 1:
            request.rereads.append(sequence)
        return True

    def _place(
        self,
        request: ActiveRequest,
        sequence: ActiveSequence,
        length: int,
        *,
        find: int,
        spare: int,
    ) -> BlockTable | None:
        """Give a sequence its table; None if there is no room.

        Args:
            length: Its tokens.
            find: The position up to which blocks of others may be used.
            spare: Blocks that must be available besides, if that is possible at all.
        """
        job = request.job
        is_long = self._switch is not None and length > self._switch
        root = root_key(group=job.group, version=job.version, is_long=is_long)
        table = BlockTable(root=root, is_long=is_long)
        tokens, images, _ = request.naming(sequence)
        self._tables.find(table, tokens, find, images)
        num_found = len(table.blocks)
        needed = min(blocks_for(length) - num_found + spare, self._cache.num_blocks - num_found)
        if not self._make_room(needed, job.group):
            self._tables.release(table)
            return None
        self._tables.grow(table, length)
        sequence.table = table
        return table

    def _make_room(self, num_blocks: int, group: str) -> bool:
        """Whether so many blocks are available, after groups that hold far more than this one have
        given up some."""
        pool = self._tables.pool
        while pool.num_available < num_blocks:
            least_held = held_by(group, self._started) + num_blocks
            victim = choose_victim(self._started, pool, least_held=least_held)
            if victim is None:
                return False
            self._preempt(*victim)
        return True

    def _preempt(self, request: ActiveRequest, sequence: ActiveSequence) -> None:
        self.end(request, sequence)
        request.preempted.append(sequence)
        self._num_preempted += 1

    def read_prompts(self, requests: Sequence[ActiveRequest]) -> dict[ActiveRequest, Tensor]:
        return self._prefill.run(requests)

    def first_logits(self, last_hidden: Mapping[ActiveRequest, Tensor]) -> Tensor:
        return self._prefill.first_logits(last_hidden)

    def decode(self, requests: Sequence[ActiveRequest]) -> tuple[list[Row], Tensor]:
        self._preempt_short(requests)
        if not self._make_places(requests):
            return [], torch.empty(0)
        rows, logits = decode(self._step, requests)
        for request, sequence in rows:
            table = sequence.table
            assert table is not None  # noqa: S101 - it was decodable
            naming = request.naming(sequence)
            self._tables.note_stored(table, table.num_stored + 1, *naming)
        return rows, logits

    def _preempt_short(self, requests: Sequence[ActiveRequest]) -> None:
        """Preempt sequences whose rotary factors change with the newest token (``rotary``): all
        their tokens must be read again."""
        if self._switch is None:
            return
        for request in requests:
            for sequence in list(request.decodable()):
                table = sequence.table
                if table and not table.is_long and request.length(sequence) > self._switch:
                    self._preempt(request, sequence)

    def _make_places(self, requests: Sequence[ActiveRequest]) -> bool:
        """Give each decodable sequence a place for its newest token, after others were preempted.

        Returns:
            Whether there are any; False also if the only other ones are still being read.
        """
        pool = self._tables.pool
        while True:
            tables = [
                sequence.table
                for request in requests
                for sequence in request.decodable()
                if sequence.table is not None
            ]
            if sum(map(self._tables.needs_block, tables)) <= pool.num_available:
                self._tables.make_writable(tables)
                return bool(tables)
            victim = choose_victim(self._started, pool)
            if victim is None:
                return False
            self._preempt(*victim)

    def end(self, request: ActiveRequest, sequence: ActiveSequence) -> None:
        if sequence.table is not None:
            self._tables.release(sequence.table)
            sequence.table = None

    def forget(self, request: ActiveRequest) -> None:
        for sequence in request.sequences:
            self.end(request, sequence)
        del self._started[request]

    def retire(self, version: str) -> None:
        self._tables.pool.drop(version)

    def clear(self) -> None:
        self._tables.pool.drop_all()
        self._cache.clear()
