"""How many rows share a product shows in none of their bits, however few or small they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.engine.torch.lora_linear import add_times, times
from training.engine.torch.packing.stream import SMALL_PRODUCT, fewest_rows

CPU = torch.device("cpu")
FEW, MOST = 2, 40  # rows
ROUNDS = 300  # plain products of these shapes differ in a few of them

SHAPES = [(16, 8), (8, 64), (64, 16), (64, 32), (128, 16), (64, 40), (32, 256)]
"""Of small products with two rows, with more, and with none."""


def rows_and_matrix(inner: int, outer: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        tuple(
            torch.randn(shape, generator=generator).bfloat16()
            for shape in ((MOST, inner), (inner, outer))
        )
        for _ in range(ROUNDS)
    ]


@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_few_rows_times_a_matrix_are_what_they_are_among_many(inner: int, outer: int) -> None:
    for rows, matrix in rows_and_matrix(inner, outer):
        torch.testing.assert_close(
            times(rows[:FEW], matrix), times(rows, matrix)[:FEW], rtol=0, atol=0
        )


@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_what_few_rows_are_added_to_is_what_it_is_among_many(inner: int, outer: int) -> None:
    for rows, matrix in rows_and_matrix(inner, outer):
        few = torch.linspace(-3, 3, MOST * outer).view(MOST, outer).bfloat16()
        many = few.clone()
        add_times(few[:FEW], rows[:FEW], matrix, 1.37)
        add_times(many, rows, matrix, 1.37)
        torch.testing.assert_close(few[:FEW], many[:FEW], rtol=0, atol=0)


def test_a_product_is_the_product() -> None:
    for rows, matrix in rows_and_matrix(64, 16)[:3]:
        expected = rows.double() @ matrix.double()
        torch.testing.assert_close(
            times(rows[:2], matrix).double(), expected[:2], rtol=1e-2, atol=0.1
        )


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_few_rows_in_float32_are_what_they_are_among_many(size: int, rank: int) -> None:
    """Of an adapter's products. Intel's MKL has other kernels for few rows, unless it is asked."""
    generator = torch.Generator().manual_seed(0)
    x, a, b = (
        torch.randn(shape, generator=generator)
        for shape in ((384, size), (size, rank), (rank, 2 * size))
    )
    many = x.repeat(1, 2)
    inner = times(x, a)
    add_times(many, inner, b, 1.37)
    for num_rows in (1, 2, 4, 8, 20, 36, 96, 200):
        few = x[:num_rows].repeat(1, 2)
        own = times(x[:num_rows], a)
        add_times(few, own, b, 1.37)
        torch.testing.assert_close(own, inner[:num_rows], rtol=0, atol=0)
        torch.testing.assert_close(few, many[:num_rows], rtol=0, atol=0)


def test_only_products_of_few_rows_are_filled_up() -> None:
    assert fewest_rows(CPU, torch.bfloat16, 576 * 32) == 2
    assert fewest_rows(CPU, torch.bfloat16, 64 * 16) * 64 * 16 > SMALL_PRODUCT
    assert (
        fewest_rows(CPU, torch.float32, 16)
        == fewest_rows(torch.device("cuda"), torch.bfloat16, 16)
        == 0
    )
