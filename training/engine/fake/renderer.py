"""The real renderer with a tokenizer of bytes, which takes microseconds."""

from __future__ import annotations

from training.engine.fake.sampler import VOCAB_SIZE
from training.engine.fake.tokenizer import ByteTokenizer
from training.engine.renderer.chat_renderer import ChatRenderer


class FakeRenderer(ChatRenderer):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__(ByteTokenizer(), VOCAB_SIZE)
