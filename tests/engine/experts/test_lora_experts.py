"""The experts of a layer with many segments: right, and no segment depends on its batch-mates."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from training.engine.torch.adapters import AdapterLayout, AdapterTensors
from training.engine.torch.attention.sequences import SequenceAttention
from training.engine.torch.experts.lora_experts import LoraExperts
from training.engine.torch.experts.stacks import ExpertStack, find_stacks
from training.engine.torch.packing.ranges import whole_sequences
from training.engine.torch.packing.stream import ContextHolder, PackedContext, Segment
from training.types import LoraConfig

NUM_EXPERTS, HIDDEN, INNER, TOP_K = 6, 16, 24, 3
LENGTHS = [17, 16, 40, 5]
Answers = tuple[Tensor, Tensor, Tensor, list[Tensor]]


def make_stack(kind: str, dtype: torch.dtype) -> ExpertStack:
    sizes = {"hidden_size": HIDDEN, "experts_implementation": "eager"}
    if kind == "gpt_oss":
        config = GptOssConfig(num_local_experts=NUM_EXPERTS, intermediate_size=INNER, **sizes)
        experts = GptOssExperts(config)
    else:
        config = Qwen3MoeConfig(num_experts=NUM_EXPERTS, moe_intermediate_size=INNER, **sizes)
        experts = Qwen3MoeExperts(config)
    config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    (stack,) = find_stacks(torch.nn.ModuleDict({"experts": experts.to(dtype)})).values()
    experts.requires_grad_(False)
    return stack


def make_weights(
    stack: ExpertStack, rank: int, *, shares: bool = True, seed: int = 0
) -> AdapterTensors:
    shapes = {
        layer.name: layer.shape if shares else layer.shape.without_sharing()
        for layer in stack.layers
    }
    layout = AdapterLayout(LoraConfig(rank=rank, alpha=1.3 * rank), shapes)
    generator = torch.Generator().manual_seed(rank + 100 * seed)
    return AdapterTensors(layout, 0.1 * torch.randn(layout.num_parameters, generator=generator))


def draw(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, experts, shares and a gradient."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    scores = torch.randn(num_tokens, NUM_EXPERTS, generator=generator)
    weights, chosen = scores.softmax(-1).topk(TOP_K, dim=-1)
    grad = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    return hidden, chosen, weights.to(dtype), grad


def run(
    stack: ExpertStack,
    adapters: Sequence[AdapterTensors | None],
    lengths: Sequence[int],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Answers:
    """Output, gradients of the hidden states and shares, and the adapter's gradient by segment."""
    hidden, chosen, weights, grad = inputs
    segments, start = [], 0
    for length, own in zip(lengths, adapters, strict=True):
        buffer = None if own is None else AdapterTensors(own.layout, torch.zeros_like(own.flat))
        segments.append(Segment(start=start, end=start + length, weights=own, grad=buffer))
        start += length
    context = PackedContext(
        segments=segments, attention=SequenceAttention(whole_sequences(lengths))
    )
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    holder = ContextHolder()
    with holder.active(context):
        output = LoraExperts(stack, holder)(hidden, chosen, weights)
    output.backward(grad)
    assert hidden.grad is not None
    assert weights.grad is not None
    grads = [segment.grad.flat for segment in segments if segment.grad is not None]
    return output.detach(), hidden.grad, weights.grad, grads


