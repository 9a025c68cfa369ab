"""Large training passes: the plan of their memory, and layers that compute their activations twice.

Recomputing is judged by bits, and the plan by the bytes of all tensors of a much larger pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.families import save_random, small_config
from tests.engine.reference import TinyTrainer
from tests.engine.test_padded_families import GATED_DELTA, MROPE
from training.engine.interface import ForwardBackwardJob
from training.engine.torch.adapters import AdapterTensors
from training.engine.torch.live_bytes import LiveBytes
from training.engine.torch.loading import load_base_model
from training.engine.torch.memory_plan import (
    HEAD_BYTES,
    MEASURED_ROWS,
    PLANNED_ROWS,
    MemoryPlan,
    tensor_bytes,
)
from training.engine.torch.packing.ranges import RowRange
from training.engine.torch.packing.stream import Segment
from training.engine.torch.peak_memory import PeakMemory
from training.errors import OutOfMemory
from training.types import Datum, ForwardBackwardOutput, LoraConfig

LONG = {"max_position_embeddings": 4096}
DEEP = 6  # layers: what all keep outweighs what one needs at one time
WINDOWS = {
    "layer_types": ["sliding_attention", "full_attention"] * (DEEP // 2),
    "num_hidden_layers": DEEP,
    "sliding_window": 48,
    "hidden_size": 64,  # narrower, the scores would outweigh the layers, as in no real model
    "intermediate_size": 256,
}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_hidden_layers": DEEP}),
    ("gemma3_text", WINDOWS),
    ("gpt_oss", WINDOWS),
    ("qwen3_moe", {"num_hidden_layers": DEEP}),
    ("qwen3_5_text", {**GATED_DELTA, **MROPE}),
    ("mamba", {}),
]
"""One for each way in which layers work: packed, windows, sinks and experts; padded, with a
recurrent state."""


@pytest.fixture(scope="module", params=FAMILIES, ids=[name for name, _ in FAMILIES])
def base_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    name, changes = request.param
    folder = save_random(small_config(name, **LONG | changes), tmp_path_factory.mktemp(name))
    return load_base_model(folder, dtype="float32", device="cpu")


def make_data(num_rows: int, length: int = 100) -> list[Datum]:
    """Different datums of this many tokens in total."""
    rng = np.random.default_rng(0)
    data = []
    for start in range(0, num_rows, length):
        tokens = rng.integers(3, 200, min(length, num_rows - start) + 1)
        weights = np.ones(len(tokens) - 1, np.float32)
        inputs = {"target_tokens": tokens[1:], "weights": weights}
        data.append(Datum(model_input=tokens[:-1].astype(np.int32), loss_fn_inputs=inputs))
    return data


def train(base_model: Any, data: list[Datum], **options: Any) -> tuple[ForwardBackwardOutput, Any]:
    trainer = TinyTrainer(base_model, **options)
    trainer.create_adapter("a", LoraConfig(rank=8))
    trainer.randomise("a")
    return trainer.train_one("a", data), trainer.grad("a")


def test_recomputing_changes_no_bit(base_model) -> None:
    data = make_data(PLANNED_ROWS + 50)
    kept, kept_grad = train(base_model, data)
    again, again_grad = train(base_model, data, activation_bytes=1)
    assert kept.memory is not None
    assert not kept.memory.recomputed
    assert again.memory is not None
    assert again.memory.recomputed
    assert again.memory.planned_bytes < kept.memory.planned_bytes
    assert kept_grad.any()
    np.testing.assert_array_equal(again_grad, kept_grad)
    for one, other in zip(again.logprobs, kept.logprobs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_small_pass_is_not_planned(engine: TinyTrainer) -> None:
    engine.create_adapter("a", LoraConfig(rank=8))
    assert engine.train_one("a", make_data(PLANNED_ROWS - 64, 64)).memory is None


@pytest.mark.parametrize("recomputes", [False, True], ids=["keeps", "recomputes"])
def test_the_plan_is_the_bytes_of_a_long_pass(base_model, recomputes: bool) -> None:
    trainer = TinyTrainer(base_model)
    trainer.create_adapter("a", LoraConfig(rank=8))
    layout = trainer.layout_of("a")
    num_rows = 2 * PLANNED_ROWS
    plan = MemoryPlan(base_model, activation_bytes=1 if recomputes else 2**40)
    planned = plan.of_pass([RowRange(start=0, length=num_rows)], [layout])
    assert planned is not None
    seen = tensor_bytes(base_model, layout, num_rows, recomputes=recomputes)
    of_decoder = planned.num_bytes - HEAD_BYTES - 4 * layout.num_parameters
    assert of_decoder > 0.85 * seen
    if not base_model.is_padded:  # the scores need not exist when other tensors are most
        scores = plan._bytes(layout, recomputes=recomputes).scores.bytes_of(num_rows, num_rows)
        assert of_decoder < 1.15 * seen + scores


def test_a_pass_of_many_short_datums_is_planned_within_the_context(tmp_path: Path) -> None:
    """This family has a table of positions, and none after the context's end."""
    folder = save_random(small_config("mpt"), tmp_path)
    base_model = load_base_model(folder, dtype="float32", device="cpu")
    assert base_model.info.max_context_tokens < 2 * MEASURED_ROWS
    output, _ = train(base_model, make_data(PLANNED_ROWS, 50), activation_bytes=1)
    assert output.memory is not None


