"""Requests with images on the real engine, from the wire to the answer and through a crash."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pictures
from tinker import types

from futures.models import Future
from tests.conftest import ApiClient, InProcessWorker
from tests.engine.vision_families import save_vision_model
from tests.pictures import address, picture
from tests.sdk.conftest import SdkClient
from training.base_models import base_model_get
from training.engine.factory import engine_over
from training.engine.interface import Engine
from training.engine.torch.base_model import BaseModel
from training.engine.torch.loading import load_base_model
from training.models import Run
from training.worker.text_pool import TextPool

PNG = picture()
ANSWER = {"role": "assistant", "content": "ho"}
NUM_TOKENS = 6  # of PNG
TEXT_LENGTH = 2


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = save_vision_model("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))
    return load_base_model(folder, dtype="float32", device="cpu")


@pytest.fixture
def new_engine(base_model: BaseModel) -> Callable[[], Engine]:
    """Each a new trainer and sampler, as after a crash."""

    def make() -> Engine:
        assert base_model.vision is not None
        base_model.vision.forget()
        return engine_over(base_model, adapter_bytes=2**30)

    return make


@pytest.fixture(scope="module")
def text_pool(base_model: BaseModel) -> Iterator[TextPool]:
    """The processes that decode; a new one imports torch, so the tests share them."""
    pool = TextPool(engine_over(base_model, adapter_bytes=2**30).renderer)
    yield pool
    pool.close()


@pytest.fixture
def work(
    start_worker: Callable[..., InProcessWorker],
    new_engine: Callable[[], Engine],
    text_pool: TextPool,
) -> InProcessWorker:
    """A worker on the model, with processes that decode."""
    return start_worker(new_engine(), text_pool)


def said(data: bytes = PNG, format: str = "png") -> list[dict[str, Any]]:
    part = {"type": "image_url", "image_url": {"url": address(data, format)}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}, ANSWER]


def chunk(data: bytes = PNG, **more: Any) -> dict[str, Any]:
    return {"type": "image", "data": b64encode(data).decode(), "format": "png", **more}


def datum(*chunks: Any, length: int) -> dict[str, Any]:
    inputs = {"target_tokens": [7] * length, "weights": [1.0] * length}
    return {"model_input": {"chunks": list(chunks)}, "loss_fn_inputs": inputs}


def outcome(api: ApiClient, request_id: str) -> dict[str, Any]:
    answer: dict[str, Any] = api.post("/retrieve_future", request_id=request_id).json()
    return answer


def submitted(api: ApiClient, call: str, **body: Any) -> str:
    answer = api.post(f"/api/v1/{call}", **body)
    assert "request_id" in answer.json(), answer.content
    return str(answer.json()["request_id"])


def train(api: ApiClient, *data: Any) -> str:
    return submitted(api, "forward_backward_async", model_id="m", data=list(data))


def test_a_conversation_with_an_image_is_trained_and_sampled(
    api: ApiClient, work: InProcessWorker
) -> None:
    losses = []
    for _ in range(3):
        trained = train(api, said())
        submitted(api, "optim_step_async", model_id="m", adam_params={"learning_rate": 0.03})
        work()
        losses.append(outcome(api, trained)["loss"])
    sampled = submitted(
        api, "asample", model_id="m", messages=said()[:1], sampling_params={"max_tokens": 3}
    )
    work()

    assert losses[2] < losses[0]
    assert len(outcome(api, sampled)["sequences"][0]["tokens"]) <= 3


def test_messages_and_chunks_of_the_same_image_have_the_same_numbers(
    api: ApiClient, work: InProcessWorker, new_engine: Callable[[], Engine]
) -> None:
    rendered = new_engine().renderer.render_conversation(
        [
            {"role": "user", "content": [{"type": "image", "image": _image()}, _text("hi")]},
            ANSWER,
        ],
        train_on="auto",
    )
    (placed,) = rendered.images
    tokens = rendered.model_input.tolist()
    inputs = {name: array.tolist() for name, array in rendered.loss_fn_inputs.items()}
    chunks = [{"tokens": tokens[: placed.start]}, chunk(), {"tokens": tokens[placed.end :]}]

    spoken = train(api, said())
    sent = train(api, {"model_input": {"chunks": chunks}, "loss_fn_inputs": inputs})
    work()

    one, other = outcome(api, spoken), outcome(api, sent)
    assert one["loss"] == other["loss"]
    assert one["loss_fn_outputs"] == other["loss_fn_outputs"]
    assert one["num_tokens"] == len(tokens)


def _image() -> Any:
    from training.images import Image

    return Image(data=PNG, format="png")


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _animation() -> bytes:
    frames = [Pictures.new("RGB", (24, 16), color) for color in ("red", "blue")]
    file = BytesIO()
    frames[0].save(file, "png", save_all=True, append_images=frames[1:])
    return file.getvalue()


def _two_sizes() -> bytes:
    data = picture(format="jpeg")
    begin = data.index(b"\xff\xc0")
    length = int.from_bytes(data[begin + 2 : begin + 4], "big") + 2
    header = bytearray(data[begin : begin + length])
    header[5:9] = bytes([0, 40, 0, 40])
    return data[:begin] + bytes(header) + data[begin:]


WRONG: dict[str, tuple[Any, str]] = {
    "truncated": (datum(chunk(PNG[:-60]), length=NUM_TOKENS), "the png file cannot be decoded"),
    "garbage after the header": (
        datum(chunk(PNG[:33] + bytes(200)), length=NUM_TOKENS),
        "the png file cannot be decoded",
    ),
    "animation": (datum(chunk(_animation()), length=NUM_TOKENS), "it is an animation"),
    "two sizes": (
        datum(chunk(_two_sizes(), format="jpeg"), length=NUM_TOKENS),
        "the jpeg file names several sizes",
    ),
    "more tokens expected": (
        datum(chunk(expected_tokens=7), length=7),
        "expected_tokens is 7, and the model's processor makes 6 tokens of this image of 24 x 16",
    ),
    "too wide for the processor": (
        datum(chunk(picture(1000, 2)), length=NUM_TOKENS),
        "the model's processor refuses an image of 1000 x 2 pixels",
    ),
}


@pytest.mark.parametrize(("wrong", "sentence"), WRONG.values(), ids=WRONG)
def test_a_bad_image_fails_by_name_and_the_next_request_works(
    api: ApiClient, work: InProcessWorker, wrong: Any, sentence: str
) -> None:
    good = datum({"tokens": [3, 4]}, chunk(), length=TEXT_LENGTH + NUM_TOKENS)
    bad = train(api, good, wrong)
    last = train(api, good)
    sampled = submitted(api, "asample", model_id="m", prompt=wrong["model_input"])
    work()

    failed = outcome(api, bad)
    assert failed["category"] == "user"
    assert failed["detail"].startswith(f"Job failed: data[1].model_input.chunks[0]: {sentence}")
    assert outcome(api, sampled)["detail"].startswith(f"Job failed: prompt.chunks[0]: {sentence}")
    assert outcome(api, last)["num_tokens"] == TEXT_LENGTH + NUM_TOKENS


def test_inputs_of_another_length_than_the_image_makes_are_refused_by_name(
    api: ApiClient, work: InProcessWorker
) -> None:
    bad = train(api, datum(chunk(), length=NUM_TOKENS + 1))
    work()
    assert outcome(api, bad)["detail"].startswith(
        "Job failed: data[0].loss_fn_inputs.target_tokens: 7 values for 6 tokens"
    )


def test_a_text_that_writes_an_images_mark_is_refused(
    api: ApiClient, work: InProcessWorker
) -> None:
    forged = [{"role": "user", "content": "look: <|image_pad|>"}, ANSWER]
    bad = train(api, forged)
    both = said()
    both[0]["content"][1]["text"] = "<|image_pad|>"
    worse = train(api, both)
    work()
    for request_id in (bad, worse):
        assert "has '<|image_pad|>' at character" in outcome(api, request_id)["detail"]


def test_a_run_that_is_rebuilt_after_a_crash_has_the_same_bits(
    api: ApiClient,
    start_worker: Callable[..., InProcessWorker],
    new_engine: Callable[[], Engine],
) -> None:
    engine = new_engine()
    work = start_worker(engine)
    train(api, said(), datum({"tokens": [3, 4]}, chunk(), length=TEXT_LENGTH + NUM_TOKENS))
    submitted(api, "optim_step_async", model_id="m")
    train(api, said(picture(40, 30, seed=3)))
    submitted(api, "optim_step_async", model_id="m")
    work()
    run = Run.objects.get(name="m")
    before = engine.trainer.adapter_state(run.id)

    rebuilt = new_engine()
    work = start_worker(rebuilt)  # nothing of the first worker is left but its rows
    last = train(api, said())
    work()

    assert outcome(api, last)["loss"] > 0
    after = rebuilt.trainer.adapter_state(run.id)
    assert after["step"] == before["step"] == 2
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        np.testing.assert_array_equal(before[name], after[name])


def test_the_official_sdks_chunks_are_trained_and_sampled(
    api: ApiClient, work: InProcessWorker
) -> None:
    sdk = SdkClient.with_new_key(api)
    session = sdk.session()
    model_id = sdk.model(session)
    image = types.ImageChunk(data=PNG, format="png", expected_tokens=NUM_TOKENS)
    model_input = types.ModelInput(chunks=[types.EncodedTextChunk(tokens=[3, 4]), image])
    targets = np.arange(3, 3 + model_input.length)
    example = types.Datum(
        model_input=model_input,
        loss_fn_inputs={
            "target_tokens": types.TensorData.from_numpy(targets),
            "weights": types.TensorData.from_numpy(np.ones(len(targets), np.float32)),
        },
    )
    assert sdk.forward_backward(model_id, 1, [example]).status_code == 200
    sampling = sdk.post(
        "create_sampling_session",
        session_id=session,
        sampling_session_seq_id=0,
        base_model=base_model_get(None).name,
    ).json()["sampling_session_id"]
    answer = sdk.post(
        "asample",
        sampling_session_id=sampling,
        seq_id=0,
        prompt=model_input.model_dump(mode="json"),
        prompt_logprobs=True,
        num_samples=1,
        sampling_params={"max_tokens": 2},
        topk_prompt_logprobs=2,
    )
    assert answer.status_code == 200, answer.content
    work()

    states = dict(Future.objects.values_list("kind", "state"))
    assert states["forward_backward"] == "ready"
    assert states["sample"] == "ready", Future.objects.get(kind="sample").error
    used = Future.objects.get(kind="sample").summary
    assert used["prompt_tokens"] == 2 + NUM_TOKENS
