"""Layers that keep only their input for the backward pass, which computes the rest again.

A layer's activations are most of a long sequence's memory: 42 KB for each token and layer of
the default model in float32, of which its input is 2 KB. The second computation has the shapes and
the kernels of the first, so a pass has the same bits either way, and takes longer by its forward
part, without the attention of long sequences (``attention.sequences``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from training.engine.torch.packing.stream import ContextHolder, PassContext


def recompute_on_request(decoder: nn.Module, holder: ContextHolder) -> bool:
    """Make the decoder's layers recompute in passes whose context asks for it.

    Returns:
        Whether it has such layers; a family may not mark its layers for transformers.
    """
    layers = list(_outermost_layers(decoder))
    for layer in layers:
        layer.forward = _on_request(layer.forward, holder, len(layers))
    return bool(layers)


def _outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield child
        else:
            yield from _outermost_layers(child)


def _on_request(
    forward: Callable[..., Any], holder: ContextHolder, num_layers: int
) -> Callable[..., Any]:
    def forward_or_recompute(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        context = holder.current
        if not isinstance(context, PassContext) or not torch.is_grad_enabled():
            return forward(hidden, *args, **kwargs)
        kept = context.kept_inputs
        if kept is None:
            return forward(hidden, *args, **kwargs)
        inputs = [kept.keep(hidden, num_layers), hidden]  # the last one is used, and then dropped

        def compute() -> Any:
            own = inputs.pop() if len(inputs) > 1 else inputs[0]
            if holder.current is context:
                return forward(own, *args, **kwargs)
            with holder.active(context):  # in the backward pass
                return forward(own, *args, **kwargs)

        # No random numbers: the model is in evaluation mode.
        return checkpoint(compute, use_reentrant=False, preserve_rng_state=False)

    return forward_or_recompute
