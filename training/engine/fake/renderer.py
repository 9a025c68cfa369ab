"""A renderer without a tokenizer: a token is a byte; 256 ends a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.engine.fake.sampler import END_TOKEN
from training.engine.interface import Renderer
from training.engine.sampler.stop_strings import StreamedText
from training.errors import InvalidRequest
from training.types import NO_CHAT_OPTIONS, ChatOptions, Datum, TokenText

END_TEXT = "<end>"


class FakeRenderer(Renderer):
    """See the module's docstring."""

    def render_conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        train_on: str,
        options: ChatOptions = NO_CHAT_OPTIONS,
    ) -> Datum:
        roles = [message["role"] for message in messages]
        if train_on == "assistant" and "assistant" not in roles:
            raise InvalidRequest("train_on: there is no assistant turn")
        trains_all = train_on == "all" or (train_on == "auto" and "assistant" not in roles)
        tokens: list[int] = []
        weights: list[float] = []
        for message in messages:
            header = self.encode(f"{message['role']}: ")
            content = [*self.encode(message["content"] or ""), END_TOKEN]
            weight = float(trains_all or message["role"] == "assistant")
            tokens += header + content
            weights += [0.0] * len(header) + [weight] * len(content)
        return Datum(
            model_input=np.array(tokens[:-1], np.int32),
            loss_fn_inputs={
                "target_tokens": np.array(tokens[1:], np.int64),
                "weights": np.array(weights[1:], np.float32),
            },
        )

    def render_prompt(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions = NO_CHAT_OPTIONS
    ) -> list[int]:
        tokens: list[int] = []
        for message in messages:
            text = f"{message['role']}: {message['content'] or ''}"
            tokens += [*self.encode(text), END_TOKEN]
        if options.continue_final_message:
            return tokens[:-1]
        return tokens + self.encode("assistant: " if options.add_generation_prompt else "")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_texts(self, tokens: Sequence[int], before: Sequence[int] = ()) -> list[TokenText]:
        return _placed(tokens, end_text="")

    def prompt_texts(
        self, tokens: Sequence[int], text: str | None = None
    ) -> tuple[str, list[TokenText]]:
        placed = _placed(tokens, end_text=END_TEXT)
        return _decode(tokens, END_TEXT) if text is None else text, placed


def _placed(tokens: Sequence[int], end_text: str) -> list[TokenText]:
    """Each token, placed in the text in which ``end_text`` stands for the end of a turn."""
    stream, seen, offset = StreamedText(lambda some: _decode(some, end_text)), [], 0
    placed = []
    for token in tokens:
        seen.append(token)
        own = END_TEXT.encode() if token == END_TOKEN else bytes([token])
        placed.append(TokenText(own.decode(errors="replace"), offset, own))
        offset += len(stream.next_piece(seen))
    return placed


def _decode(tokens: Sequence[int], end_text: str) -> str:
    written = [end_text.encode() if token == END_TOKEN else bytes([token]) for token in tokens]
    return b"".join(written).decode(errors="replace")