@pytest.mark.parametrize("recomputes", [False, True], ids=["keeps", "recomputes"])
def test_the_plan_counts_short_sequences_as_layers_compute_them(
    base_model, recomputes: bool
) -> None:
    """Recurrent layers compute whole chunks. The kernel for short packed sequences keeps its shares
    too, which in these narrow models are as large as all the rest."""
    factor = 0.85 if base_model.is_padded else 0.5
    trainer = TinyTrainer(base_model)
    trainer.create_adapter("a", LoraConfig(rank=8))
    layout, length = trainer.layout_of("a"), 20
    ranges = [RowRange(start=start, length=length) for start in range(0, PLANNED_ROWS + 60, length)]
    num_rows = ranges[-1].end
    weights, grad = (AdapterTensors(layout, torch.zeros(layout.num_parameters)) for _ in range(2))
    with LiveBytes([grad.flat, weights.flat, *base_model.frozen_tensors()]) as live:
        hidden = base_model.sequence_states(
            torch.zeros(num_rows, dtype=torch.int64),
            torch.arange(num_rows) % length,
            [Segment(start=0, end=num_rows, weights=weights, grad=grad)],
            ranges,
            recomputes=recomputes,
        )
        hidden.backward(torch.zeros_like(hidden))
    plan = MemoryPlan(base_model, activation_bytes=1 if recomputes else 2**40)
    planned = plan.of_pass(ranges, [layout])
    assert planned is not None
    assert planned.num_bytes - HEAD_BYTES > factor * live.peak_bytes


def test_a_wider_adapter_is_planned_wider(tied_base_model) -> None:
    """Measured at rank 8, and then computed for 128."""
    trainer = TinyTrainer(tied_base_model)
    for rank in (8, 128):
        trainer.create_adapter(str(rank), LoraConfig(rank=rank))
    plan = MemoryPlan(tied_base_model, activation_bytes=2**40)
    rows = [RowRange(start=0, length=PLANNED_ROWS)]
    plan.of_pass(rows, [trainer.layout_of("8")])
    wider = plan.of_pass(rows, [trainer.layout_of("128")])
    assert wider is not None
    layout = trainer.layout_of("128")
    seen = tensor_bytes(tied_base_model, layout, 32, recomputes=False) / 32 * PLANNED_ROWS
    scores = plan._bytes(layout, recomputes=False).scores.bytes_of(PLANNED_ROWS, PLANNED_ROWS)
    of_decoder = wider.num_bytes - HEAD_BYTES - 4 * layout.num_parameters
    assert of_decoder - scores == pytest.approx(seen, rel=0.15)


def test_a_datum_that_cannot_fit_is_refused_with_the_length_that_would(tmp_path: Path) -> None:
    folder = save_random(small_config("llama", **LONG), tmp_path)
    base_model = load_base_model(folder, dtype="float32", device="cpu")
    free = HEAD_BYTES + 20 * 2**20
    trainer = TinyTrainer(base_model, free_bytes=lambda device: free)
    trainer.create_adapter("a", LoraConfig(rank=8))
    plan = MemoryPlan(base_model, free_bytes=lambda device: free)
    longest = plan.longest(trainer.layout_of("a"))
    assert PLANNED_ROWS < longest < 4096

    def job(length: int, **kwargs: Any) -> ForwardBackwardJob:
        data = [*make_data(10), *make_data(length, length)]
        return ForwardBackwardJob(adapter_name="a", data=data, loss_fn="cross_entropy", **kwargs)

    too_long, fits, replayed, scored = trainer.forward_backward(
        [
            job(longest + 1),
            job(longest),
            job(longest + 1, is_replay=True),
            job(longest + 1, forward_only=True),
        ]
    )
    assert isinstance(too_long, OutOfMemory)
    assert f"data[1]: {longest + 1} tokens" in str(too_long)
    assert f"has {longest} tokens" in str(too_long)
    assert isinstance(fits, ForwardBackwardOutput)
    assert isinstance(replayed, ForwardBackwardOutput)
    assert isinstance(scored, ForwardBackwardOutput)


def test_a_device_without_room_to_measure_refuses_long_datums_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan's own passes do not fit there; shorter datums do."""
    folder = save_random(small_config("llama", **LONG), tmp_path)
    base_model = load_base_model(folder, dtype="float32", device="cpu")
    trainer = TinyTrainer(base_model)
    trainer.create_adapter("a", LoraConfig(rank=8))
    forward = base_model._decoder.forward

    def small(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].numel() >= MEASURED_ROWS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(base_model._decoder, "forward", small)
    long, short = trainer.forward_backward(
        [
            ForwardBackwardJob(adapter_name="a", data=make_data(n, n), loss_fn="cross_entropy")
            for n in (PLANNED_ROWS, 32)
        ]
    )
    assert isinstance(long, OutOfMemory)
    assert isinstance(short, ForwardBackwardOutput)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_is_that_of_the_pass_alone() -> None:
    held = torch.ones(30 * 2**20)  # before, so not counted
    with PeakMemory(torch.device("cpu")) as peak:
        for _ in range(3):
            torch.ones(25 * 2**20)  # 100 MiB, three times one after another
        seen = peak.peak_bytes()
    del held
    assert seen == pytest.approx(100 * 2**20, rel=0.15)
