"""Every forward_backward body, of any bytes, is either read or refused."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sdk.official_sdk import refusal, sdk_datum, sdk_message
from tinkerapi.api.sdk import tinker_public_pb2 as pb
from tinkerapi.api.sdk.parse.field_count import check_field_count
from tinkerapi.api.sdk.parse.protobuf import parse_forward_backward, parse_ids
from training.errors import InvalidRequest, LimitExceeded, TrainingError

VALID: bytes = sdk_message(
    [
        sdk_datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[0.5, 1.0, 0.0]),
        sdk_datum([9], target_tokens=np.array([[1, 2]]), weights=np.array([[0.25, 0.75]])),
    ],
    config={"beta": 0.1, "kl": "x"},
    loss_fn="custom",
).SerializeToString()


def read_or_refuse(body: bytes) -> None:
    for parse in (parse_ids, parse_forward_backward):
        with contextlib.suppress(TrainingError):
            parse(body)


def test_every_truncation_is_read_or_refused() -> None:
    for end in range(len(VALID)):
        read_or_refuse(VALID[:end])


def test_every_changed_byte_is_read_or_refused() -> None:
    for at in range(len(VALID)):
        for byte in (0, 1, 0x7F, 0x80, 0xFF, VALID[at] ^ 1, VALID[at] ^ 0x10):
            read_or_refuse(VALID[:at] + bytes([byte]) + VALID[at + 1 :])


@settings(max_examples=300, derandomize=True)
@given(noise=st.binary(max_size=60), at=st.integers(0, len(VALID)), skip=st.integers(0, 20))
def test_noise_is_read_or_refused(noise: bytes, at: int, skip: int) -> None:
    read_or_refuse(noise)
    read_or_refuse(VALID[:at] + noise + VALID[at + skip :])


INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 5)
ARRAYS = st.binary(max_size=40) | st.lists(INTEGERS, max_size=5).map(
    lambda values: np.array(values, "<i8").tobytes()
)


@settings(max_examples=300, derandomize=True)
@given(
    name=st.sampled_from(["target_tokens", "weights", "other"]),
    dtype=st.integers(0, 5),
    shape=st.lists(INTEGERS, max_size=3),
    values=ARRAYS,
    indices=st.none() | st.tuples(ARRAYS, ARRAYS),
)
def test_any_tensor_is_read_or_refused(
    name: str,
    dtype: int,
    shape: list[int],
    values: bytes,
    indices: tuple[bytes, bytes] | None,
) -> None:
    message = pb.ForwardBackwardRequest.FromString(VALID)
    message.loss_fn_config_v2.clear()
    tensor = message.data[1].loss_fn_inputs[name]
    tensor.dtype = dtype
    tensor.shape[:] = shape
    if indices is None:
        tensor.dense = values
    else:
        tensor.sparse_csr.values = values
        tensor.sparse_csr.crow_indices, tensor.sparse_csr.col_indices = indices

    said = refusal(parse_forward_backward, message.SerializeToString())

    assert said is None or said.startswith(f"data[1].loss_fn_inputs.{name}")


def nested(*numbers: int, inside: bytes) -> bytes:
    """``inside`` wrapped in length-delimited fields, the outermost number first."""
    for number in reversed(numbers):
        size, digits = len(inside), bytearray()
        while size > 127:
            digits.append(size & 127 | 128)
            size >>= 7
        inside = bytes([number << 3 | 2, *digits, size]) + inside
    return inside


@pytest.mark.parametrize(
    "body",
    [
        b"\x1a\x00" * 100,  # datums
        nested(3, inside=b"\x0a\x00" * 100),  # chunks
        nested(3, 2, 2, inside=b"\x12\x00\x0a\x00" * 50),  # one oneof, set again and again
        nested(3, 2, 2, 4, inside=b"\x01" * 100),  # a packed shape
        nested(3, 2, 2, inside=b"\x20\x01" * 100),  # an unpacked one
        nested(3, 4, inside=b"\x0a\x00\x12\x00" * 50),  # spans
        nested(7, 2, inside=b"\x12\x00" * 100),  # a config value, set again and again
        b"\x78\x01" * 100,  # fields of a newer client
        b"\x7d1234" * 100,
        b"\x7912345678" * 100,
    ],
)
def test_a_body_of_too_many_fields_is_refused_before_it_is_parsed(body: bytes) -> None:
    pb.ForwardBackwardRequest.FromString(body)  # protobuf would take it

    check_field_count(body, max_fields=110)
    with pytest.raises(LimitExceeded, match=r"^body: more than 99 protobuf fields"):
        check_field_count(body, max_fields=99)


def test_the_count_is_that_of_the_fields() -> None:
    one = pb.ForwardBackwardRequest(model_id="m", seq_id=300, loss_fn="x" * 200)
    one.data.add().loss_fn_inputs["w"].dtype = 1

    # model_id, seq_id, loss_fn, a datum, its map entry, the key, the tensor, its dtype
    check_field_count(one.SerializeToString(), max_fields=8)
    with pytest.raises(LimitExceeded):
        check_field_count(one.SerializeToString(), max_fields=7)


def test_a_group_hides_nothing_from_the_count() -> None:
    with pytest.raises(InvalidRequest):
        check_field_count(b"\x7b" + b"\x1a\x00" * 100 + b"\x7c", max_fields=10)
