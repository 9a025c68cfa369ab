"""Products of rows with a matrix whose bits for a row do not depend on the number of rows.

Those with a frozen matrix of the base model, forwards and backwards, and those with an adapter's.

In float32 on an x86 CPU they go to oneDNN, as torch's own bfloat16 products do, and not to the BLAS
behind ``torch.mm``. oneDNN reads the matrix where it lies instead of copying it for every product,
which matters most for few rows. Its results for a row do not depend on the number of rows from two
on, on the row's place, or on the number of threads (measured with AVX2 and AVX-512, one to four
threads); those of one row alone do, so a second is added.

In bfloat16, where the processor has AMX, oneDNN cuts the sums of many rows into parts, and into
other parts for other numbers of rows. It does not cut those of few rows, so rows are taken in
blocks (``most_rows``). A block's product is computed transposed: then oneDNN reads the matrix where
it lies, and copies the smaller rows instead. Backwards all blocks have one number of rows.
"""

from __future__ import annotations

import platform
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from training.engine.torch.thread_team import ROWS_MULTIPLE, ThreadTeam, cut

BLOCKS = ((1536, 512), (2048, 256), (3072, 128), (4608, 64))
"""Most rows of a block in bfloat16, for sums of up to so many numbers (measured with AMX and
matrices from 16 x 64 to 14336 x 4096, whole and in parts)."""

NARROW_BLOCK = 128
"""A block of more rows than this has at most as many as there are outputs."""

SMALLEST_BLOCK = 32
"""Most rows of a block for longer sums, and for torch's own threads."""

EQUAL_BLOCK = 128
"""Rows of each block of a backward product in bfloat16: whatever oneDNN does for this number, it
does for all. A sampling step has no such products."""

FEWEST_NUMBERS = 2**17
"""Of a matrix that several threads share: one reads so many in ten microseconds, and torch's
threads need a few to begin."""

LONGEST_SUM = 2**13
"""Of a product that is left to torch's threads: those of more than 18,432 numbers oneDNN cuts among
them (float32, AVX-512, 2 to 64 threads)."""

PART_NUMBERS = 2**21
"""Fewest numbers of a part of a matrix that a thread of ours gets: reading them takes about a
millisecond, and handing the part over a tenth of that."""

ROWS_FREE = 8
"""Rows that a matrix is multiplied by while it is read; more take longer in proportion."""


def times_transposed(
    rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, team: ThreadTeam | None = None
) -> Tensor:
    """(n, out) = rows (n, in) @ weight (out, in)^T + bias (out,).

    Args:
        team: Its threads share a large matrix; no bit depends on that.
    """
    product = partial(_times_transposed, rows, weight, bias)
    if team is None or team.size == 1 or not _may_share(rows, weight):
        return product()
    if _is_for_torchs_threads(rows, weight):
        return team.in_one(product)
    parts = _output_parts(rows, weight, team)
    if len(parts) == 1:
        return product()
    output = rows.new_empty(len(rows), len(weight))

    def compute(part: slice) -> None:
        own_bias = None if bias is None else bias[part]
        output[:, part] = _times_transposed(rows, weight[part], own_bias)

    team.run([partial(compute, part) for part in parts])
    return output


def _may_share(rows: Tensor, weight: Tensor) -> bool:
    """Whether sharing a product with a matrix is worthwhile, and the kernel known to give the same
    bits for parts of the outputs."""
    return (
        weight.numel() >= FEWEST_NUMBERS
        and rows.device.type == "cpu"
        and rows.dtype in (torch.float32, torch.bfloat16)
        and not (torch.is_grad_enabled() and rows.requires_grad)
        and _has_onednn()
    )


def _is_for_torchs_threads(rows: Tensor, weight: Tensor) -> bool:
    """Whether the bits of a product with ``weight`` are known not to depend on their number.

    ``rows``: (n, K), of which each output is a sum.
    """
    return rows.shape[1] <= LONGEST_SUM and not needs_blocks(rows, weight)


