"""Texts that take long, crash or eat memory; their processes read this, so no Django here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from training.engine.fake.renderer import FakeRenderer
from training.errors import InvalidRequest
from training.types import NO_CHAT_OPTIONS, ChatOptions, Datum


class OddText:
    """Text whose first word says what becomes of its process."""

    image_fault = "it reads text only"

    def encode(self, text: str) -> list[int]:
        word, _, rest = text.partition(" ")
        if word == "forever":
            while True:
                with suppress(Exception):  # it never ends by itself
                    time.sleep(60)
        if word == "crash" or (word == "crash-once" and not os.path.exists(rest)):
            if rest:
                os.close(os.open(rest, os.O_CREAT))
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "touch":
            os.close(os.open(rest, os.O_CREAT))
        if word == "memory":
            return list(bytearray(64 * 1024**3))
        if word == "refuse":
            raise InvalidRequest(f"prompt: {rest}")
        return list(text.encode())

    def render_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions
    ) -> list[int]:
        return self.encode(messages[0]["content"])

    def render_conversation(
        self, messages: Sequence[Mapping[str, Any]], *, train_on: str, options: ChatOptions
    ) -> Datum:
        raise NotImplementedError


class SlowText(FakeRenderer):
    """Like the fake engine's renderer, but a text with "forever" never ends."""

    def encode(self, text: str) -> list[int]:
        while "forever" in text:
            time.sleep(1)
        return super().encode(text)

    def render_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        train_on: str,
        options: ChatOptions = NO_CHAT_OPTIONS,
    ) -> Datum:
        self.encode(messages[0]["content"])
        return super().render_conversation(messages, train_on=train_on, options=options)
