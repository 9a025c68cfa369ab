"""One optimizer step of one adapter: clipping and AdamW over whole flat buffers.

The arithmetic is that of ``torch.nn.utils.clip_grad_norm_`` and ``torch.optim.AdamW``. Every
buffer is replaced, none is modified: a step that is not finite has changed nothing, except
for a gradient that no later step could use either, and a sampling job keeps the weights that it
started with.
"""

from __future__ import annotations

import math

import torch

from training.engine.torch.adapters import Adapter, AdapterTensors, all_finite
from training.errors import GradientDropped, NonFiniteResult
from training.types import MAX_FLOAT32, AdamParams, OptimStepOutput

CLIP_EPS = 1e-6
"""clip_grad_norm_ adds this to the norm before dividing."""

_GRADIENT_OVERFLOW = (
    "The accumulated gradient, of norm {norm:.3g}, is too large for a step: its square is outside "
    "float32. It was dropped; weights and moments are unchanged. Send smaller advantages or "
    "weights, or clip the gradient with grad_clip_norm."
)
_WEIGHTS_OVERFLOW = "The new weights would not be finite; nothing was changed."


@torch.no_grad()
def adamw_step(adapter: Adapter, params: AdamParams) -> OptimStepOutput:
    """Apply the accumulated gradient and clear it.

    With gradient g (clipped), m and v the moments, t the step, all of shape (P,)::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        w = w * (1 - lr * weight_decay)
              - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Raises:
        GradientDropped: The gradient would make the moments infinite. It is cleared,
            or it would spoil every later step too; all else is unchanged.
        NonFiniteResult: The weights would not be finite, which other parameters may avoid; the
            adapter is unchanged, gradient included.
    """
    grad = adapter.grad.flat
    no_grad = AdapterTensors(adapter.layout, torch.zeros_like(grad))
    grad_norm = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
    if params.grad_clip_norm > 0:
        grad = grad * min(1.0, params.grad_clip_norm / (grad_norm + CLIP_EPS))
    step = adapter.step + 1
    step_size = params.learning_rate / (1 - params.beta1**step)
    decay = params.learning_rate * params.weight_decay
    if not max(step_size, decay) <= MAX_FLOAT32:
        raise NonFiniteResult(_WEIGHTS_OVERFLOW)
    exp_avg = torch.lerp(adapter.exp_avg, grad, 1 - params.beta1)
    exp_avg_sq = adapter.exp_avg_sq * params.beta2
    exp_avg_sq.addcmul_(grad, grad, value=1 - params.beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - params.beta2**step)).add_(params.eps)
    if not all_finite(exp_avg, exp_avg_sq):
        adapter.grad = no_grad
        raise GradientDropped(_GRADIENT_OVERFLOW.format(norm=grad_norm))
    weights = adapter.weights.flat * (1 - decay)
    weights.addcdiv_(exp_avg, denominator, value=-step_size)
    if not all_finite(weights):
        raise NonFiniteResult(_WEIGHTS_OVERFLOW)
    # From here on nothing is allocated, so nothing can fail part-way.
    adapter.weights, adapter.grad = AdapterTensors(adapter.layout, weights), no_grad
    adapter.exp_avg, adapter.exp_avg_sq, adapter.step = exp_avg, exp_avg_sq, step
    return OptimStepOutput(step=step, grad_norm=grad_norm)
