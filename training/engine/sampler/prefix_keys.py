"""The names under which blocks of keys and values are found again.

A block's contents depend on the weights, on the rotary factors, on the images and on all tokens
up to its end, so its key is a hash of all of them: of the key of the block before it and its own
tokens. The owner is part of it, though the contents do not depend on the owner: otherwise the
time to the first token, and the count of cached tokens, would tell one user what another has sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from training.engine.torch.attention.arithmetic import BLOCK_TOKENS
from training.images import PlacedImage

DIGEST_BYTES = 20


def root_key(*, group: str, version: str | None, is_long: bool) -> bytes:
    """What precedes the first block of a sequence.

    Args:
        group: The owner.
        version: Of an adapter's weights; None for the base model.
        is_long: Whether its rotary factors are those of a long sequence.
    """
    return _digest(repr((group, version, is_long)).encode())


def next_key(
    before: bytes, tokens: Sequence[int], start: int, images: Sequence[PlacedImage]
) -> bytes:
    """The key of the full block of ``tokens`` that begins at position ``start``."""
    parts = [before, np.asarray(tokens, np.int64).tobytes()]
    for image in images:
        if image.start < start + BLOCK_TOKENS and start < image.end:
            parts += [(image.start - start).to_bytes(8, "big", signed=True), image.image.digest]
    return _digest(b"".join(parts))


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=DIGEST_BYTES).digest()
