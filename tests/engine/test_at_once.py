"""Micro-batches that threads compute at the same time: the same numbers as one after another."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.reference import TinyTrainer
from tests.engine.test_thread_team import assert_equal, datum_of, model_of
from training.engine.interface import ForwardBackwardJob
from training.engine.torch.at_once import InOrder, plan_lot
from training.engine.torch.base_model import ENOUGH_ROWS, BaseModel
from training.engine.torch.memory_plan import MemoryPlan
from training.engine.torch.packing.micro_batches import plan_micro_batches
from training.engine.torch.packing.plan import (
    MOST_GRAD_BYTES,
    Item,
    Limits,
    PlannedJob,
    plan_pieces,
)
from training.errors import NonFiniteResult
from training.types import ForwardBackwardOutput, LoraConfig

LENGTHS = [200, 180, 190, 170, 210, 130, 150, 160]
"""Two of them do not fit into one micro-batch with any third."""


class Threads:
    """Which threads have computed layers."""

    def __init__(self, base_model: BaseModel) -> None:
        self.names: set[str] = set()
        base_model.report_progress(lambda: self.names.add(threading.current_thread().name))


@pytest.fixture(params=["float32", "bfloat16"])
def base_model(request: pytest.FixtureRequest) -> Iterator[BaseModel]:
    model = model_of("llama", "packed", request.param)
    yield model
    model.report_progress(lambda: None)
    model.holder.team.size = 1


def trained(
    base_model: BaseModel, jobs: Sequence[ForwardBackwardJob], threads: int, **kwargs: Any
) -> list[Any]:
    """The results of two passes, and the gradients after them."""
    trainer = TinyTrainer(base_model, **kwargs)
    for name, rank in (("a", 8), ("b", 5)):
        trainer.create_adapter(name, LoraConfig(rank=rank))
        trainer.randomise(name, seed=rank)
    trainer.use_threads(threads)
    found: list[Any] = []
    for _ in range(2):
        for result in trainer.forward_backward(jobs):
            if isinstance(result, ForwardBackwardOutput):
                found += [result.loss, *result.logprobs]
            else:
                found.append(repr(result))
    return [*found, trainer.grad("a"), trainer.grad("b")]


def job_of(name: str, lengths: Sequence[int], **kwargs: Any) -> ForwardBackwardJob:
    data = [datum_of(length, seed) for seed, length in enumerate(lengths)]
    return ForwardBackwardJob(adapter_name=name, data=data, loss_fn="cross_entropy", **kwargs)


@settings(max_examples=8, deadline=None)
@given(
    jobs=st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(1, 400), min_size=1, max_size=5)),
        min_size=1,
        max_size=4,
    ),
    threads=st.integers(2, 5),
)
def test_no_bit_depends_on_what_runs_at_once(
    jobs: list[tuple[str, list[int]]], threads: int
) -> None:
    model = model_of("llama", "packed", "float32")
    given_jobs = [job_of(name, lengths) for name, lengths in jobs]
    try:
        alone = trained(model, given_jobs, 1)
        assert_equal(trained(model, given_jobs, threads), alone)
        assert_equal(trained(model, given_jobs, threads, token_budget=ENOUGH_ROWS), alone)
    finally:
        model.holder.team.size = 1


def test_threads_compute_micro_batches_of_one_job(base_model: BaseModel) -> None:
    jobs = [job_of("a", LENGTHS)]
    threads = Threads(base_model)
    alone = trained(base_model, jobs, 1)
    assert len(threads.names) == 1
    assert_equal(trained(base_model, jobs, 3), alone)
    assert len(threads.names) > 1


def test_scoring_alone_is_shared_out_too(base_model: BaseModel) -> None:
    jobs = [job_of("a", LENGTHS, forward_only=True)]
    threads = Threads(base_model)
    alone = trained(base_model, jobs, 1)
    assert_equal(trained(base_model, jobs, 3), alone)
    assert len(threads.names) > 1


@pytest.mark.parametrize(("activation_bytes", "count"), [(2**40, 3), (1, 2)])
def test_as_many_run_at_once_as_fit_into_memory(
    base_model: BaseModel, activation_bytes: int, count: int
) -> None:
    """Two together have fewer rows than a pass that is planned."""
    jobs = [job_of("a", LENGTHS)]
    alone = trained(base_model, jobs, 1)
    assert_equal(trained(base_model, jobs, 3, activation_bytes=activation_bytes), alone)
    trainer = TinyTrainer(base_model)
    trainer.create_adapter("a", LoraConfig(rank=8))
    planned = PlannedJob(job=jobs[0], config={}, part=("a", 0))
    limits = Limits(token_budget=4096, piece_rows=ENOUGH_ROWS, is_split=True)
    batches = plan_micro_batches([planned], limits)
    memory_plan = MemoryPlan(base_model, activation_bytes=activation_bytes)
    base_model.holder.team.size = 3
    found, plan = plan_lot(
        base_model, batches, {"a": trainer.adapter("a")}, memory_plan, trains=True
    )
    assert found == count
    assert (plan is None) == (count == 2)


def test_a_job_that_fails_changes_nothing_of_the_others(base_model: BaseModel) -> None:
    bad = job_of("a", LENGTHS)
    bad.data[3].loss_fn_inputs["weights"][7] = np.float32(3e38)
    bad.data[5].loss_fn_inputs["weights"][:] = np.float32(3e38)
    good = [job_of("a", LENGTHS[:4]), job_of("b", LENGTHS[2:])]
    alone = trained(base_model, [good[0], bad, good[1]], 1)
    assert_equal(trained(base_model, [good[0], bad, good[1]], 3), alone)
    assert any(NonFiniteResult.__name__ in each for each in alone if isinstance(each, str))
    assert_equal(alone[-2:], trained(base_model, good, 3)[-2:])


def test_an_exception_of_one_ends_the_pass(base_model: BaseModel) -> None:
    calls = iter(range(1000))

    def fail_later() -> None:
        if next(calls) == 40:
            raise RuntimeError("in the middle")

    base_model.report_progress(fail_later)
    with pytest.raises(RuntimeError, match="in the middle"):
        trained(base_model, [job_of("a", LENGTHS)], 3)
    assert base_model.holder.current is None


@given(st.permutations(range(6)))
def test_results_are_taken_in_their_order(order: list[int]) -> None:
    taken: list[int] = []
    results = InOrder(taken.append)
    for number in order:
        results.put(number, number)
    assert taken == list(range(6))


def item(number: int, num_tokens: int, path: tuple[int, ...] = ()) -> Item:
    return Item(number=number, num_tokens=num_tokens, loss_key=(), path=path)


def sizes(batches: Sequence[Sequence[Any]]) -> list[list[int]]:
    return [[piece.num_rows for piece in batch] for batch in batches]


def test_a_part_is_cut_where_that_repeats_few_rows() -> None:
    apart = {("a", 0): [item(n, 128) for n in range(9)]}
    limits = Limits(token_budget=4096, piece_rows=512)
    assert sizes(plan_pieces(apart, limits)) == [[512, 512, 128]]
    split = Limits(token_budget=4096, piece_rows=512, is_split=True)
    assert sizes(plan_pieces(apart, split)) == [[512], [512], [128]]
    # A prompt of 192 tokens is an eighth of 1536 rows, one of 64 of 512.
    answers = {("a", 0): [item(n, 256, tuple(range(12))) for n in range(16)]}
    assert sizes(plan_pieces(answers, split)) == [[192 + 16 * 64]]
    short = {("a", 0): [item(n, 192, tuple(range(4))) for n in range(6)]}
    assert sizes(plan_pieces(short, split)) == [[64 + 4 * 128], [64 + 2 * 128]]


def test_the_gradients_of_one_adapters_pieces_are_bounded() -> None:
    parts = {(name, n): [item(n, 8)] for n in range(8) for name in "ab"}
    large = Limits(token_budget=4096, grad_bytes={"a": MOST_GRAD_BYTES // 2})
    batches = plan_pieces(parts, large)
    names = [[piece.part[0] for piece in batch] for batch in batches]
    assert sum(map(len, names)) == 16
    assert max(batch.count("a") for batch in names) == 3
