"""Sampled sequences as OpenAI's answers: whole, or as the chunks of a stream.

The answer's id is the future's. The two requests differ in where a choice keeps its text and
its log-probabilities, and in nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from futures import payload
from futures.errors import FuturePurged
from futures.models import Future

Sequence = Mapping[str, Any]
"""One sampled sequence of a sample future's result."""


def sequences_of(future: Future) -> list[Sequence]:
    """A ready future's sequences, those of the first prompt first.

    Raises:
        FuturePurged: They are no longer kept. (410)
    """
    if future.result is None:
        raise FuturePurged
    sequences: list[Sequence] = payload.decode(bytes(future.result))["sequences"]
    return sequences


def usage(future: Future) -> dict[str, int]:
    """Tokens read and tokens sampled; end tokens that were sampled count."""
    prompt_tokens, completion_tokens = future.summary["prompt_tokens"], future.summary["tokens"]
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class AnswerForm(ABC):
    """How one of the two requests is answered."""

    answer_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def answer(self, future: Future, *, model: str, logprobs: bool) -> dict[str, Any]:
        """The whole answer of a ready future."""
        choices = [
            {
                "index": index,
                **self.whole(sequence["text"]),
                "logprobs": self.logprobs(sequence) if logprobs else None,
                "finish_reason": sequence["stop_reason"],
            }
            for index, sequence in enumerate(sequences_of(future))
        ]
        return {
            **self._head(future, model, self.answer_object),
            "choices": choices,
            "usage": usage(future),
        }

    def chunk(self, future: Future, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One event of a stream."""
        return {**self._head(future, model, self.chunk_object), "choices": choices}

    def piece(
        self,
        index: int,
        text: str,
        *,
        is_first: bool = False,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        """A choice's share of a chunk."""
        return {
            "index": index,
            **self.part(text, is_first=is_first),
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    @abstractmethod
    def whole(self, text: str) -> dict[str, Any]:
        """A choice's text in a whole answer."""

    @abstractmethod
    def part(self, text: str, *, is_first: bool) -> dict[str, Any]:
        """A choice's text in a chunk."""

    @abstractmethod
    def logprobs(self, sequence: Sequence) -> dict[str, Any]:
        """The sampled tokens with their log-probabilities, in nats."""

    def _head(self, future: Future, model: str, kind: str) -> dict[str, Any]:
        return {
            "id": future.id,
            "object": kind,
            "created": int(future.created_at.timestamp()),
            "model": model,
            "system_fingerprint": None,
        }


class CompletionForm(AnswerForm):
    """``/v1/completions``."""

    answer_object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def part(self, text: str, *, is_first: bool) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, sequence: Sequence) -> dict[str, Any]:
        return {
            "tokens": sequence["token_texts"],
            "token_logprobs": sequence["logprobs"],
            "top_logprobs": _tops(sequence) or None,
            "text_offset": sequence["text_offsets"],
        }


class ChatForm(AnswerForm):
    """``/v1/chat/completions``."""

    answer_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def part(self, text: str, *, is_first: bool) -> dict[str, Any]:
        if is_first:
            return {"delta": {"role": "assistant", "content": text}}
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, sequence: Sequence) -> dict[str, Any]:
        values = sequence["logprobs"].tolist()
        tops = _tops(sequence) or [{}] * len(values)
        return {
            "content": [
                {
                    **_token(text, logprob),
                    "top_logprobs": [_token(*likely) for likely in top.items()],
                }
                for text, logprob, top in zip(sequence["token_texts"], values, tops, strict=True)
            ],
            "refusal": None,
        }


def _tops(sequence: Sequence) -> list[dict[str, float]]:
    """The likeliest tokens' texts and log-probabilities at each position, likeliest first.

    Of tokens with one text, which are parts of characters, the likeliest is there.
    """
    if "topk_texts" not in sequence:
        return []
    rows = zip(sequence["topk_texts"], sequence["topk_logprobs"]["logprobs"].tolist(), strict=True)
    tops = []
    for texts, values in rows:
        top: dict[str, float] = {}
        for text, value in zip(texts, values, strict=True):
            top.setdefault(text, value)
        tops.append(top)
    return tops


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "bytes": _bytes(text), "logprob": logprob}


def _bytes(text: str) -> list[int] | None:
    """UTF-8; None for a token that is a part of a character, whose bytes its text does not tell."""
    return None if "\ufffd" in text else list(text.encode())
