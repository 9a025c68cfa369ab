"""A worker in the test's own process: the real loop on the fake engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from django.contrib.auth.models import User

from futures.models import Future
from tests.conftest import InProcessWorker
from tinkerapi.api.quickref.render_results import result_body
from training import services
from training.kinds import stored_result
from training.models import Run
from training.services import Submission
from training.types import AdamParams, Conversation, Datum, Message

Train = Callable[..., Future]


@pytest.fixture
def owner(db: None) -> User:
    return User.objects.create_user("ada")


@pytest.fixture
def conversation() -> Callable[..., Conversation]:
    """``conversation("hi", "hello")``: turns of user and assistant in turn."""

    def make(*turns: str) -> Conversation:
        roles = ("user", "assistant")
        return Conversation(
            tuple(Message(roles[i % 2], content) for i, content in enumerate(turns))
        )

    return make


@pytest.fixture
def forward_backward(
    owner: User, conversation: Callable[..., Conversation]
) -> Callable[..., Future]:
    """Submit a forward_backward of one conversation: ``forward_backward("m", "hi", "hello")``."""

    def submit(model_id: str, *turns: str, owner_id: int = owner.pk, **fields: object) -> Future:
        return services.forward_backward_submit(
            **{
                "owner_id": owner_id,
                "model_id": model_id,
                "data": [conversation(*turns)],
                "loss_fn": "cross_entropy",
                "loss_fn_config": {},
                **fields,
            }
        ).future

    return submit


@pytest.fixture
def train_datum(owner: User) -> Callable[..., Future]:
    """Submit a forward_backward of one datum of this weight: ``train_datum("m", 1e30)``."""

    def submit(model_id: str, weight: float) -> Future:
        inputs = {
            "target_tokens": np.array([2, 3], np.int64),
            "weights": np.full(2, weight, np.float32),
        }
        return services.forward_backward_submit(
            owner_id=owner.pk,
            model_id=model_id,
            data=[Datum(model_input=np.array([1, 2], np.int32), loss_fn_inputs=inputs)],
            loss_fn="cross_entropy",
            loss_fn_config={},
        ).future

    return submit


@pytest.fixture
def optim_step(owner: User) -> Callable[..., Future]:
    """Submit an optimizer step: ``optim_step("m", learning_rate=0.1)``."""

    def submit(model_id: str, owner_id: int = owner.pk, **params: float) -> Future:
        return services.optim_step_submit(
            owner_id=owner_id, model_id=model_id, adam_params=AdamParams(**params)
        ).future

    return submit


@pytest.fixture
def result() -> Callable[[Future | Submission], dict[str, object]]:
    """A ready future's result in the quick reference's form; the test fails if it is not ready."""

    def read(future: Future | Submission) -> dict[str, object]:
        row = future.future if isinstance(future, Submission) else future
        row.refresh_from_db()
        assert row.state == "ready", f"{row.kind} {row.state}: {row.error}"
        return result_body(stored_result(row.kind, bytes(row.result or b"")))

    return read


@pytest.fixture
def trained(
    work: InProcessWorker,
    forward_backward: Callable[..., Future],
    optim_step: Callable[..., Future],
) -> Run:
    """Three steps, then half of one."""
    for step in range(3):
        forward_backward("m", f"question {step}", "answer")
        optim_step("m", learning_rate=0.1)
    forward_backward("m", "half", "a step")
    work()
    return Run.objects.get(name="m")
