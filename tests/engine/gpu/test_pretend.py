"""The GPU that is none sees what a real one would punish."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.engine.gpu.pretend import GPU, OnGpu, pretend_gpu


def test_numbers_and_gradients_are_those_of_the_cpu() -> None:
    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    here = x.clone().requires_grad_()
    (here @ w).tanh().sum().backward()
    with pretend_gpu() as seen:
        there = x.to("cuda").requires_grad_()
        assert there.device == GPU
        assert there.is_cuda
        (there @ w.to("cuda")).tanh().sum().backward()
        assert isinstance(there.grad, OnGpu)
        assert torch.equal(there.grad.cpu(), here.grad)
    assert sum(seen.waits.values()) == 3  # two copies to the device, and one back


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(3),
        lambda x: x @ torch.ones(3, 2),
        lambda x: x.index_select(0, torch.tensor([0])),
        lambda x: torch.cat([x, torch.ones(1, 3)]),
        lambda x: torch.ones(2, 3).add_(x),
    ],
)
def test_tensors_on_two_devices_are_an_error(mixed: Callable[[Tensor], Tensor]) -> None:
    with pretend_gpu():
        x = torch.zeros(2, 3, device="cuda")
        with pytest.raises(RuntimeError):
            mixed(x)


@pytest.mark.parametrize(
    ("operation", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.to("cpu", torch.float64), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.unique(), 1),
        (lambda x: x[[0, 1]], 1),
        (lambda x: x.repeat_interleave(torch.zeros(2, dtype=torch.int64, device="cuda"), 0), 1),
        (lambda x: torch.tensor([1.0], device="cuda"), 1),
        (lambda x: torch.ones(2).to("cuda", non_blocking=True), 1),
        (lambda x: torch.ones(2).pin_memory().to("cuda"), 1),
        (lambda x: torch.ones(2).pin_memory().to("cuda", non_blocking=True), 0),
        (lambda x: x.to(torch.float64) * 2 + torch.arange(3, device="cuda"), 0),
        (lambda x: x.index_fill_(0, torch.zeros(1, dtype=torch.int64, device="cuda"), 1.0), 0),
        (lambda x: x.masked_fill(x > 0, 1.0).topk(2), 0),
    ],
)
def test_what_the_host_waits_for(operation: Callable[[Tensor], object], waits: int) -> None:
    with pretend_gpu() as seen:
        x = torch.zeros(2, 3, device="cuda")
        operation(x)
    assert sum(seen.waits.values()) == waits


def test_a_tensor_is_of_no_use_to_numpy_nor_after_the_context() -> None:
    with pretend_gpu():
        x = torch.zeros(2, device="cuda")
        with pytest.raises(TypeError, match="can't convert cuda"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="outside"):
        x + 1
