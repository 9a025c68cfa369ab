"""An adapter's experts out of peft's form (``peft_form``).

peft has one pair for gate and up, which are two layers here. If its rank is twice the adapter's it
is a pair that this server exported, and is cut into the two; otherwise both layers get its A, and
each the part of its B for its outputs. The function is the same. Matrices that are equal for all
experts become one, which they share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from training.engine.torch.adapters import AdapterLayout, LoraShape
from training.engine.torch.experts.peft_form import peft_exchanges, projections_in
from training.engine.torch.experts.stacks import ExpertStack, Projection
from training.errors import InvalidRequest
from training.peft_import.files import WEIGHTS_NAME, WRAPPER, PeftFiles
from training.peft_import.patterns import Patterns


def read_experts(
    layout: AdapterLayout,
    flat: Tensor,
    stacks: Mapping[str, ExpertStack],
    files: PeftFiles,
    patterns: Patterns,
    get: Callable[[str], Tensor],
) -> None:
    """Write the matrices of all experts to their places in ``flat`` (P,).

    Raises:
        InvalidRequest: The file lacks some, has others, or they have another form.
    """
    left = set(files.experts)
    for stack in stacks.values():
        for depth, projection in enumerate(reversed(projections_in(layout, stack))):
            wrapper = stack.name + WRAPPER * depth
            name = f"{stack.name}.{projection.parameter_name}"
            if wrapper not in left:
                raise _refusal(f"lacks the matrices of {name!r}, which target_parameters selects")
            left.remove(wrapper)
            rank = patterns.rank(name)
            a, b = _matrices(projection, wrapper, rank, get)
            _write(layout, flat, projection, a, b, own_rank=files.config.rank)
            factor = files.config.scale(rank, patterns.alpha(name)) / layout.scale
            if factor != 1.0:
                for layer in projection.layers:
                    layout.pair(flat, layer.name)[1].mul_(factor)
    if left:
        raise _refusal(
            f"has matrices of {min(left)[:200]!r}, which target_parameters does not select"
        )


def share_equal(
    layout: AdapterLayout, flat: Tensor, shapes: Mapping[str, LoraShape]
) -> tuple[AdapterLayout, Tensor] | None:
    """The same adapter with matrices that experts share, if those are equal for all experts of each
    layer; otherwise None.

    Args:
        shapes: Of the base model's layers; those of experts say what they share.
    """
    config = replace(layout.config, share_across_experts=True)
    shared = AdapterLayout(config, {name: shapes[name] for name in layout.places})
    result = flat.new_zeros(shared.num_parameters)
    for name in layout.places:
        pairs = zip(layout.pair(flat, name), shared.pair(result, name), strict=True)
        for given, own in pairs:
            own.copy_(given[0] if given.ndim > own.ndim else given)
            if not torch.equal(own.expand_as(given), given):
                return None
    return shared, result


def _matrices(
    projection: Projection, wrapper: str, rank: int, get: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor]:
    """A (E, R, in) and B (E, out, R) of a whole parameter."""
    whole = projection.layers[0].shape
    num_experts, inputs, outputs = whole.num_experts, whole.in_features, projection.num_outputs
    if peft_exchanges(projection):
        inputs, outputs = outputs, inputs
    expected = {"A": (num_experts * rank, inputs), "B": (outputs, rank * num_experts)}
    given = {}
    for side, shape in expected.items():
        name = f"{wrapper}.lora_{side}.weight"
        given[side] = get(f"base_model.model.{name}")
        if given[side].shape != shape:
            raise _refusal(
                f"{name} has shape {list(given[side].shape)}; this base model's "
                f"{projection.parameter_name} at rank {rank} needs {list(shape)}"
            )
    a = given["A"].view(num_experts, rank, inputs)
    b = given["B"].view(outputs, rank, num_experts).permute(2, 0, 1)
    return (b.transpose(1, 2), a.transpose(1, 2)) if peft_exchanges(projection) else (a, b)


def _write(
    layout: AdapterLayout, flat: Tensor, projection: Projection, a: Tensor, b: Tensor, own_rank: int
) -> None:
    layers, rank = projection.layers, a.shape[1]
    is_joined = len(layers) > 1 and rank == len(layers) * own_rank
    if not is_joined and rank > layout.rank:
        raise InvalidRequest(
            f"adapter_config.json: rank_pattern: {projection.parameter_name} of experts has rank "
            f"{rank}; expected r, which is {own_rank}"
        )
    for i, layer in enumerate(layers):
        own = slice(i * own_rank, (i + 1) * own_rank) if is_joined else slice(0, rank)
        of_layer = b[:, layer.columns]  # (E, out, R)
        if is_joined and of_layer.count_nonzero() != of_layer[..., own].count_nonzero():
            raise InvalidRequest(
                f"adapter_config.json: rank_pattern: {projection.parameter_name} of experts has "
                f"rank {rank}, twice r; that is read only if gate and up have half of it each, as "
                "in exports of this server"
            )
        own_a, own_b = layout.pair(flat, layer.name)
        width = own.stop - own.start
        own_a[:, :width] = a[:, own]
        own_b[..., :width] = of_layer[..., own]


def _refusal(why: str) -> InvalidRequest:
    return InvalidRequest(f"{WEIGHTS_NAME}: {why}")
