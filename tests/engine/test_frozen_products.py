"""A row's product with a frozen matrix has the same bits in every company."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from training.engine.torch.frozen_products import (
    needs_blocks,
    times_frozen,
    times_transposed,
)
from training.engine.torch.thread_team import ThreadTeam

T = TypeVar("T")

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="other processors have other kernels",
)

MOST = 300  # rows
NUMBERS = (1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 33, 64, 65, 127, 128, 256, 299)
SHAPES = [(16, 16), (24, 64), (64, 24), (192, 576), (576, 1536), (1536, 576), (4096, 256)]
"""(out, in) of matrices: those of the tiny models and of SmolLM2, and one of many outputs."""

BFLOAT16_SHAPES = [
    (128, 896),
    (192, 576),
    (576, 576),
    (576, 1536),
    (1536, 576),
    (256, 4096),
    (1024, 8192),
]
NUMBERS_OF_FOURS = (4, 8, 16, 20, 32, 36, 64, 68, 128, 132, 256, 296, 512, 648)
MOST_FOURS = 652


class CountingTeam(ThreadTeam):
    """It counts the operations that its threads share."""

    num_shared = 0

    def run(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        self.num_shared += len(tasks) > 1
        return super().run(tasks)

    def in_one(self, operation: Callable[[], T]) -> T:
        self.num_shared += self.size > 1
        return super().in_one(operation)


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def products(out: int, inner: int) -> list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor]]:
    """Each product, its rows, and what they are in float64."""
    generator = torch.Generator().manual_seed(out)
    weight = torch.randn(out, inner, generator=generator)
    bias = torch.randn(out, generator=generator)
    forwards = torch.randn(MOST, inner, generator=generator)
    backwards = torch.randn(MOST, out, generator=generator)
    return [
        (
            lambda rows: times_transposed(rows, weight),
            forwards,
            forwards.double() @ weight.double().T,
        ),
        (
            lambda rows: times_transposed(rows, weight, bias),
            forwards,
            forwards.double() @ weight.double().T + bias.double(),
        ),
        (
            lambda rows: times_frozen(rows, weight),
            backwards,
            backwards.double() @ weight.double(),
        ),
    ]


@pytest.mark.parametrize(("out", "inner"), SHAPES)
def test_a_rows_bits_depend_on_no_other_row_and_on_no_number_of_threads(
    out: int, inner: int
) -> None:
    for product, rows, _ in products(out, inner):
        torch.set_num_threads(1)
        expected = product(rows)
        for num_threads in (1, 2, 4):
            torch.set_num_threads(num_threads)
            for number in NUMBERS:
                for start in (0, 1):
                    part = slice(start, start + number)
                    assert torch.equal(product(rows[part]), expected[part])


@pytest.mark.parametrize(("out", "inner"), SHAPES)
def test_they_are_the_products(out: int, inner: int) -> None:
    for product, rows, expected in products(out, inner):
        torch.testing.assert_close(product(rows).double(), expected, rtol=1e-4, atol=1e-3)
        assert product(rows[:0]).shape == expected[:0].shape


@pytest.mark.parametrize(
    ("num_threads", "has_bias", "out", "inner"),
    [*((1, i % 2 == 0, *shape) for i, shape in enumerate(BFLOAT16_SHAPES)), (2, True, 256, 4096)],
)
def test_a_bfloat16_rows_bits_depend_on_no_other_row(
    num_threads: int, has_bias: bool, out: int, inner: int
) -> None:
    """Where the processor has AMX, oneDNN's own products of these shapes fail this."""
    generator = torch.Generator().manual_seed(out)
    weight = (torch.randn(out, inner, generator=generator) / 16).bfloat16()
    bias = torch.randn(out, generator=generator).bfloat16() if has_bias else None
    rows = torch.randn(MOST_FOURS, inner, generator=generator).bfloat16()
    torch.set_num_threads(num_threads)
    expected = times_transposed(rows, weight, bias)
    for i, number in enumerate(NUMBERS_OF_FOURS):
        part = slice(4 * (i % 2), 4 * (i % 2) + number)
        assert torch.equal(times_transposed(rows[part], weight, bias), expected[part])
    exact = rows.double() @ weight.double().T + (0 if bias is None else bias.double())
    torch.testing.assert_close(expected.double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize(("out", "inner"), [*BFLOAT16_SHAPES, (896, 4864), (8192, 1024)])
def test_a_bfloat16_gradients_bits_depend_on_no_other_row(out: int, inner: int) -> None:
    generator = torch.Generator().manual_seed(out)
    weight = (torch.randn(out, inner, generator=generator) / 16).bfloat16()
    rows = torch.randn(MOST_FOURS, out, generator=generator).bfloat16()
    torch.set_num_threads(1)
    expected = times_frozen(rows, weight)
    for i, number in enumerate(NUMBERS_OF_FOURS):
        part = slice(4 * (i % 2), 4 * (i % 2) + number)
        assert torch.equal(times_frozen(rows[part], weight), expected[part])
    assert times_frozen(rows[:0], weight).shape == (0, inner)
    exact = rows.double() @ weight.double()
    torch.testing.assert_close(expected.double(), exact, rtol=2**-8, atol=1e-3)


def test_a_bfloat16_row_alone_is_a_product() -> None:
    rows, weight = torch.randn(1, 64).bfloat16(), torch.randn(24, 64).bfloat16()
    product = times_transposed(rows, weight)
    torch.testing.assert_close(product, rows @ weight.T, rtol=2**-7, atol=2**-6)
    assert times_transposed(rows[:0], weight).shape == (0, 24)


def test_rows_that_do_not_lie_one_after_the_other_are_computed_as_if_they_did() -> None:
    for product, rows, _ in products(24, 64):
        assert torch.equal(product(rows.T.contiguous().T), product(rows))


def test_a_gradient_is_not_lost() -> None:
    weight, rows = torch.randn(24, 64), torch.randn(5, 64, requires_grad=True)
    times_transposed(rows, weight).sum().backward()
    torch.testing.assert_close(rows.grad, weight.sum(0).expand(5, -1))
    grad = torch.randn(5, 24, requires_grad=True)
    times_frozen(grad, weight).sum().backward()
    torch.testing.assert_close(grad.grad, weight.sum(1).expand(5, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("out", "inner"),
    [
        (9216, 1024),
        (3000, 2999),
        (1536, 576),
        (576, 1536),
        (896, 640),
        (576, 320),
        (20000, 64),
        (64, 20000),
    ],
)
def test_no_bit_shows_that_several_threads_computed_a_product(
    dtype: torch.dtype, out: int, inner: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inner, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype)
    teams = [CountingTeam(size) for size in (2, 3, 4)]
    for number in (2, 4, 5, 32, 68, 96, 100, 124, 500):
        rows = torch.randn(number, inner, generator=generator).to(dtype)
        gradient = torch.randn(number, out, generator=generator).to(dtype)
        products = [
            partial(times_transposed, rows, weight),
            partial(times_transposed, rows, weight, bias),
            partial(times_frozen, gradient, weight),
        ]
        for product in products:
            alone = product()
            for team in teams:
                assert torch.equal(product(team=team), alone)
    if weight.numel() > 2**22 or not needs_blocks(torch.ones(2, inner, dtype=dtype), weight):
        assert all(team.num_shared for team in teams)
    assert torch.get_num_threads() == 1


def test_a_small_matrix_and_a_recorded_product_are_computed_whole() -> None:
    team = CountingTeam(4)
    times_transposed(torch.randn(4, 576), torch.randn(192, 576), team=team)
    rows = torch.randn(4, 3000, requires_grad=True)
    times_transposed(rows, torch.ones(3000, 3000), team=team).sum().backward()
    torch.testing.assert_close(rows.grad, torch.full_like(rows, 3000.0))
    assert team.num_shared == 0
