"""The text of claimed requests that is being tokenized, and its results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from futures.models import Future
from training.engine.interface import Renderer
from training.errors import TrainingError
from training.kinds import REQUESTS, ForwardBackward, Order, Request, Sample
from training.types import NO_CHAT_OPTIONS, ChatOptions, Datum
from training.worker.requests import request_of
from training.worker.short_texts import ShortTexts
from training.worker.text_pool import TextPool
from training.worker.text_process import Answer, TextTask
from training.worker.text_work import Item, Text, tokens_of

TEXT_RULES = 2
"""The version of the rendering rules, which each worker's row has among its figures. Rows of
the first version (``training.engine.renderer.first_rules``) have none."""

OWNER_TEXT_BYTES = 64 * 1024**2
"""Limit of one owner's waiting text; beyond it their futures are not claimed."""
PENDING_TEXT_BYTES = 1024**3
"""Limit of all waiting text; beyond it only futures of owners without waiting text are claimed."""


@dataclass(frozen=True)
class _Begun:
    owner_id: int
    payload_bytes: int


class Texts:
    """Tokens of requests: made when they are claimed, those of long text by a pool of processes; or
    only when they run, without a pool."""

    def __init__(
        self,
        renderer: Renderer,
        pool: TextPool | None,
        *,
        max_context_tokens: int,
        seconds: float,
    ) -> None:
        """
        Args:
            pool: With None everything is done directly, in the worker's thread.
            seconds: Time limit of one conversation or prompt in a process.
        """
        self._renderer = renderer
        self._max_context_tokens = max_context_tokens
        self._pool = pool
        self._short = ShortTexts(renderer, max_context_tokens=max_context_tokens)
        self._seconds = seconds
        self._requests: dict[str, ForwardBackward | Sample] = {}
        """Claimed requests without text or with short text, decoded once to find that out."""
        self._begun: dict[str, _Begun] = {}
        self._answers: dict[str, Answer] = {}

    def begin(self, futures: Iterable[Future]) -> bool:
        """Tokenize the short text of claimed futures, and start with the rest; return whether
        there is any rest."""
        if self._pool is None:
            return False
        is_any_left = False
        self._short.begin_turn()
        for future in futures:
            if REQUESTS[future.kind].order is Order.BARRIER:
                continue
            request = request_of(future)
            if not isinstance(request, ForwardBackward | Sample):
                continue
            if not request.has_text:
                self._requests[future.id] = request
                continue
            answer = self._short.tokens(future.owner_id, request)
            if answer is not None:
                self._requests[future.id] = request
                self._answers[future.id] = answer
                continue
            is_any_left = True
            payload = bytes(future.payload or b"")
            task = TextTask(future.kind, payload, self._max_context_tokens, self._seconds)
            self._begun[future.id] = _Begun(future.owner_id, len(payload))
            self._pool.submit(future.id, str(future.owner_id), task)
        return is_any_left

    def is_ready(self, future: Future) -> bool:
        """Whether a request may run: its text is tokenized or refused, or it has none."""
        return future.id not in self._begun or future.id in self._answers

    @property
    def are_pending(self) -> bool:
        """Whether some text is not tokenized yet."""
        return bool(self._begun.keys() - self._answers.keys())

    def full_owners(self) -> set[int]:
        """Owners with so much waiting text that no more of their futures are to be claimed.

        An owner without waiting text is never among them, however much others have.
        """
        pending: Counter[int] = Counter()
        for key in self._begun.keys() - self._answers.keys():
            pending[self._begun[key].owner_id] += self._begun[key].payload_bytes
        share = OWNER_TEXT_BYTES if pending.total() <= PENDING_TEXT_BYTES else 0
        return {owner_id for owner_id, size in pending.items() if size > share}

    def look(self, *, wait_seconds: float = 0.0) -> None:
        """Collect tokenized text, waiting up to ``wait_seconds`` for some."""
        if self._pool is not None:
            answers = self._pool.answers(wait_seconds=wait_seconds)
            self._answers |= {key: a for key, a in answers.items() if key in self._begun}

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop cancelled requests; other ids are ignored."""
        for request_id in request_ids:
            if request_id in self._begun and self._pool is not None:
                self._pool.forget(request_id)
            self._begun.pop(request_id, None)
            self._answers.pop(request_id, None)
            self._requests.pop(request_id, None)

    def request(self, future: Future) -> Request:
        """The request of a future that runs now."""
        return self._requests.pop(future.id, None) or request_of(future)

    def take(self, future: Future, request: ForwardBackward | Sample) -> list[Item]:
        """The request's datums or prompts in tokens.

        Raises:
            TrainingError: They cannot be tokenized.
        """
        self._begun.pop(future.id, None)
        answer = self._answers.pop(future.id, None)
        if answer is None:
            return self._render(self._renderer, request)
        if isinstance(answer, TrainingError):
            raise answer
        return answer

    def render(self, future: Future, request: ForwardBackward | Sample) -> list[Item]:
        """The tokens of an answered request, made directly for a replay.

        There is no time limit, because it was accepted before.

        Raises:
            TrainingError: The model's folder has changed.
        """
        if _has_first_rules(future):
            return self._render(_FirstRules(self._renderer), request)
        return self._render(self._renderer, request)

    def _render(self, text: Text, request: ForwardBackward | Sample) -> list[Item]:
        return tokens_of(text, request, max_context_tokens=self._max_context_tokens)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.close()


class _FirstRules:
    """A renderer with the first version's rules."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self.render_prompt = renderer.render_prompt
        self.encode = renderer.encode
        self.image_fault = renderer.image_fault
        self.place_images = renderer.place_images
        self.render_image_prompt = renderer.render_image_prompt

    def render_conversation(
        self, messages: Sequence[Mapping[str, Any]], *, train_on: str, options: ChatOptions
    ) -> Datum:
        # That version accepted only roles and texts.
        is_plain = all(
            m.keys() == {"role", "content"} and isinstance(m["content"], str) for m in messages
        )
        if is_plain and options == NO_CHAT_OPTIONS:
            return self._renderer.render_by_first_rules(messages, train_on=train_on)
        return self._renderer.render_conversation(messages, train_on=train_on, options=options)


def _has_first_rules(future: Future) -> bool:
    """Whether the worker that computed a future tokenized its text by the first rules."""
    return future.worker is None or int(future.worker.figures.get("text_rules", 1)) < TEXT_RULES
