"""Attention of whole sequences of a packed stream, with its derivative.

The forward part has ``arithmetic``'s order of sums, so that a token's log-probability is that of
the sampler. Ranges of one padded length after equally many tokens share a bucket, wherever they are
in the stream. The products' shapes depend on a range's own sequence alone, so batch-mates do not
change its bits, forwards or backwards (measured with MKL, one thread and two).

Queries are cut into tiles; a tile uses only the blocks of keys of which one of its tokens
sees something, so a layer with a window costs the same for each token of a sequence of any length.
For sequences of more than ``KEPT_KEYS`` tokens only the inputs and the output are kept for the
backward pass, which computes the shares again: they would be most of a long sequence's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training.engine.torch.attention.long_sequences import attend_long, long_gradients
from training.engine.torch.attention.short_sequences import (
    attend_short,
    empty_shares,
    short_gradients,
)
from training.engine.torch.attention.tiles import Bucket, Packed
from training.engine.torch.attention.variants import Variant
from training.engine.torch.thread_team import ThreadTeam

KEPT_KEYS = 192
"""The shares of sequences of up to this many tokens are kept for the backward pass."""


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    buckets: Sequence[Bucket],
    variant: Variant,
    scaling: float,
    *,
    kept_keys: int = KEPT_KEYS,
    team: ThreadTeam | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Attention of the rows of all buckets; zero for other rows.

    Args:
        query: (T, Hq, D).
        key: (T, Hkv, D), and ``value`` likewise.
        kept_keys: See ``KEPT_KEYS``.
        team: Computes parts of each bucket; None does it in this thread.
        known: The output, if the same attention was computed before; then all sequences must have
            more than ``kept_keys`` tokens.

    Returns:
        (T, Hq, D), in the queries' dtype.
    """
    # Autograd takes no notice of what is in a tuple.
    output: Tensor = _BlockAttention.apply(  # type: ignore[no-untyped-call]  # torch has no types
        query, key, value, buckets, variant, scaling, kept_keys, team or ThreadTeam(), (known,)
    )
    return output


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        buckets: Sequence[Bucket],
        variant: Variant,
        scaling: float,
        kept_keys: int,
        team: ThreadTeam,
        known: tuple[Tensor | None],
    ) -> Tensor:
        ctx.buckets, ctx.variant, ctx.scaling = buckets, variant, scaling
        ctx.key_shape = key.shape
        ctx.kept_keys, ctx.team = kept_keys, team
        kept: list[Tensor] = []
        if known[0] is not None:
            output = known[0].detach()
            ctx.save_for_backward(query, key, value, output)
            return output
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        if any(is_long(bucket, kept_keys) for bucket in buckets):
            kept += [query, key, value, output]
        for bucket in buckets:
            packed = Packed.of(bucket, query, key, value, scaling=scaling)
            attended = torch.empty_like(packed.queries)
            if is_long(bucket, kept_keys):
                attend_long(packed, attended, bucket.tiles, variant, team)
            else:
                shares: list[Tensor | None] = [None for _ in bucket.tiles]
                if any(ctx.needs_input_grad):
                    own = [empty_shares(packed, tile) for tile in bucket.tiles]
                    kept += [packed.queries, packed.keys, packed.values, *own]
                    shares = [*own]
                attend_short(packed, attended, shares, bucket.tiles, variant, team)
            bucket.queries.unpack(attended, output)
        ctx.save_for_backward(*kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        kept = iter(ctx.saved_tensors)  # may be read only once, where they were computed again
        inputs: tuple[Tensor, ...] = ()
        output: Tensor | None = None
        if any(is_long(bucket, ctx.kept_keys) for bucket in ctx.buckets):
            inputs = (next(kept), next(kept), next(kept))
            output = next(kept)
        grad_query = torch.zeros_like(grad_output, memory_format=torch.contiguous_format)
        # A key that many ranges see has a gradient from each, so the sum is kept in float32.
        grad_key = grad_output.new_zeros(ctx.key_shape, dtype=torch.float32)
        grad_value = torch.zeros_like(grad_key)
        for bucket in ctx.buckets:
            if is_long(bucket, ctx.kept_keys):
                assert output is not None  # noqa: S101 - see above
                packed = Packed.of(bucket, *inputs, scaling=ctx.scaling)
                group = packed.queries.shape[1]
                grads = long_gradients(
                    packed,
                    bucket.queries.pack(output, group),
                    bucket.queries.pack(grad_output, group),
                    bucket.tiles,
                    ctx.variant,
                    grad_output.dtype,
                    ctx.team,
                )
            else:
                packed = Packed(queries=next(kept), keys=next(kept), values=next(kept))
                shares = [next(kept) for _ in bucket.tiles]
                grad_rows = bucket.queries.pack(grad_output, packed.queries.shape[1])
                grads = short_gradients(
                    packed, shares, grad_rows, bucket.tiles, ctx.variant, ctx.team
                )
            bucket.queries.unpack(grads.queries.mul_(ctx.scaling), grad_query)
            bucket.keys.add(grads.keys[:, None], grad_key)
            bucket.keys.add(grads.values[:, None], grad_value)
        dtype = grad_output.dtype
        grads_of_inputs = (grad_query, grad_key.to(dtype), grad_value.to(dtype))
        return (*grads_of_inputs, None, None, None, None, None, None)


def is_long(bucket: Bucket, kept_keys: int) -> bool:
    """Whether the backward pass computes the bucket's shares again."""
    return bucket.keys.length > kept_keys
