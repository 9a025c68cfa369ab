"""A trainer and its sampler compute with any number of threads, and no bit depends on it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.families import save_random, small_config
from tests.engine.reference import TinyTrainer
from tests.engine.sampling_jobs import job, run_all
from tests.tiny_model import VOCAB_SIZE
from training.engine.interface import ForwardBackwardJob, SampleOutput
from training.engine.renderer.chat_renderer import ChatRenderer
from training.engine.sampler.continuous_batching import ContinuousSampler
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.engine.torch.thread_team import PART_ROWS, ROWS_MULTIPLE, ThreadTeam, cut
from training.types import AdamParams, Datum, ForwardBackwardOutput, LoraConfig

LONG = {"max_position_embeddings": 1024, "initializer_range": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LONG,
    "gemma2": {
        **LONG,
        "initializer_range": 0.05,  # less steep: the check at the start is strict in bfloat16
        "sliding_window": 40,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 30.0,
    },
    "gpt_oss": {**LONG, "sliding_window": 40},
    "gpt2": LONG,
}
"""Plain; capped and with windows; with sinks and experts; with biases."""
MODELS = [(family, "packed") for family in FAMILIES] + [("llama", "padded"), ("gpt2", "padded")]
RANKS = (8, 5)


@cache
def folder_of(family: str) -> str:
    return save_random(small_config(family, **FAMILIES[family]), Path(mkdtemp()) / family)


@cache
def model_of(family: str, layout: str, dtype: str) -> BaseModel:
    return load_base_model(folder_of(family), device="cpu", dtype=dtype, layout=layout)


def datum_of(length: int, seed: int) -> Datum:
    rng = np.random.default_rng((seed, length))
    return Datum(
        model_input=rng.integers(3, VOCAB_SIZE, length).astype(np.int32),
        loss_fn_inputs={
            "target_tokens": rng.integers(3, VOCAB_SIZE, length),
            "weights": (rng.random(length) < 0.8).astype(np.float32),
        },
    )


def everything(base_model: BaseModel, lengths: Sequence[int], threads: Sequence[int]) -> list[Any]:
    """All numbers of passes, steps and samples, each with the next number of threads."""
    trainer = TinyTrainer(base_model)
    names = [f"a{rank}" for rank in RANKS]
    for name, rank in zip(names, RANKS, strict=True):
        trainer.create_adapter(name, LoraConfig(rank=rank, train_unembed=rank == RANKS[0]))
        trainer.randomise(name, seed=rank)
    data = [datum_of(length, seed) for seed, length in enumerate(lengths)]
    jobs = [ForwardBackwardJob(adapter_name=n, data=data, loss_fn="cross_entropy") for n in names]
    found: list[Any] = []
    number = cycle(threads)
    for _ in range(2):
        trainer.use_threads(next(number))
        for result in trainer.forward_backward(jobs):
            assert isinstance(result, ForwardBackwardOutput), result
            found += [result.loss, *result.logprobs]
        found += [trainer.grad(name) for name in names]
        trainer.use_threads(next(number))
        found += [trainer.optim_step(name, AdamParams(learning_rate=1e-3)) for name in names]
    found += [trainer.adapter_state(name)["weights"] for name in names]
    sampler = ContinuousSampler(base_model, ChatRenderer(base_model.tokenizer, VOCAB_SIZE))
    for name in names:
        sampler.publish(name, trainer.capture_adapter(name, with_optimizer=False))
    trainer.use_threads(next(number))
    prompts = {
        f"{n}": job(datum.model_input.tolist(), version=name, num_samples=3, max_tokens=6)
        for n, (datum, name) in enumerate(zip(data, names * len(data), strict=False))
    }
    for output in run_all(sampler, prompts).values():
        assert isinstance(output, SampleOutput), output
        found += [[s.tokens, s.logprobs] for s in output.sequences]
    trainer.use_threads(1)
    return found


def assert_equal(ours: Sequence[Any], theirs: Sequence[Any]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "layout"), MODELS)
@settings(max_examples=2, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    threads=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=3),
)
def test_no_bit_depends_on_the_number_of_threads(
    family: str, layout: str, dtype: str, lengths: list[int], threads: list[int]
) -> None:
    base_model = model_of(family, layout, dtype)
    alone = everything(base_model, [*lengths, 256], [1])
    assert_equal(everything(base_model, [*lengths, 256], threads), alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_threads_may_change_at_every_layer(dtype: str) -> None:
    """Also between a layer's forward pass and its second computation."""
    base_model = model_of("llama", "packed", dtype)
    data = [datum_of(length, seed) for seed, length in enumerate([1024, 250, 180, 400])]

    def grad(sizes: Sequence[int]) -> list[Any]:
        trainer = TinyTrainer(base_model, activation_bytes=1)
        trainer.create_adapter("a", LoraConfig(rank=8))
        trainer.randomise("a")
        number = cycle(sizes)
        trainer.report_progress(lambda: trainer.use_threads(next(number)))
        output = trainer.train_one("a", data)
        assert output.memory is not None
        assert output.memory.recomputed
        return [output.loss, *output.logprobs, trainer.grad("a")]

    try:
        alone = grad([1])
        assert_equal(grad([1, 3, 2, 1, 4]), alone)
        assert_equal(grad([2, 1, 1]), alone)
    finally:
        base_model.report_progress(lambda: None)
        base_model.holder.team.size = 1


