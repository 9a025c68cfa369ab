"""Passes in threads of their own whose linear layers are computed together."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from training.engine.torch.packing.stream import (
    ContextHolder,
    PassContext,
    SingleContext,
    round_up,
)
from training.engine.torch.padded.side_by_side import SideBySide


class Doubling:
    """A layer that notes the rows of each product."""

    def __init__(self) -> None:
        self.products: list[list[tuple[int, int]]] = []

    def together(self, rows: Tensor, context: PassContext) -> Tensor:
        self.products.append([(segment.start, segment.end) for segment in context.segments])
        assert context.segments[-1].end == len(rows)
        return 2 * rows


def pass_over(holder: ContextHolder, layers: list[Doubling], rows: Tensor) -> Callable[[], Tensor]:
    context = SingleContext(weights=None, enough_rows=lambda n: round_up(n, 4))

    def run() -> Tensor:
        assert not torch.is_grad_enabled()
        hidden = rows
        with holder.active(context):
            for layer in layers:
                assert holder.current is context
                assert holder.beside is not None
                hidden = holder.beside.product(layer, hidden, context) + 1
        return hidden

    return run


def test_rows_of_all_passes_go_through_each_layer_at_once() -> None:
    holder, first, second = ContextHolder(), Doubling(), Doubling()
    inputs = [torch.full((n, 2), float(n)) for n in (1, 3, 5)]
    passes = [pass_over(holder, [first, second], rows) for rows in inputs]

    results = SideBySide(holder).run(passes)

    for rows, result in zip(inputs, results, strict=True):
        assert torch.equal(result, 2 * (2 * rows + 1) + 1)
    assert first.products == second.products == [[(0, 4), (4, 8), (8, 16)]]
    assert holder.beside is None
    assert holder.current is None


def test_passes_over_different_layers_wait_for_their_own() -> None:
    holder, first, second = ContextHolder(), Doubling(), Doubling()
    rows = torch.ones(4, 2)
    passes = [pass_over(holder, layers, rows) for layers in ([first, second], [second])]

    results = SideBySide(holder).run(passes)

    assert [result[0, 0].item() for result in results] == [7, 3]
    assert first.products == [[(0, 4)]]


def test_an_error_of_one_pass_ends_all_and_is_raised() -> None:
    holder, layer = ContextHolder(), Doubling()
    beside = SideBySide(holder)
    good = pass_over(holder, [layer, layer], torch.ones(2, 2))

    def bad() -> Tensor:
        good()
        raise ZeroDivisionError("its own")

    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="its own"):
        beside.run([good, bad, pass_over(holder, [layer] * 9, torch.ones(2, 2))])
    assert threading.active_count() == threads
    assert holder.beside is None
    assert [len(result) for result in beside.run([good, good])] == [2, 2]  # usable afterwards
