"""The optimizer step against torch's own AdamW and clipping, and its forbidden effects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.engine.torch.adamw import adamw_step
from training.engine.torch.adapters import AdapterLayout, AdapterTensors, LoraShape, new_adapter
from training.errors import GradientDropped, NonFiniteResult
from training.types import AdamParams, LoraConfig

SHAPES = {"up": LoraShape(6, 5), "down": LoraShape(5, 6)}


@pytest.fixture
def adapter():
    return new_adapter(AdapterLayout(LoraConfig(rank=3), SHAPES), torch.device("cpu"))


def state_of(adapter):
    return [
        tensor.clone()
        for tensor in (
            adapter.weights.flat,
            adapter.grad.flat,
            adapter.exp_avg,
            adapter.exp_avg_sq,
            torch.tensor(adapter.step),
        )
    ]


@pytest.mark.parametrize(
    "params",
    [
        AdamParams(),
        AdamParams(learning_rate=0.1, weight_decay=0.3, beta1=0.5, beta2=0.999, eps=1e-3),
        AdamParams(learning_rate=0.01, grad_clip_norm=0.7),
        AdamParams(learning_rate=0.01, grad_clip_norm=1e6),
        AdamParams(beta1=0.0, beta2=0.0, eps=1e-8),
    ],
)
def test_steps_are_those_of_torch(adapter, params):
    generator = torch.Generator().manual_seed(0)
    names = list(SHAPES)
    parameters = [
        torch.nn.Parameter(matrix.clone())
        for name in names
        for matrix in adapter.layout.pair(adapter.weights.flat, name)
    ]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=params.learning_rate,
        betas=(params.beta1, params.beta2),
        eps=params.eps,
        weight_decay=params.weight_decay,
    )
    for step in range(1, 4):
        adapter.grad.flat.copy_(torch.randn(adapter.grad.flat.shape, generator=generator))
        grads = [m for n in names for m in adapter.layout.pair(adapter.grad.flat, n)]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters, params.grad_clip_norm or float("inf"))
        optimizer.step()

        output = adamw_step(adapter, params)

        assert output.step == step
        assert output.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        ours = [m for n in names for m in adapter.layout.pair(adapter.weights.flat, n)]
        for matrix, parameter in zip(ours, parameters, strict=True):
            torch.testing.assert_close(matrix, parameter.detach(), rtol=2e-6, atol=1e-7)
        assert not adapter.grad.flat.any()


def test_without_a_gradient_decay_and_momentum_still_act(adapter):
    before = adapter.weights.flat
    adamw_step(adapter, AdamParams(learning_rate=0.1, weight_decay=0.5, eps=1e-8))
    torch.testing.assert_close(adapter.weights.flat, before * 0.95)
    adapter.grad.flat.fill_(1.0)
    adamw_step(adapter, AdamParams(learning_rate=0.1))
    moved = adapter.weights.flat
    adamw_step(adapter, AdamParams(learning_rate=0.1))
    assert (adapter.weights.flat < moved).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20, -1e30])
def test_a_gradient_that_no_step_can_take_is_dropped_and_nothing_else_changes(adapter, value):
    adapter.grad.flat.fill_(0.5)
    adamw_step(adapter, AdamParams())
    adapter.grad.flat.fill_(0.5)
    adapter.grad.flat[3] = value
    weights, _, *others = state_of(adapter)
    with pytest.raises(GradientDropped, match="is too large for a step: its square is outside"):
        adamw_step(adapter, AdamParams())
    for was, now in zip(
        [weights, torch.zeros_like(weights), *others], state_of(adapter), strict=True
    ):
        np.testing.assert_array_equal(was.numpy(), now.numpy())
    adapter.grad.flat.fill_(0.5)
    assert adamw_step(adapter, AdamParams()).step == 2


@pytest.mark.parametrize(
    "params",
    [
        AdamParams(learning_rate=1e38),  # divided by 1 - beta1
        AdamParams(learning_rate=1e30, weight_decay=1e30),
        AdamParams(eps=3e38, learning_rate=1e38, beta1=0.999),
    ],
)
def test_numbers_that_are_too_large_together_change_nothing(adapter, params):
    adapter.grad.flat.fill_(0.5)
    before = state_of(adapter)
    with pytest.raises(NonFiniteResult, match="new weights would not be finite"):
        adamw_step(adapter, params)
    for was, now in zip(before, state_of(adapter), strict=True):
        np.testing.assert_array_equal(was.numpy(), now.numpy())


def test_clipping_tames_a_gradient_whose_square_would_overflow(adapter):
    adapter.grad.flat.fill_(1e30)
    output = adamw_step(adapter, AdamParams(grad_clip_norm=1.0))
    assert output.grad_norm == pytest.approx(1e30 * len(adapter.grad.flat) ** 0.5, rel=1e-6)
    assert adapter.weights.flat.isfinite().all()


def test_whoever_holds_the_old_weights_keeps_them(adapter):
    held: AdapterTensors = adapter.weights
    before = held.flat.clone()
    adapter.grad.flat.fill_(1.0)
    adamw_step(adapter, AdamParams(learning_rate=0.1))
    assert torch.equal(held.flat, before)
    assert not torch.equal(adapter.weights.flat, before)