def test_other_threads_take_part() -> None:
    everything(model_of("llama", "packed", "float32"), [256], [3])
    names = {thread.name for thread in threading.enumerate()}
    assert {"engine 1", "engine 2"} <= names


@pytest.mark.parametrize("size", [1, 2, 5])
def test_results_are_in_the_order_of_the_tasks(size: int) -> None:
    def task(number: int) -> Callable[[], int]:
        return lambda: number

    team = ThreadTeam(size)
    for count in (0, 1, 2, 7, 50):
        assert team.run([task(number) for number in range(count)]) == list(range(count))


def test_tasks_run_at_the_same_time() -> None:
    meeting = threading.Barrier(3)
    assert sorted(ThreadTeam(3).run([meeting.wait] * 3)) == [0, 1, 2]


def test_an_error_is_raised_after_all_tasks_have_ended() -> None:
    done: list[int] = []

    def fail() -> None:
        raise MemoryError("no room")

    team = ThreadTeam(2)
    with pytest.raises(MemoryError, match="no room"):
        team.run([fail, *([lambda: done.append(1)] * 5)])
    assert len(done) == 5
    assert team.run([lambda: 1, lambda: 2]) == [1, 2]


def test_no_task_records_gradients() -> None:
    meeting = threading.Barrier(2)

    def is_recording() -> bool:
        meeting.wait()  # so that each thread has one
        return torch.is_grad_enabled()

    with torch.enable_grad():
        assert ThreadTeam(2).run([is_recording] * 2) == [False, False]


def test_results_are_freed_when_the_caller_drops_them() -> None:
    results = ThreadTeam(4).run([lambda: torch.zeros(10)] * 2)  # two threads come too late
    references = [weakref.ref(tensor) for tensor in results]
    del results
    assert [reference() for reference in references] == [None, None]


@given(num_rows=st.integers(0, 5000), size=st.integers(1, 64))
def test_parts_cover_all_rows_and_begin_where_kernels_do(num_rows: int, size: int) -> None:
    parts = ThreadTeam(size).parts(num_rows)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(num_rows))
    assert all(part.start % ROWS_MULTIPLE == 0 for part in parts)
    if len(parts) > 1:
        assert min(part.stop - part.start for part in parts) > PART_ROWS - ROWS_MULTIPLE
    assert cut(3, 3) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_a_team_of_one_makes_one_part() -> None:
    team = ThreadTeam(4)
    with team.alone():
        assert team.parts(10_000) == [slice(0, 10_000)]
    assert len(team.parts(10_000)) > 4
