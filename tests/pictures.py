"""Small image files for tests, drawn here."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image


def picture(
    width: int = 24, height: int = 16, *, format: str = "png", seed: int = 0, **options: Any
) -> bytes:
    """A file of random pixels, in blocks so that resizing leaves something of them."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    small = Image.fromarray(blocks)
    file = BytesIO()
    small.resize((width, height), Image.Resampling.NEAREST).save(file, format, **options)
    return file.getvalue()


def address(data: bytes, format: str = "png") -> str:
    """The file as a ``data:`` address."""
    return f"data:image/{format};base64,{b64encode(data).decode()}"


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG of some kilobytes that a decoder would need gigabytes for."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        sized = struct.pack(">I", len(body)) + kind + body
        return sized + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
