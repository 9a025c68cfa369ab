"""Images in requests: the values, and the facts in a file's first bytes.

The web process reads these facts and nothing more: it needs no decoder, so no image can harm it. A
worker decodes the image (``engine.renderer.images``) and checks that the decoder found the size
that is read here, since the limits were checked against it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NO_IMAGES = "this base model reads text only; send the request without images"

FORMATS = ("png", "jpeg", "webp")

PIXELS_PER_TOKEN = 28 * 28
"""A common size of the patch that is one token; for estimates only."""


class Size(NamedTuple):
    """An image's size in pixels."""

    width: int
    height: int

    @property
    def num_pixels(self) -> int:
        return self.width * self.height


@dataclass(frozen=True, kw_only=True)
class Image:
    """One image as a client sent it: a whole file, decoded by nobody yet."""

    data: bytes
    format: str
    """One of ``FORMATS``."""
    expected_tokens: int | None = None
    """The number of tokens that the client expects it to be. A worker refuses the request if
    the model's processor makes another number of it."""

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of its bytes: equal for images with the same features."""
        return hashlib.sha256(self.data).digest()

    @property
    def cost(self) -> int:
        """Its tokens, estimated if the client does not say."""
        if self.expected_tokens is not None:
            return self.expected_tokens
        size = read_size(self.data, self.format)
        return 1 if size is None else size.num_pixels // PIXELS_PER_TOKEN + 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunks:
    """Token ids and at least one image, in order, as clients send them.

    How many tokens an image is, only the model's processor knows, so a worker makes one sequence
    of tokens of them.
    """

    chunks: tuple[NDArray[np.int32] | Image, ...]
    """Each (n,) token ids, or an image: the client's own chunks, which errors name by number."""

    @property
    def images(self) -> list[Image]:
        return [chunk for chunk in self.chunks if isinstance(chunk, Image)]

    @property
    def num_text_tokens(self) -> int:
        return sum(len(chunk) for chunk in self.chunks if not isinstance(chunk, Image))

    @property
    def num_tokens(self) -> int | None:
        """All tokens, if the client says of every image how many it expects; else None."""
        total = self.num_text_tokens
        for image in self.images:
            if image.expected_tokens is None:
                return None
            total += image.expected_tokens
        return total


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedImage:
    """An image at its place in a sequence of tokens."""

    image: Image
    start: int
    """The index of its first token."""
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


def format_of(data: bytes) -> str | None:
    """The format that a file's first bytes name, if it is one of ``FORMATS``."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def read_size(data: bytes, format: str) -> Size | None:
    """The size in a file's header; None if it has none, or an empty one.

    If a file names several sizes, this is the largest width and height, so that no limit
    is evaded.
    """
    sizes = {"png": _png_sizes, "jpeg": _jpeg_sizes, "webp": _webp_sizes}[format](data)
    found = list(sizes)
    if not found or min(min(size) for size in found) < 1:
        return None
    widths, heights = zip(*found, strict=True)
    return Size(max(widths), max(heights))


def _png_sizes(data: bytes) -> Iterator[Size]:
    if data[12:16] == b"IHDR" and len(data) >= 24:
        yield Size(int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))


def _jpeg_sizes(data: bytes) -> Iterator[Size]:
    """The sizes of all frame headers before the first scan."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # filling
            at += 1
            continue
        if marker == 0xDA:  # the scan: what follows is compressed
            return
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            yield Size(
                int.from_bytes(data[at + 7 : at + 9], "big"),
                int.from_bytes(data[at + 5 : at + 7], "big"),
            )
        has_length = marker != 0x01 and not 0xD0 <= marker <= 0xD8
        at += 2 + (int.from_bytes(data[at + 2 : at + 4], "big") if has_length else 0)


def _webp_sizes(data: bytes) -> Iterator[Size]:
    """The sizes of the canvas and of its images."""
    at = 12
    while at + 18 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 18]
        if kind == b"VP8X":
            yield Size(
                int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
            )
        elif kind == b"VP8L":
            bits = int.from_bytes(body[1:5], "little")
            yield Size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        elif kind == b"VP8 ":
            yield Size(
                int.from_bytes(body[6:8], "little") & 0x3FFF,
                int.from_bytes(body[8:10], "little") & 0x3FFF,
            )
        at += 8 + length + length % 2
