"""Compressed bodies: opened whole, or refused before they take memory."""

from __future__ import annotations

import contextlib
import tracemalloc

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from futures.errors import PayloadTooLarge
from tinkerapi.api.bodies.compression import decompress_body
from training.errors import InvalidRequest

TEXT = b"the same again " * 100


def unsized(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


@pytest.mark.parametrize("encoding", [None, "", "identity", " Identity "])
def test_a_plain_body_is_left_alone(encoding: str | None) -> None:
    assert decompress_body(TEXT, encoding, max_bytes=len(TEXT)) == TEXT
    with pytest.raises(PayloadTooLarge, match=f"larger than {len(TEXT) - 1} bytes"):
        decompress_body(TEXT, encoding, max_bytes=len(TEXT) - 1)


@given(data=st.binary(max_size=3000))
def test_what_the_sdk_compresses_is_read(data: bytes) -> None:
    body = zstandard.ZstdCompressor().compress(data)  # the SDK's own call

    assert decompress_body(body, "zstd", max_bytes=3000) == data
    assert decompress_body(unsized(data), "zstd", max_bytes=3000) == data


@pytest.mark.parametrize("compress", [zstandard.compress, unsized])
def test_the_limit_is_met_to_the_byte(compress: object) -> None:
    body = compress(TEXT)  # type: ignore[operator]

    assert decompress_body(body, "zstd", max_bytes=len(TEXT)) == TEXT
    with pytest.raises(PayloadTooLarge, match=f"larger than {len(TEXT) - 1} bytes"):
        decompress_body(body, "ZSTD", max_bytes=len(TEXT) - 1)


@pytest.mark.parametrize("compress", [zstandard.compress, unsized])
def test_a_bomb_is_refused_without_taking_its_memory(compress: object) -> None:
    body = compress(bytes(200 * 2**20))  # type: ignore[operator]
    assert len(body) < 20_000

    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge):
            decompress_body(body, "zstd", max_bytes=2**20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 2**20


def test_a_window_beyond_the_limit_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(
        window_log=27, write_content_size=False, enable_ldm=True
    )
    body = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = body.compress(TEXT) + body.flush()
    assert zstandard.get_frame_parameters(frame).window_size == 2**27

    with pytest.raises(InvalidRequest, match="not zstd"):
        decompress_body(frame, "zstd", max_bytes=2**20)


@pytest.mark.parametrize("compress", [zstandard.compress, unsized])
def test_half_a_frame_and_a_frame_with_a_tail_are_refused(compress: object) -> None:
    body = compress(TEXT)  # type: ignore[operator]

    for wrong in (body[:-1], body[: len(body) // 2], body[:3], b"", body + b"x", body + body):
        with pytest.raises(InvalidRequest, match="Content-Encoding"):
            decompress_body(wrong, "zstd", max_bytes=10**6)


def test_another_encoding_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="'gzip' is not supported"):
        decompress_body(b"", "gzip", max_bytes=10)


@given(noise=st.binary(max_size=200), cut=st.integers(0, 200), at=st.integers(0, 60))
@example(noise=b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd", cut=0, at=0)  # a skippable frame
def test_noise_raises_our_errors_only(noise: bytes, cut: int, at: int) -> None:
    whole = unsized(TEXT)
    for body in (noise, whole[:cut] + noise, whole[:at] + noise + whole[at + len(noise) :]):
        with contextlib.suppress(InvalidRequest, PayloadTooLarge):
            decompress_body(body, "zstd", max_bytes=2000)
