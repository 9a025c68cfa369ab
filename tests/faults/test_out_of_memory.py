"""Memory runs out: requests that fit give the same bits as always, others fail by name."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from django.contrib.auth.models import User

from futures.models import Future
from futures.payload import decode
from tests.conftest import InProcessWorker
from tests.faults.conftest import State, assert_all_ready, assert_same, state_of
from tests.tiny_model import make_tiny_model
from training import services
from training.engine.factory import engine_over
from training.engine.fake.engine import fake_engine
from training.engine.interface import ForwardBackwardJob
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.engine.torch.trainer import TorchTrainer
from training.errors import OutOfMemory
from training.types import AdamParams, Datum, LoraConfig

Start = Callable[..., InProcessWorker]
Submit = Callable[..., Future]

CPU = "[enforce fail at alloc_cpu.cpp:119] data. DefaultCPUAllocator: can't allocate memory"
ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(CPU)]
ROOM = 48
"""Tokens that the small device takes in one pass."""


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")
    return load_base_model(str(folder), device="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_device(
    base_model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Exception], None]:
    """``small_device(error)``: a pass of more than ROOM tokens raises this from now on."""
    forward = base_model._decoder.forward

    def limit(error: Exception) -> None:
        def small(*args: Any, **kwargs: Any) -> Any:
            if kwargs["input_ids"].numel() > ROOM:
                raise error
            return forward(*args, **kwargs)

        monkeypatch.setattr(base_model._decoder, "forward", small)

    return limit


@pytest.fixture
def submit(owner: User) -> Submit:
    """``submit("m", 20)``: a forward_backward of one datum of 20 tokens."""

    def forward_backward(name: str, num_tokens: int) -> Future:
        tokens = np.arange(num_tokens + 1) * 7 % 250 + 3
        datum = Datum(
            model_input=tokens[:-1].astype(np.int32),
            loss_fn_inputs={
                "target_tokens": tokens[1:].astype(np.int64),
                "weights": np.ones(num_tokens, np.float32),
            },
        )
        return services.forward_backward_submit(
            owner_id=owner.pk,
            model_id=name,
            data=[datum],
            loss_fn="cross_entropy",
            loss_fn_config={},
        ).future

    return forward_backward


def losses(futures: list[Future]) -> list[float]:
    rows = [Future.objects.get(pk=future.pk) for future in futures]
    return [decode(bytes(row.result or b""))["loss"] for row in rows]


@pytest.mark.parametrize("error", ERRORS, ids=["device", "python", "cpu"])
def test_a_batch_that_does_not_fit_is_split_and_only_what_never_fits_fails(
    start_worker: Start,
    base_model: BaseModel,
    small_device: Callable[[Exception], None],
    submit: Submit,
    owner: User,
    error: Exception,
) -> None:
    def train(name: str, *, also: list[Future]) -> list[Future]:
        futures = [submit(name, 20), submit(name, 30)]
        if name.startswith("small"):
            also.append(submit(name, ROOM + 1))
        futures.append(submit(name, 10))
        step = services.optim_step_submit(
            owner_id=owner.pk, model_id=name, adam_params=AdamParams(learning_rate=0.1)
        )
        return [*futures, step.future, submit(name, 40)]

    def run(prefix: str) -> tuple[list[float], list[Future], list[State]]:
        work = start_worker(engine_over(base_model, batch_tokens=4096))
        too_large: list[Future] = []
        names = [f"{prefix}-{name}" for name in "ab"]
        futures = [future for name in names for future in train(name, also=too_large)]
        work()
        assert_all_ready(futures)
        passes = [future for future in futures if future.kind == "forward_backward"]
        return losses(passes), too_large, [state_of(work, name) for name in names]

    expected_losses, _, expected_states = run("large")
    small_device(error)
    found_losses, too_large, states = run("small")

    assert found_losses == expected_losses
    for found, expected in zip(states, expected_states, strict=True):
        assert_same(found, expected)
    for future in too_large:
        future.refresh_from_db()
        assert (future.state, future.error_code) == ("failed", "OutOfMemory")
        assert future.attempts == 0
    assert len(too_large) == 2


def test_what_filled_the_memory_is_freed_before_the_rest_is_tried(
    base_model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = TorchTrainer(base_model)
    trainer.create_adapter("a", LoraConfig(rank=2))
    filled: list[weakref.ref[torch.Tensor]] = []
    forward = base_model._decoder.forward

    def fill(*args: Any, **kwargs: Any) -> Any:
        assert all(ref() is None for ref in filled)
        activations = torch.ones(10)
        filled.append(weakref.ref(activations))
        if kwargs["input_ids"].numel() > ROOM:
            raise RuntimeError(CPU)
        return forward(*args, **kwargs)

    monkeypatch.setattr(base_model._decoder, "forward", fill)
    datum = Datum(
        model_input=np.arange(30, dtype=np.int32),
        loss_fn_inputs={"target_tokens": np.arange(30), "weights": np.ones(30, np.float32)},
    )
    job = ForwardBackwardJob(adapter_name="a", data=[datum], loss_fn="cross_entropy")
    results = trainer.forward_backward([job, job])
    assert not any(isinstance(result, Exception) for result in results)
    assert len(filled) == 3


@pytest.mark.parametrize("error", ERRORS, ids=["device", "python", "cpu"])
def test_a_step_a_creation_and_a_load_without_room_change_nothing(
    base_model: BaseModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    trainer = TorchTrainer(base_model)
    trainer.create_adapter("a", LoraConfig(rank=2))
    trainer.save_adapter("a", tmp_path / "saved")
    trainer.optim_step("a", AdamParams(learning_rate=0.1, weight_decay=0.5))
    before = trainer.adapter_state("a")

    def no_room(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(torch, "zeros_like", no_room)
    with pytest.raises(OutOfMemory):
        trainer.optim_step("a", AdamParams(learning_rate=0.1, weight_decay=0.5))
    with pytest.raises(OutOfMemory):
        trainer.create_adapter("b", LoraConfig(rank=2))
    with pytest.raises(OutOfMemory):
        trainer.load_adapter("a", tmp_path / "saved")
    monkeypatch.undo()
    assert trainer.adapter_names() == ["a"]
    assert_same(trainer.adapter_state("a"), before)


@pytest.mark.parametrize("verb", ["create_adapter", "load_adapter", "optim_step"])
def test_a_run_that_cannot_be_rebuilt_for_want_of_memory_is_not_lost(
    start_worker: Start, train: Callable[..., list[Future]], files: object, verb: str
) -> None:
    work = start_worker()
    train("m", 2)
    work()
    before = state_of(work, "m")
    if verb == "load_adapter":
        work.loop.give_back()
    room = False

    def full(name: str, adapter_names: tuple[str, ...]) -> None:
        if name == verb and not room:
            raise OutOfMemory

    work = start_worker(fake_engine(before_verb=full))
    futures = train("m", 1, first=2)
    work()
    for future in futures:
        future.refresh_from_db()
        assert (future.state, future.error_code) == ("failed", "OutOfMemory")
    room = True
    assert_same(state_of(work, "m"), before)


def test_another_runtime_error_is_not_taken_for_one(
    base_model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = TorchTrainer(base_model)
    trainer.create_adapter("a", LoraConfig(rank=2))

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(torch, "zeros_like", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        trainer.optim_step("a", AdamParams())
