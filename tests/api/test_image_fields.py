"""Images in each dialect's bodies: what is taken, and what is refused by name and not stored."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import numpy as np
import pytest
from tinker import types

from futures.models import Future
from tests.conftest import ApiClient, InProcessWorker
from tests.openai.test_completions import MODEL
from tests.pictures import address, bomb, picture
from tests.sdk.official_sdk import sdk_body
from tinkerapi.api.fields.content import check_parts
from tinkerapi.api.quickref.parse import check_prompt
from tinkerapi.api.quickref.training_data import TrainingData
from tinkerapi.api.sdk.parse.json_bodies import parse_model_input
from tinkerapi.api.sdk.parse.protobuf import parse_forward_backward
from tinkerapi.api.sdk.parse.scoring import check_scoring
from training.errors import InvalidDatum, InvalidRequest, LimitExceeded, TrainingError
from training.images import Chunks, Image
from training.types import Conversation, ImageDatum

PNG = picture()
ANSWER = {"role": "assistant", "content": "ho"}
TEXT = types.EncodedTextChunk(tokens=[1, 2])
BAD_IMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "label of another format": ({"format": "jpeg"}, ".data: labelled jpeg, but it is a png file"),
    "unknown format": ({"format": "gif"}, ".format: expected one of png, jpeg, webp; got 'gif'"),
    "no format": ({"format": None}, ".format: expected one of png, jpeg, webp; got null"),
    "no image": ({"data": b"GIF89a"}, ".data: labelled png, but its first bytes are not"),
    "nothing": ({"data": b""}, ".data: labelled png, but its first bytes are not those of a png"),
    "cut in its header": ({"data": PNG[:20]}, ".data: the png file is truncated or has no size"),
    "bomb": ({"data": bomb()}, ".data: 30000 x 30000 pixels; this server takes 16777216 in one"),
    "no tokens": ({"expected_tokens": 0}, ".expected_tokens: expected a whole number"),
    "negative": ({"expected_tokens": -1}, ".expected_tokens: expected a whole number"),
    "half a token": ({"expected_tokens": 1.5}, ".expected_tokens: expected a whole number"),
}
bad_images = pytest.mark.parametrize(("changes", "sentence"), BAD_IMAGES.values(), ids=BAD_IMAGES)


def image_chunk(**changes: Any) -> dict[str, Any]:
    chunk = {"type": "image", "data": PNG, "format": "png", **changes}
    return {**chunk, "data": b64encode(chunk["data"]).decode()}


def sdk_datum(*chunks: Any, length: int) -> types.Datum:
    inputs = {"target_tokens": np.arange(length), "weights": np.ones(length, np.float32)}
    return types.Datum(
        model_input=types.ModelInput(chunks=list(chunks)),
        loss_fn_inputs={n: types.TensorData.from_numpy(v) for n, v in inputs.items()},
    )


# -- the SDK ---------------------------------------------------------------------------------------


def test_the_sdks_image_chunk_is_the_same_image_in_protobuf_and_json() -> None:
    image = types.ImageChunk(data=PNG, format="png", expected_tokens=6)
    given = sdk_datum(TEXT, image, types.EncodedTextChunk(tokens=[3]), length=9)

    (datum,) = parse_forward_backward(sdk_body([given])).data
    prompt = given.model_input.model_dump(mode="json")
    from_json = parse_model_input(prompt, "prompt")

    assert isinstance(datum, ImageDatum)
    for got in (datum.model_input, from_json):
        assert isinstance(got, Chunks)
        first, second, third = got.chunks
        assert [np.asarray(first).tolist(), np.asarray(third).tolist()] == [[1, 2], [3]]
        assert second == Image(data=PNG, format="png", expected_tokens=6)
        assert got.num_tokens == 9


def test_an_image_chunk_is_recognized_without_its_type_as_old_clients_send_it() -> None:
    chunk = image_chunk()
    del chunk["type"]
    got = parse_model_input({"chunks": [{"tokens": [1]}, chunk]}, "prompt")
    assert isinstance(got, Chunks)
    assert got.num_tokens is None


@bad_images
def test_a_bad_image_of_the_sdk_is_refused_by_name(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TrainingError) as caught:
        parse_model_input({"chunks": [{"tokens": [1]}, image_chunk(**changes)]}, "prompt")
    assert str(caught.value).startswith(f"prompt.chunks[1]{sentence}")


@pytest.mark.parametrize("name", ["label of another format", "bomb", "cut in its header"])
def test_a_bad_image_in_protobuf_is_refused_by_name(name: str) -> None:
    changes, sentence = BAD_IMAGES[name]
    image = types.ImageChunk(**{"data": PNG, "format": "png", "expected_tokens": 6, **changes})
    with pytest.raises(TrainingError) as caught:
        parse_forward_backward(sdk_body([sdk_datum(TEXT, image, length=8)]))
    assert str(caught.value).startswith(f"data[0].model_input.chunks[1]{sentence}")


@pytest.mark.parametrize("expected", [None, 6])
def test_lengths_are_compared_as_far_as_the_client_says_them(expected: int | None) -> None:
    image = types.ImageChunk(data=PNG, format="png", expected_tokens=expected)
    body = sdk_body([sdk_datum(TEXT, image, length=20)])
    if expected is None:  # only the model's processor knows
        assert len(parse_forward_backward(body).data) == 1
        return
    with pytest.raises(InvalidDatum, match=r"^data\[0\].loss_fn_inputs.\w+: 20 values for 8 tok"):
        parse_forward_backward(body)


def test_a_pointer_to_an_image_is_refused_by_name() -> None:
    pointer = {"type": "image_asset_pointer", "location": "https://x/y.png", "format": "png"}
    for parse in (parse_model_input, check_prompt):
        with pytest.raises(InvalidDatum, match=r"^prompt.chunks\[0\]: image_asset_pointer is not"):
            parse({"chunks": [pointer]}, "prompt")


def test_more_tokens_than_a_sequence_may_have_are_refused(settings: Any) -> None:
    settings.MAX_DATUM_TOKENS = 100
    with pytest.raises(LimitExceeded, match=r"^prompt: 101 tokens; this server takes 100"):
        parse_model_input({"chunks": [{"tokens": [1]}, image_chunk(expected_tokens=100)]}, "prompt")


def test_what_is_asked_by_position_needs_the_number_of_an_images_tokens() -> None:
    body = {
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 1,
        "target_prompt_logprobs": None,
        "prompt_alt_tokens_k": 0,
        "prompt_logprobs_last_n": None,
    }
    options = {"prompt_logprobs": True, "num_sampled_tokens": 1}
    with pytest.raises(InvalidRequest, match=r"^topk_prompt_logprobs: .* say its expected_tokens"):
        check_scoring(body, num_prompt_tokens=None, **options)
    body["topk_prompt_logprobs"] = 0
    assert check_scoring(body, num_prompt_tokens=None, **options).topk_sample_logprobs == 1


# -- messages --------------------------------------------------------------------------------------


def part(url: Any, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def test_parts_are_texts_and_images_in_order_and_adjacent_texts_are_one() -> None:
    parts = [
        {"type": "text", "text": "<|im_"},
        {"type": "text", "text": "end|>"},
        part(address(PNG), detail="auto"),
        part(address(picture(format="jpeg"), "jpg")),
    ]
    first, second, third = check_parts(parts, "content", role="user")
    assert first == "<|im_end|>"  # which the renderer refuses, where it sees it whole
    assert second == Image(data=PNG, format="png")
    assert isinstance(third, Image)
    assert third.format == "jpeg"
    assert check_parts(parts[:2], "content", role="assistant") == "<|im_end|>"


BAD_PARTS: dict[str, tuple[Any, str]] = {
    "address to fetch": (part("https://x.example/cat.png"), ".image_url.url: expected data:image/"),
    "file": (part("file:///etc/passwd"), ".image_url.url: expected data:image/png;base64,"),
    "path": (part("/etc/passwd"), ".image_url.url: expected data:image/png;base64,"),
    "not base64": (part("data:image/png;base64,%%%"), ".image_url.url: not base64"),
    "text": (part("data:text/html;base64,AAAA"), ".image_url.url: expected data:image/"),
    "svg": (part("data:image/svg;base64,AAAA"), ".image_url.url: image/svg is not one of png"),
    "no base64 mark": (part("data:image/png,AAAA"), ".image_url.url: expected data:image/png;ba"),
    "label of another": (part(address(PNG, "webp")), ".image_url.url: labelled webp, but it is a"),
    "bomb": (part(address(bomb())), ".image_url.url: 30000 x 30000 pixels; this server takes"),
    "low detail": (part(address(PNG), detail="low"), ".image_url.detail: expected auto or high"),
    "unknown field": (part(address(PNG), size=3), ".image_url.size: unknown field"),
    "no url": ({"type": "image_url", "image_url": {}}, ".image_url.url: expected a data: address"),
    "address as text": ({"type": "image_url", "image_url": "x"}, ".image_url: expected an object"),
    "audio": ({"type": "input_audio"}, ": expected a part like"),
    "null": (None, ": expected a part like"),
}


@pytest.mark.parametrize(("item", "sentence"), BAD_PARTS.values(), ids=BAD_PARTS)
def test_a_bad_part_is_refused_by_name(item: Any, sentence: str) -> None:
    with pytest.raises(TrainingError) as caught:
        check_parts([{"type": "text", "text": "hi"}, item], "content", role="user")
    assert str(caught.value).startswith(f"content[1]{sentence}")


def test_only_what_the_model_reads_may_have_images() -> None:
    for role in ("system", "assistant"):
        with pytest.raises(InvalidDatum, match=rf"^c\[0\]: an image .* of the role {role}"):
            check_parts([part(address(PNG))], "c", role=role)


def test_the_quick_reference_takes_images_in_messages_and_in_chunks() -> None:
    said = [
        {"role": "user", "content": [part(address(PNG))]},
        {"role": "assistant", "content": "a"},
    ]
    tokens = {
        "model_input": {"chunks": [{"tokens": [1]}, image_chunk(expected_tokens=2)]},
        "loss_fn_inputs": {"target_tokens": [1, 2, 3], "weights": [1, 1, 1]},
    }
    conversation, datum = TrainingData(description="").check([said, tokens], "data")
    assert isinstance(conversation, Conversation)
    assert [image.data for image in conversation.images] == [PNG]
    assert isinstance(datum, ImageDatum)
    tokens["loss_fn_inputs"] = {"target_tokens": [1]}
    with pytest.raises(InvalidDatum, match=r"^data\[0\].loss_fn_inputs.target_tokens: 1 values"):
        TrainingData(description="").check([tokens], "data")


@bad_images
def test_a_bad_image_of_the_quick_reference_is_refused(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(TrainingError) as caught:
        check_prompt({"chunks": [{"tokens": [1]}, image_chunk(**changes)]}, "prompt")
    assert str(caught.value).startswith(f"prompt.chunks[1]{sentence}")


def test_limits_of_an_image_come_from_the_settings(settings: Any) -> None:
    settings.MAX_IMAGE_PIXELS = 24 * 16 - 1
    with pytest.raises(LimitExceeded, match=r"24 x 16 pixels; this server takes 383 in one image"):
        check_prompt({"chunks": [image_chunk()]}, "prompt")
    settings.MAX_IMAGE_BYTES = 20
    with pytest.raises(LimitExceeded, match=r"chunks\[0\].data: \d+ bytes; this server takes 20"):
        check_prompt({"chunks": [image_chunk()]}, "prompt")


# -- requests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("MAX_IMAGES", 1, "2 images; this server takes 1 in one request"),
        ("MAX_REQUEST_PIXELS", 767, "2 images of 768 pixels in all; this server takes 767 pixels"),
    ],
)
def test_limits_of_all_images_of_a_request_come_from_the_settings(
    api: ApiClient, settings: Any, name: str, value: int, sentence: str
) -> None:
    setattr(settings, name, value)
    said = [{"role": "user", "content": [part(address(PNG)), part(address(PNG))]}]

    training = api.post("/api/v1/forward_backward_async", model_id="m", data=[said])
    sampling = api.post("/api/v1/asample", base_model=MODEL, messages=said)

    assert training.json()["detail"].startswith(f"data: {sentence}")
    assert sampling.json()["detail"].startswith(f"prompt: {sentence}")
    assert {training.status_code, sampling.status_code} == {400}
    assert not Future.objects.exists()


def test_images_to_a_text_model_fail_by_name_and_the_next_request_works(
    api: ApiClient, work: InProcessWorker
) -> None:
    said = [
        {"role": "user", "content": [part(address(PNG))]},
        {"role": "assistant", "content": "a"},
    ]
    tokens = {
        "model_input": {"chunks": [{"tokens": [1]}, image_chunk()]},
        "loss_fn_inputs": {"target_tokens": [1, 2], "weights": [1, 1]},
    }
    good = [{"role": "user", "content": "hi"}, ANSWER]
    wrong = [
        ("forward_backward_async", {"data": [good, said]}, "data[1].messages[0].content"),
        ("forward_backward_async", {"data": [tokens]}, "data[0].model_input.chunks[1]"),
        ("asample", {"messages": said[:1]}, "prompt.messages[0].content"),
        ("asample", {"prompts": ["hi", {"chunks": [image_chunk()]}]}, "prompt[1].chunks[0]"),
    ]
    waiting = []
    for call, body, place in wrong:
        answer = api.post(f"/api/v1/{call}", **{"model_id": "m", **body})
        waiting.append((answer.json()["request_id"], place))
    last = api.post("/api/v1/forward_backward_async", model_id="m", data=[good])
    work()

    for request_id, place in waiting:
        failed = api.post("/retrieve_future", request_id=request_id).json()
        assert failed["category"] == "user"
        assert failed["detail"].startswith(f"Job failed: {place}: this base model reads text only")
    assert api.post("/retrieve_future", request_id=last.json()["request_id"]).json()["num_samples"]
