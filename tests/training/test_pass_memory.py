"""The memory of a large pass in the summary of its request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from django.contrib.auth.models import User

from tests.conftest import InProcessWorker
from tests.engine.test_memory_plan import make_data
from tests.tiny_model import make_tiny_model
from training import services
from training.engine.factory import engine_over
from training.engine.torch.loading import load_base_model
from training.engine.torch.memory_plan import PLANNED_ROWS


def test_a_large_pass_tells_its_memory(
    start_worker: Callable[..., InProcessWorker], owner: User, tmp_path: Path
) -> None:
    base_model = load_base_model(str(make_tiny_model(tmp_path)), dtype="float32", device="cpu")
    work = start_worker(engine_over(base_model, adapter_bytes=2**30, activation_bytes=1))

    def train(num_tokens: int) -> dict[str, object]:
        future = services.forward_backward_submit(
            owner_id=owner.pk,
            model_id="m",
            data=make_data(num_tokens),
            loss_fn="cross_entropy",
            loss_fn_config={},
        ).future
        work()
        future.refresh_from_db()
        return future.summary

    large = train(PLANNED_ROWS)
    assert large["recomputed"] is True
    assert isinstance(large["planned_bytes"], int)
    assert isinstance(large["peak_bytes"], int)  # measured on Linux
    assert not {"planned_bytes", "peak_bytes", "recomputed"} & train(100).keys()
