"""Encoded values come back, equal values have one digest, and a zip bomb is refused."""

from __future__ import annotations

import hashlib
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from futures.errors import PayloadTooLarge
from futures.payload import decode, digest, encode, encode_payload

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text("abc"), inner), max_leaves=20
)
dtypes = (
    arrays.boolean_dtypes()
    | arrays.integer_dtypes(endianness="?")
    | arrays.unsigned_integer_dtypes(endianness="?")
    | arrays.floating_dtypes(endianness="?", sizes=(16, 32, 64))
)


few = settings(max_examples=30, deadline=None)


@few
@given(values)
def test_plain_values_come_back_equal(value: Any) -> None:
    assert decode(encode(value)) == value


@few
@given(arrays.arrays(dtypes, arrays.array_shapes(min_dims=0, min_side=0)))
def test_arrays_come_back_bit_by_bit_and_read_only(array: np.ndarray[Any, Any]) -> None:
    decoded = decode(encode({"array": array}))["array"]

    assert decoded.dtype == array.dtype.newbyteorder("=")
    assert decoded.shape == array.shape
    assert decoded.tobytes() == array.astype(decoded.dtype).tobytes()
    assert not decoded.flags.writeable
    assert decoded.flags.aligned
    assert decoded.flags.c_contiguous


def test_a_transposed_and_strided_array_keeps_its_elements() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]

    np.testing.assert_array_equal(decode(encode(array)), array)


@few
@given(st.dictionaries(st.text("abc"), values))
def test_the_digest_does_not_depend_on_key_order(value: dict[str, Any]) -> None:
    backwards = dict(reversed(value.items()))

    assert digest("add", {"outer": [value]}) == digest("add", {"outer": [backwards]})
    assert encode(value) == encode(backwards)


def test_the_digest_tells_kinds_and_values_apart() -> None:
    seen = {
        digest("add", {"a": 1}),
        digest("sub", {"a": 1}),
        digest("add", {"a": 2}),
        digest("add", {"a": [1]}),
        digest("add", {"a": np.array([1], np.int64)}),
        digest("add", {"a": np.array([1], np.int32)}),
        digest("add", {"a": np.array([[1]], np.int32)}),
    }
    assert len(seen) == 7


def test_encoding_and_digest_in_one_go_are_the_same_as_apart() -> None:
    value = {"b": np.arange(3), "a": ["x", {"z": 1, "y": 2}]}

    both = encode_payload("add", value)

    assert both.data == encode(value)
    assert both.digest == digest("add", value)


def as_extension(array: np.ndarray[Any, Any]) -> msgpack.ExtType:
    """An array as every version stored it: length of the header, dtype and shape, zeros up to a
    multiple of 16, the numbers."""
    header = msgpack.packb([array.dtype.str, list(array.shape)])
    return msgpack.ExtType(
        1, bytes([len(header)]) + header + bytes(-(1 + len(header)) % 16) + array.tobytes()
    )


@pytest.mark.parametrize("size", [0, 1, 14, 15, 223, 224, 239, 240, 65_503, 65_520, 100_000])
def test_what_is_stored_and_named_is_plain_msgpack_whatever_the_size(size: int) -> None:
    """The digest names a repeated request, also one that an older version took."""
    array = np.arange(size, dtype=np.uint8)
    packed = msgpack.packb(
        {"a": [1, "x"], "b": as_extension(array), "c": [None, as_extension(array)]}
    )
    value = {"c": (None, array), "b": array, "a": [1, "x"]}

    assert digest("add", value) == hashlib.sha256(b"add\0" + packed).digest()
    assert zstandard.ZstdDecompressor().decompress(encode(value)) == packed
    for stored in (decode(encode(value))["b"], decode(encode(value))["c"][1]):
        np.testing.assert_array_equal(stored, array)


def test_a_digest_may_be_of_the_form_that_an_older_version_stored() -> None:
    encoded = encode_payload("add", {"a": np.array([1, 2])}, named={"a": [1, 2]})

    assert encoded.digest == digest("add", {"a": [1, 2]})
    np.testing.assert_array_equal(decode(encoded.data)["a"], [1, 2])


def test_encoding_copies_no_large_array() -> None:
    value = {"data": [{"weights": np.zeros(2**21, np.float32)}]}  # 8 MiB that compress to nothing
    encode_payload("add", value)
    tracemalloc.start()
    try:
        encode_payload("add", value)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 2**20


def test_a_value_larger_than_allowed_is_refused_from_its_header() -> None:
    data = encode(np.zeros(1_000_000, np.float64))

    assert len(data) < 2000
    with pytest.raises(PayloadTooLarge):
        decode(data, max_bytes=1_000_000)


@pytest.mark.parametrize(
    "value",
    [
        {1: "a"},
        object(),
        {"a": {2.5}},
        np.array(["text"]),
        np.array([object()]),
        np.array([1 + 2j]),
    ],
    ids=["integer key", "object", "set", "string array", "object array", "complex array"],
)
def test_what_has_no_form_is_refused(value: Any) -> None:
    with pytest.raises(TypeError):
        encode(value)


def compressed(value: Any) -> bytes:
    return zstandard.ZstdCompressor().compress(msgpack.packb(value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not zstd at all",
        encode([1, 2, 3])[:-1],
        encode([1, 2, 3]) + b"more",
        zstandard.ZstdCompressor(write_content_size=False).compress(b"\x01"),
        compressed(msgpack.ExtType(7, b"x")),
        compressed(msgpack.ExtType(1, b"")),
        compressed(msgpack.ExtType(1, b"\x06" + msgpack.packb(["|O", [1]]) + bytes(20))),
        zstandard.ZstdCompressor().compress(b"\xc1"),
    ],
    ids=[
        "empty",
        "not zstd",
        "cut off",
        "too long",
        "size unknown",
        "unknown extension",
        "empty array",
        "object array",
        "not msgpack",
    ],
)
def test_what_is_no_payload_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a payload: "):
        decode(data)
