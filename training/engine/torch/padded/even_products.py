"""Batched products whose bits do not depend on the number of sequences in a rectangle.

A kernel for matrix products sums in an order that depends on how its operands lie in memory. That
differs between one sequence and several: an axis of one element may have any stride, so torch
copies an operand of several sequences where it only looks at that of one. Recurrent layers and some
families' own attention get other bits in this way. Here every batched product on a CPU gets copies
that lie in order.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


@functools.cache
def use_even_products() -> torch.library.Library:
    """Make ``bmm`` on a CPU copy its operands unless they are contiguous, for the rest of the
    process: in autograd's own code too, which no module and no argument reaches."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that another kernel is there
        library.impl("bmm", _even_product, "CPU")
    return library


def _even_product(left: Tensor, right: Tensor) -> Tensor:
    """(B, N, M) = left (B, N, K) @ right (B, K, M)."""
    product = left.new_empty((left.shape[0], left.shape[1], right.shape[2]))
    # The form with ``out`` is another operator, which has torch's kernel.
    return torch.bmm(left.contiguous(), right.contiguous(), out=product)