def rows_of(inputs: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, chosen, weights, grad = (tensor[rows].clone() for tensor in inputs)
    return hidden, chosen, weights, grad


def reference(
    stack: ExpertStack, adapter: AdapterTensors, inputs: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Answers:
    """The module's own code on updated weights, one token and expert after the other, by
    autograd in float64."""
    hidden, chosen, weights, grad = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs
    )
    hidden, weights = hidden.requires_grad_(), weights.requires_grad_()
    flat = adapter.flat.double().requires_grad_()
    updated = {}
    for projection in (stack.up, stack.down):
        matrices = projection.matrices.double()
        for layer in projection.layers:
            a, b = adapter.layout.pair(flat, layer.name)
            whole = torch.zeros_like(matrices)
            update = a.transpose(-1, -2) @ b.transpose(-1, -2) * adapter.layout.scale
            whole[:, :, layer.columns] = update
            matrices = matrices + whole
        updated[projection.parameter_name] = matrices
    outputs = []
    for token in range(len(hidden)):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for share, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            inner = hidden[token] @ updated["gate_up_proj"][expert]
            if stack.up.bias is not None:
                inner = inner + stack.up.bias[expert].double()
            inner = stack.module._apply_gate(inner[None])[0] @ updated["down_proj"][expert]
            if stack.down.bias is not None:
                inner = inner + stack.down.bias[expert].double()
            total = total + share * inner
        outputs.append(total)
    output = torch.stack(outputs)
    output.backward(grad)
    assert hidden.grad is not None
    assert weights.grad is not None
    assert flat.grad is not None
    return output.detach(), hidden.grad, weights.grad, [flat.grad]


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_outputs_and_every_gradient_are_autograds(
    kind: str, dtype: torch.dtype, bound: float, shares: bool
) -> None:
    stack = make_stack(kind, dtype)
    adapter = make_weights(stack, 8, shares=shares)
    inputs = draw(50, dtype)
    ours, expected = run(stack, [adapter], [50], inputs), reference(stack, adapter, inputs)
    for mine, theirs in zip([*ours[:3], *ours[3]], [*expected[:3], *expected[3]], strict=True):
        assert (mine.double() - theirs).norm() <= bound * theirs.norm()


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("shares", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 8])
def test_a_segments_bits_are_those_it_has_alone(
    rank: int, dtype: torch.dtype, shares: bool
) -> None:
    stack = make_stack("gpt_oss", dtype)
    adapters = [
        make_weights(stack, rank, shares=shares),
        make_weights(stack, 4, shares=not shares),
        None,
        make_weights(stack, rank, shares=shares, seed=1),
    ]
    inputs = draw(sum(LENGTHS), dtype)
    output, grad_hidden, grad_weights, grads = run(stack, adapters, LENGTHS, inputs)
    start = 0
    remaining = iter(grads)
    for length, adapter in zip(LENGTHS, adapters, strict=True):
        rows = slice(start, start + length)
        alone = run(stack, [adapter], [length], rows_of(inputs, rows))
        assert torch.equal(output[rows], alone[0])
        assert torch.equal(grad_hidden[rows], alone[1])
        assert torch.equal(grad_weights[rows], alone[2])
        if adapter is not None:
            assert torch.equal(next(remaining), alone[3][0])
        start += length


def test_an_expert_without_tokens_has_no_gradient_and_one_with_all_has_it_all() -> None:
    stack = make_stack("gpt_oss", torch.float32)
    adapter = make_weights(stack, 4, shares=False)
    hidden, _, weights, grad = draw(30, torch.float32)
    chosen = torch.full((30, 1), 2)
    inputs = (hidden, chosen, weights[:, :1], grad)
    ours, expected = run(stack, [adapter], [30], inputs), reference(stack, adapter, inputs)
    for layer in stack.layers:
        for mine, theirs in zip(
            adapter.layout.pair(ours[3][0], layer.name),
            adapter.layout.pair(expected[3][0], layer.name),
            strict=True,
        ):
            assert not mine[[0, 1, 3, 4, 5]].any()
            assert (mine[2].double() - theirs[2]).norm() <= 1e-6 * theirs[2].norm()


def test_a_batch_mate_with_infinite_numbers_changes_nothing() -> None:
    stack = make_stack("qwen3_moe", torch.float32)
    adapters = [make_weights(stack, 8), make_weights(stack, 8, seed=1)]
    inputs = draw(40, torch.float32)
    alone = run(stack, adapters[1:], [20], rows_of(inputs, slice(20, 40)))
    inputs[0][:20] = torch.inf
    inputs[3][:20] = torch.nan
    together = run(stack, adapters, [20, 20], inputs)
    assert torch.equal(together[0][20:], alone[0])
    assert torch.equal(together[1][20:], alone[1])
    assert torch.equal(together[3][1], alone[3][0])


def test_without_a_pass_the_stack_computes_itself() -> None:
    stack = make_stack("qwen3_moe", torch.float32)
    hidden, chosen, weights, _ = draw(9, torch.float32)
    ours = LoraExperts(stack, ContextHolder())(hidden, chosen, weights)
    assert torch.equal(ours, stack.module(hidden, chosen, weights))
