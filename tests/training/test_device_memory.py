"""A worker reports the memory of its GPU, and pages show it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from futures.models import Future, Worker
from futures.workers import worker_heartbeat
from tests.conftest import InProcessWorker
from tinkerapi.console.pages.workers import worker_memory
from training.engine.fake.engine import fake_engine
from training.engine.fake.trainer import FakeTrainer
from training.engine.torch.memory import device_memory

Submit = Callable[..., Future]


@pytest.mark.parametrize(
    ("memory", "shown"), [(None, None), ((3 * 2**30, 8 * 2**30), "GPU 3.0\xa0GB of 8.0\xa0GB")]
)
def test_a_workers_figures_have_the_memory_of_a_gpu(
    start_worker: Callable[..., InProcessWorker],
    optim_step: Submit,
    forward_backward: Submit,
    memory: tuple[int, int] | None,
    shown: str | None,
) -> None:
    engine = fake_engine()
    assert isinstance(engine.trainer, FakeTrainer)
    engine.trainer.own_memory = memory
    work = start_worker(engine)
    forward_backward("m", "a", "b")
    optim_step("m")
    work()
    worker_heartbeat(work.worker, work.loop._figures)

    assert worker_memory(Worker.objects.get(pk=work.worker.pk)) == shown


def test_a_cpu_has_no_memory_of_its_own() -> None:
    assert device_memory(torch.device("cpu")) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_memory_contains_a_tensor() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = device_memory(device)
    kept = torch.empty(2**28, dtype=torch.uint8, device=device)
    after = device_memory(device)

    assert before is not None
    assert after is not None
    assert after[0] - before[0] >= kept.numel()
    assert kept.numel() < after[0] <= after[1]
