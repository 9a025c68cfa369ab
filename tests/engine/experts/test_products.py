"""Grouped products: by torch's kernel where it takes the arguments, else group by group."""

from __future__ import annotations

import pytest
import torch

from training.engine.torch.experts.products import grouped_sums, grouped_times
from training.engine.torch.frozen_products import needs_blocks

ENDS = torch.tensor([5, 5, 12, 20], dtype=torch.int32)  # the second group is empty
GROUPS = [slice(0, 5), slice(5, 5), slice(5, 12), slice(12, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "odd address"])
@pytest.mark.parametrize(("inner", "outer"), [(16, 8), (16, 1), (5, 24), (1, 1)])
def test_each_group_has_its_own_matrix(
    inner: int, outer: int, offset: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, inner, generator=generator).to(dtype)
    flat = torch.randn(4 * inner * outer + 1, generator=generator).to(dtype)
    matrices = flat[offset:][: 4 * inner * outer].view(4, outer, inner).transpose(1, 2)
    result = grouped_times(rows, matrices, ENDS)
    for group, matrix in zip(GROUPS, matrices, strict=True):
        torch.testing.assert_close(result[group], rows[group] @ matrix, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("left", "right"), [(8, 16), (1, 16), (5, 24), (16, 3)])
def test_each_group_has_its_own_sum_and_an_empty_one_zeros(
    left: int, right: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20, left, generator=generator).to(dtype)
    b = torch.randn(20, right, generator=generator).to(dtype)
    result = grouped_sums(a, b, ENDS)
    assert not result[1].any()
    for group, sums in zip(GROUPS, result, strict=True):
        torch.testing.assert_close(sums, a[group].T @ b[group], rtol=0, atol=0)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_bfloat16_rows_bits_do_not_depend_on_the_size_of_its_group(is_transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 768, 1536) if is_transposed else (2, 1536, 768)
    matrices = (torch.randn(shape, generator=generator) / 39).bfloat16()
    matrices = matrices.transpose(1, 2) if is_transposed else matrices
    rows = torch.randn(600, 1536, generator=generator).bfloat16()
    if not needs_blocks(rows, matrices):
        pytest.skip("This processor has no AMX, whose products need blocks.")
    expected = grouped_times(rows, matrices, torch.tensor([0, 600], dtype=torch.int32))
    for number in (1, 2, 5, 32, 33, 100, 300):
        other = torch.cat([rows[:7], rows[200 : 200 + number]])
        ends = torch.tensor([7, 7 + number], dtype=torch.int32)
        own = grouped_times(other, matrices, ends)[7:]
        torch.testing.assert_close(own, expected[200 : 200 + number], rtol=0, atol=0)
