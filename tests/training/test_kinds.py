"""One definition per kind of request: stored form, order, and one ``apply``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from futures.models import Future
from futures.payload import decode, digest, encode
from tests.conftest import InProcessWorker
from training.engine.fake.engine import fake_engine
from training.kinds import (
    LOGGED,
    REQUESTS,
    CompareRuns,
    CreateCustomLoss,
    CreateRun,
    Forward,
    ForwardBackward,
    Kind,
    LoadWeights,
    OptimStep,
    Order,
    RemoveRun,
    Request,
    Sample,
    SaveWeights,
    stored_request,
)
from training.models import Run
from training.types import (
    AdamParams,
    Conversation,
    Datum,
    LoraConfig,
    Message,
    SamplingParams,
    ScoringParams,
)
from training.worker.kinds import BARRIERS
from training.worker.kinds.barrier import LoggedBarrier

SOURCE = LoadWeights(checkpoint=7, path="tinker://m/weights/a", optimizer=False)
CONFIG = LoraConfig(rank=4, target_modules=("q_proj",))
HELLO = Conversation((Message("user", "hi"), Message("assistant", "yes")))

EXAMPLES: Sequence[Request] = [
    CreateRun(model_id="m", lora_config=CONFIG),
    CreateRun(model_id="m", lora_config=CONFIG, base_model="b", source=SOURCE),
    RemoveRun(),
    Forward(data=[HELLO], loss_fn="cross_entropy", loss_fn_config={}, train_on="all"),
    ForwardBackward(data=[HELLO], loss_fn="custom", loss_fn_config={"a": 1.0}, loss_id="s:loss:1"),
    OptimStep(adam_params=AdamParams(learning_rate=0.5)),
    Sample(prompts=["hi", HELLO], num_samples=2, sampling_params=SamplingParams(seed=1)),
    Sample(
        prompts=[np.array([1, 2], np.int32)],
        num_samples=1,
        sampling_params=SamplingParams(seed=1, stop=("x",)),
        prompt_logprobs=True,
        scoring=ScoringParams(topk_prompt_logprobs=2),
        checkpoint=3,
        token_texts=True,
        echo=True,
        stream=True,
        record_for="session",
    ),
    SaveWeights(checkpoint_kind="sampler", sampling_session_seq_id=4),
    SaveWeights(
        checkpoint_kind="external",
        name="a",
        overwrite=True,
        ttl_seconds=60,
        user_metadata={"a": "b"},
        recipients=["age1"],
    ),
    SOURCE,
    CompareRuns(other="run"),
]


@pytest.mark.parametrize("request_", EXAMPLES, ids=lambda request: request.kind)
def test_a_request_comes_back_from_what_its_future_stores(request_: Request) -> None:
    again = stored_request(request_.kind, request_.encoded().data)
    assert type(again) is type(request_)
    assert encode(again.to_payload()) == encode(request_.to_payload())
    assert (again.cost, again.summary) == (request_.cost, request_.summary)


def test_an_uploaded_loss_comes_back_from_what_its_future_stores() -> None:
    upload = CreateCustomLoss(
        name="a", inputs=[{"name": "logprobs", "rank": 1}], graph={"nodes": []}
    )
    again = CreateCustomLoss.from_payload(decode(upload.encoded().data))
    assert again == upload
    assert again.summary == {"name": "a", "nodes": 0}


def test_every_field_of_every_kind_is_stored() -> None:
    """The examples above set each field to a value other than its default, and it is restored."""
    for kind, of_kind in REQUESTS.items():
        examples = [example for example in EXAMPLES if example.kind == kind]
        assert examples, kind
        for name in getattr(of_kind, "__dataclass_fields__", {}):
            values = [repr(getattr(example, name)) for example in examples]
            back = [
                repr(getattr(stored_request(kind, example.encoded().data), name))
                for example in examples
            ]
            assert _plain(values) == _plain(back), (kind, name)


def _plain(values: list[str]) -> list[str]:
    return [value.replace("(", "[").replace(")", "]").replace(",]", "]") for value in values]


def test_a_datums_arrays_come_back_bit_by_bit() -> None:
    datum = Datum(
        model_input=np.arange(5, dtype=np.int32),
        loss_fn_inputs={"target_tokens": np.arange(5), "weights": np.ones(5, np.float32)},
    )
    request = ForwardBackward(data=[datum], loss_fn="cross_entropy", loss_fn_config={})
    (back,) = ForwardBackward.from_payload(decode(encode(request.to_payload()))).data
    assert isinstance(back, Datum)
    np.testing.assert_array_equal(back.model_input, datum.model_input)
    for name, values in datum.loss_fn_inputs.items():
        assert back.loss_fn_inputs[name].dtype == values.dtype
        np.testing.assert_array_equal(back.loss_fn_inputs[name], values)


def test_token_ids_that_an_older_version_stored_are_read_and_named_alike() -> None:
    """Earlier versions stored a prompt's token ids as a list of integers."""
    tokens = [5, 0, 2**31 - 1]
    request = Sample(
        prompts=[np.array(tokens, np.int32), "hi"],
        num_samples=1,
        sampling_params=SamplingParams(seed=1),
    )
    old = {**request.to_payload(), "prompts": [{"tokens": tokens}, {"text": "hi"}]}
    named = request.encoded()
    assert named.digest == digest(request.kind, old)
    for data in (named.data, encode(old)):
        prompt, text = Sample.from_payload(decode(data)).prompts
        assert isinstance(prompt, np.ndarray)
        assert (prompt.dtype, prompt.tolist(), text) == (np.int32, tokens, "hi")


def test_every_kind_is_run_by_somebody_and_what_is_logged_can_be_applied_again() -> None:
    assert REQUESTS.keys() | {CreateCustomLoss.kind} == set(Kind)
    barriers = {kind for kind, request in REQUESTS.items() if request.order is Order.BARRIER}
    assert BARRIERS.keys() == barriers
    for kind in LOGGED & barriers:
        assert isinstance(BARRIERS[kind], LoggedBarrier), kind
    for kind, request in REQUESTS.items():
        assert request.is_logged or not request.logged_errors, kind


def test_a_replay_asks_the_trainer_for_what_the_first_time_asked(
    start_worker: Callable[..., InProcessWorker],
    forward_backward: Callable[..., Future],
    train_datum: Callable[[str, float], Future],
    optim_step: Callable[..., Future],
) -> None:
    """Also for the failure that dropped a gradient."""

    def worker_with(asked: list[str]) -> InProcessWorker:
        def note(verb: str, names: tuple[str, ...]) -> None:
            asked.append(verb)

        return start_worker(fake_engine(before_verb=note))

    first: list[str] = []
    work = worker_with(first)
    forward_backward("m", "hi", "yes")
    optim_step("m", learning_rate=0.1)
    train_datum("m", 3e38)
    dropped = optim_step("m", learning_rate=0.1)
    forward_backward("m", "hi", "no")
    work()
    dropped.refresh_from_db()
    assert dropped.error_code == "GradientDropped"
    run = Run.objects.get(name="m")
    state = work.engine.trainer.adapter_state(run.id)

    again: list[Any] = []
    rebuilt = worker_with(again)
    rebuilt.loop.adapter_cache.bring_run(run)
    for name, values in rebuilt.engine.trainer.adapter_state(run.id).items():
        np.testing.assert_array_equal(values, state[name])
    # The failed step is not repeated: its gradient is dropped.
    assert again == [verb for n, verb in enumerate(first) if n != 4]
