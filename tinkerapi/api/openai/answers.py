"""Sampled sequences as OpenAI's answers: complete, or as the chunks of a stream.

The answer's id is the future's. The two requests differ only in where a choice has its text and
its log-probabilities.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, cast

from futures.errors import FuturePurged
from futures.models import Future
from tinkerapi.api.openai.options import Options
from training.kinds import SampleResult, stored_result
from training.kinds.sample_result import EchoedPrompt, SequenceResult, WrittenTokens


@dataclass(frozen=True, slots=True)
class Choice:
    """One sampled sequence, and its prompt if that is to be echoed."""

    sequence: SequenceResult
    prompt: EchoedPrompt | None = None

    @property
    def echoed_text(self) -> str:
        return "" if self.prompt is None else self.prompt.text


def choices_of(future: Future) -> list[Choice]:
    """A ready future's choices, those of the first prompt first.

    Raises:
        FuturePurged: They are no longer kept. (410)
    """
    if future.result is None:
        raise FuturePurged
    result = cast(SampleResult, stored_result(future.kind, bytes(future.result)))
    if not result.echo:
        return [Choice(sequence) for sequence in result.sequences]
    each = len(result.sequences) // len(result.echo)
    return [
        Choice(sequence, result.echo[number // each])
        for number, sequence in enumerate(result.sequences)
    ]


def usage(future: Future) -> dict[str, Any]:
    """Tokens of the prompts and tokens sampled, including sampled end tokens."""
    prompt_tokens, completion_tokens = future.summary["prompt_tokens"], future.summary["tokens"]
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        # Futures of earlier versions of the server do not say.
        "prompt_tokens_details": {"cached_tokens": future.summary.get("cached_prompt_tokens", 0)},
    }


class AnswerForm(ABC):
    """The form of the answers to one of the two requests."""

    answer_object: ClassVar[str]
    chunk_object: ClassVar[str]
    names: ClassVar[Mapping[str, str]]
    """The request's names of fields in the worker's errors."""

    def answer(self, future: Future, options: Options) -> dict[str, Any]:
        """The complete answer of a ready future."""
        choices = [
            {
                "index": index,
                **self.whole(choice.echoed_text + choice.sequence.text),
                "logprobs": self.logprobs(choice) if options.logprobs else None,
                "finish_reason": choice.sequence.stop_reason,
            }
            for index, choice in enumerate(choices_of(future))
        ]
        return {
            **self._head(future, options.model, self.answer_object),
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
        """A choice's part of a chunk."""
        return {
            "index": index,
            **self.part(text, is_first=is_first),
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    @abstractmethod
    def whole(self, text: str) -> dict[str, Any]:
        """A choice's text in a complete answer."""

    @abstractmethod
    def part(self, text: str, *, is_first: bool) -> dict[str, Any]:
        """A choice's text in a chunk."""

    @abstractmethod
    def logprobs(self, choice: Choice) -> dict[str, Any]:
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

    names = MappingProxyType({"num_samples": "n"})
    answer_object = "text_completion"
    chunk_object = "text_completion"

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def part(self, text: str, *, is_first: bool) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, choice: Choice) -> dict[str, Any]:
        parts = [_columns(choice.sequence, begin=len(choice.echoed_text))]
        if choice.prompt is not None:
            parts.insert(0, _columns(choice.prompt, begin=0))
        columns = {name: [item for part in parts for item in part[name]] for name in parts[0]}
        return {**columns, "top_logprobs": columns["top_logprobs"] or None}


class ChatForm(AnswerForm):
    """``/v1/chat/completions``."""

    names = MappingProxyType({"num_samples": "n", "prompt": "messages"})
    answer_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def part(self, text: str, *, is_first: bool) -> dict[str, Any]:
        if is_first:
            return {"delta": {"role": "assistant", "content": text}}
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, choice: Choice) -> dict[str, Any]:
        sequence, written = choice.sequence, _written(choice.sequence)
        tokens = zip(written.texts, _bytes_of(written), sequence.logprobs.tolist(), strict=True)
        tops = _tops(sequence) or [[]] * len(written.texts)
        return {
            "content": [
                {**_token(*token), "top_logprobs": [_token(*likely) for likely in top]}
                for token, top in zip(tokens, tops, strict=True)
            ],
            "refusal": None,
        }


Likely = tuple[str, bytes | None, float]
"""A token's text, its bytes if they are known, and its log-probability."""


def _written(part: SequenceResult | EchoedPrompt) -> WrittenTokens:
    """The part's tokens by themselves; a request for log-probabilities asks for them."""
    return cast(WrittenTokens, part.written)


def _columns(part: SequenceResult | EchoedPrompt, *, begin: int) -> dict[str, list[Any]]:
    """The four columns of a completion's log-probabilities, for a prompt or its continuation.

    As with OpenAI, the token itself is always among the likely ones. A
    prompt's first token has no predecessor, so its entries are null.

    Args:
        begin: Offset of the part in the text, in characters.
    """
    written = _written(part)
    texts, logprobs = list(written.texts), [] if part.logprobs is None else part.logprobs.tolist()
    values = [None if math.isnan(value) else value for value in logprobs]
    tops: list[dict[str, float] | None] = []
    for text, value, likely in zip(texts, values, _tops(part), strict=False):
        top: dict[str, float] = {}
        for likely_text, _, likely_value in likely:
            # Of several tokens with the same text (parts of characters), the likeliest is kept.
            top.setdefault(likely_text, likely_value)
        tops.append(None if value is None else {**top, text: top.get(text, value)})
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": [begin + offset for offset in written.offsets],
    }


def _tops(part: SequenceResult | EchoedPrompt) -> list[list[Likely]]:
    """The likeliest tokens at each position, likeliest first; empty if not requested."""
    texts = _written(part).top_texts
    if texts is None or part.top is None:
        return []
    values = part.top.logprobs.tolist()
    utf8 = _written(part).top_utf8 or [[text.encode() for text in row] for row in texts]
    return [list(zip(*row, strict=True)) for row in zip(texts, utf8, values, strict=True)]


def _bytes_of(written: WrittenTokens) -> Sequence[bytes | None]:
    """Each token's bytes; None for a part of a character if the vocabulary does not give its
    bytes."""
    return written.utf8 or [text.encode() for text in written.texts]


def _token(text: str, utf8: bytes | None, logprob: float) -> dict[str, Any]:
    return {"token": text, "bytes": None if utf8 is None else list(utf8), "logprob": logprob}
