"""What is read in an image's header, and images in stored requests."""

from __future__ import annotations

import hashlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pictures

from futures.payload import decode, encode
from tests.pictures import bomb, picture
from training.images import Chunks, Image, format_of, read_size
from training.kinds import ForwardBackward, Sample
from training.types import Conversation, Datum, ImageDatum, Message, SamplingParams

KINDS: dict[str, dict[str, Any]] = {
    "png": {"format": "png"},
    "palette": {"format": "png", "optimize": True},
    "jpeg": {"format": "jpeg"},
    "progressive jpeg": {"format": "jpeg", "progressive": True},
    "jpeg with notes": {"format": "jpeg", "comment": b"\xff\xc0" * 40, "exif": b"Exif\0\0" + b"x"},
    "webp": {"format": "webp"},
    "lossless webp": {"format": "webp", "lossless": True},
    "webp with a profile": {"format": "webp", "icc_profile": b"x" * 77},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (24, 16), (301, 7), (4097, 3)])
def test_format_and_size_are_those_that_pillow_reads(kind: str, size: tuple[int, int]) -> None:
    data = picture(*size, **KINDS[kind])

    format = KINDS[kind]["format"]
    assert format_of(data) == format
    assert read_size(data, format) == size == Pictures.open(BytesIO(data)).size


def test_an_animation_has_the_size_of_its_canvas() -> None:
    frames = [Pictures.new("RGB", (40, 30), color) for color in ("red", "blue")]
    file = BytesIO()
    frames[0].save(file, "webp", save_all=True, append_images=frames[1:])

    assert read_size(file.getvalue(), "webp") == (40, 30)


def test_a_file_with_two_sizes_has_the_larger() -> None:
    """No limit is evaded by a second header that a decoder might prefer."""
    data = picture(24, 16, format="jpeg")
    begin = data.index(b"\xff\xc0")
    length = int.from_bytes(data[begin + 2 : begin + 4], "big") + 2
    header = bytearray(data[begin : begin + length])
    header[5:9] = (30_000).to_bytes(2, "big") * 2

    for doubled in (
        data[:begin] + header + data[begin:],
        data[: begin + length] + header + data[begin + length :],
    ):
        assert read_size(doubled, "jpeg") == (30_000, 30_000)


def test_a_bomb_says_its_size_without_being_decoded() -> None:
    assert read_size(bomb(), "png") == (30_000, 30_000)


@given(
    st.sampled_from(sorted(KINDS)), st.integers(0, 80), st.lists(st.integers(0, 255), max_size=40)
)
def test_any_bytes_have_a_format_and_a_size_or_none(
    kind: str, length: int, more: list[int]
) -> None:
    format = KINDS[kind]["format"]
    data = picture(**KINDS[kind])[:length] + bytes(more)

    assert format_of(data) in (None, "png", "jpeg", "webp")
    size = read_size(data, format)
    assert size is None or min(size) > 0


def test_a_request_with_images_comes_back_as_it_was_stored() -> None:
    first = Image(data=picture(), format="png", expected_tokens=6)
    second = Image(data=picture(format="jpeg"), format="jpeg")
    chunks = Chunks(chunks=(np.array([1, 2], np.int32), first, np.array([3], np.int32)))
    said = Message("user", ("look: ", second, first))
    inputs = {"target_tokens": np.arange(9)}
    datum = ImageDatum(model_input=chunks, loss_fn_inputs=inputs)

    pass_ = ForwardBackward(
        data=[datum, Conversation((said, Message("assistant", "ok")))],
        loss_fn="cross_entropy",
        loss_fn_config={},
    )
    stored = decode(encode(pass_.to_payload()))
    again = ForwardBackward.from_payload(stored)
    got, conversation = again.data
    assert isinstance(got, ImageDatum)
    assert [np.asarray(c).tolist() for c in got.model_input.chunks[::2]] == [[1, 2], [3]]
    assert got.model_input.chunks[1] == first
    assert conversation == pass_.data[1]

    sample = Sample(
        prompts=[chunks, Conversation((said,))],
        num_samples=1,
        sampling_params=SamplingParams(seed=1),
    )
    back = Sample.from_payload(decode(encode(sample.to_payload())))
    assert isinstance(back.prompts[0], Chunks)
    assert back.prompts[0].images == [first]
    assert back.prompts[1] == sample.prompts[1]


def test_images_are_stored_as_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = BytesIO()
    Pictures.fromarray(noise).save(file, "png")
    image = Image(data=file.getvalue(), format="png")
    request = Sample(
        prompts=[Chunks(chunks=(image,))], num_samples=1, sampling_params=SamplingParams(seed=1)
    )

    assert len(encode(request.to_payload())) < len(image.data) + 500


def test_images_count_as_the_tokens_that_the_client_expects_or_by_their_pixels() -> None:
    expected = Image(data=picture(), format="png", expected_tokens=576)
    large = Image(data=picture(280, 280), format="png")
    text = np.array([1, 2], np.int32)

    def cost(*chunks: Any) -> int:
        datum = ImageDatum(model_input=Chunks(chunks=chunks), loss_fn_inputs={})
        return ForwardBackward(data=[datum], loss_fn="x", loss_fn_config={}).cost

    assert cost(text, expected) == 578
    assert cost(text, large) == 2 + 101
    spoken = Conversation((Message("user", ("", expected)),))
    plain = Conversation((Message("user", ""),))
    params = SamplingParams(seed=1)
    asked = [
        Sample(prompts=[each], num_samples=1, sampling_params=params).cost
        for each in (spoken, plain)
    ]
    assert asked[0] - asked[1] == 576


def test_requests_without_images_are_stored_as_before() -> None:
    """A request that is repeated after an upgrade has the digest that it had."""
    tokens = np.array([1, 2], np.int32)
    datum = Datum(model_input=tokens, loss_fn_inputs={"weights": np.ones(2, np.float32)})
    request = ForwardBackward(
        data=[datum, Conversation((Message("user", "hi"),))], loss_fn="x", loss_fn_config={}
    )

    payload = request.to_payload()
    assert payload["data"][0].keys() == {"model_input", "loss_fn_inputs"}
    assert payload["data"][1] == {"messages": [["user", "hi"]]}


def test_equal_files_have_equal_digests() -> None:
    image = Image(data=picture(), format="png")
    assert image.digest == hashlib.sha256(picture()).digest()