def _output_parts(rows: Tensor, weight: Tensor, team: ThreadTeam) -> list[slice]:
    times = max(1, rows.shape[0] // ROWS_FREE)
    count = min(team.most_parts, weight.numel() * times // PART_NUMBERS)
    return cut(len(weight), max(1, count), ROWS_MULTIPLE)


def _times_transposed(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _has_own_kernel(rows, weight):
        return _with_onednn(rows, weight, bias)
    if needs_blocks(rows, weight):
        return _by_blocks(rows, weight, bias)
    return linear(rows, weight, bias)


def _by_blocks(rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, out) = rows (n, in) @ matrix (out, in)^T + bias (out,)."""
    output = rows.new_empty(len(rows), len(matrix))
    size = most_rows(*matrix.shape)
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        if len(block) == 1:  # it has another kernel
            block = pad(block, (0, 0, 0, 1))
        columns = block.T
        product = (
            torch.mm(matrix, columns)
            if bias is None
            else torch.addmm(bias[:, None], matrix, columns)
        )  # (out, n)
        output[start : start + size] = product.T[: len(rows) - start]
    return output


def most_rows(out: int, inner: int) -> int:
    """The rows of a block of bfloat16 products with a matrix (out, inner)."""
    if torch.get_num_threads() > 1:
        return SMALLEST_BLOCK
    size = next((rows for longest, rows in BLOCKS if inner <= longest), SMALLEST_BLOCK)
    return min(size, max(NARROW_BLOCK, out))


def times_frozen(rows: Tensor, weight: Tensor, *, team: ThreadTeam | None = None) -> Tensor:
    """(n, in) = rows (n, out) @ weight (out, in): the gradient of ``times_transposed``'s rows."""
    product = partial(_times_frozen, rows, weight)
    if team is None or team.size == 1 or not _may_share(rows, weight):
        return product()
    return team.in_one(product) if _is_for_torchs_threads(rows, weight) else product()


def _times_frozen(rows: Tensor, weight: Tensor) -> Tensor:
    if _has_own_kernel(rows, weight):
        return _with_onednn(rows, weight.T, None)
    if needs_blocks(rows, weight):
        return by_equal_blocks(rows, weight)
    return rows @ weight


def by_equal_blocks(rows: Tensor, weight: Tensor, size: int = EQUAL_BLOCK) -> Tensor:
    """(n, in) = rows (n, out) @ weight (out, in), in products of ``size`` rows each."""
    num_rows = len(rows)
    blocks = pad(rows, (0, 0, 0, -num_rows % size)).split(size)
    output = rows.new_empty(len(blocks) * size, weight.shape[1])
    for block, own in zip(blocks, output.split(size), strict=True):
        torch.mm(block, weight, out=own)
    return output[:num_rows]


def _with_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    is_alone = len(rows) == 1
    rows = pad(rows, (0, 0, 0, 1)) if is_alone else rows.contiguous()
    # The operator to which torch.compile lowers linear layers; eager torch takes it for bfloat16
    # only.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product[:1].clone() if is_alone else product  # a view could not be changed in place


def _has_own_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether ``_with_onednn`` computes this; it knows no autograd."""
    return (
        rows.dtype == weight.dtype == torch.float32
        and rows.device.type == "cpu"
        and rows.shape[0] > 0
        and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
        and _has_onednn()
    )


def needs_blocks(rows: Tensor, weight: Tensor) -> bool:
    """Whether a product's bits for a row would depend on the number of rows.

    ``weight``: a matrix, or a stack of them.
    """
    return (
        _has_amx()
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.bfloat16
        and rows.shape[0] > 0
        and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
    )


@cache
def _has_amx() -> bool:
    return torch.backends.mkldnn.is_available() and torch.cpu._is_amx_tile_supported()


@cache
def _has_onednn() -> bool:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    is_there = torch.backends.mkldnn.is_available()
    return is_x86 and is_there and hasattr(torch.ops.mkldnn, "_linear_pointwise")
