"""Short texts become tokens in the worker itself, sooner than they could be sent away.

A process beside the worker costs a short text more than its tokens do, and requests that were
claimed together come back from it one after another, so they share fewer passes. Nobody may
wait for another user's text, so a text is turned into tokens here only if it is known to be
quick:

- it has at most ``CHARACTERS`` characters, in at most ``MESSAGES`` messages without further
  fields;
- at the start the tokenizer took at most ``TRY_SECONDS`` for each of some texts of that length
  that are slow for some tokenizers;
- the model's template computes with nothing but texts and their lengths (``plain_template``), so
  that its memory is bounded by them;
- no more than ``TURN_SECONDS`` go into the texts of one claim;
- a text that still takes more than ``ONE_SECONDS`` of the processor is interrupted, and the
  process beside the worker gets it, and from then on all of its owner's.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import numpy as np

from training.engine.interface import Renderer
from training.errors import TrainingError
from training.kinds import ForwardBackward, Sample
from training.types import NO_CHAT_OPTIONS, Conversation, Datum, Example, Prompt
from training.worker.text_process import Answer
from training.worker.text_work import tokens_of

CHARACTERS = 2000
"""Of all texts of a request together."""
MESSAGES = 16
"""Of all conversations of a request together."""
TRY_SECONDS = 0.02
"""Processor time of one text of ``CHARACTERS`` in the check at the start."""
TRIES = 5
ONE_SECONDS = 0.05
"""Processor time after which a text is interrupted. One of this length takes about 2 ms."""
TURN_SECONDS = 0.05
"""Processor time of all texts of one claim together."""

_SLOW_FOR_SOME = (
    "a",
    " ",
    "\n",
    "7",
    "-",
    "'s",
    "\u00e9",
    "e\u0301",
    "\u6771",
    "\U0001f600",
    "aB3 -\n",
)


class ShortTexts:
    """Makes tokens of the short texts of one base model. For a process's main thread only."""

    def __init__(self, renderer: Renderer, *, max_context_tokens: int) -> None:
        self._renderer = renderer
        self._max_context_tokens = max_context_tokens
        self._slow_owners: set[int] = set()
        """Owners of a text that was interrupted."""
        self._until = 0.0
        self._is_armed = False
        is_main = threading.current_thread() is threading.main_thread()
        self._takes_texts = is_main and _is_quick(renderer)
        self._takes_conversations = self._takes_texts and renderer.has_plain_template

    def begin_turn(self) -> None:
        """Begin with the texts of another claim."""
        self._until = time.thread_time() + TURN_SECONDS

    def tokens(self, owner_id: int, request: ForwardBackward | Sample) -> Answer | None:
        """The request's datums or prompts in tokens, or its refusal.

        Returns:
            None if its text is not short, or is not for this process for another reason.
        """
        if owner_id in self._slow_owners or time.thread_time() > self._until:
            return None
        items: Sequence[Example | Prompt]
        items = request.data if isinstance(request, ForwardBackward) else request.prompts
        if not self._are_short(items):
            return None
        try:
            with self._limit():
                return list(
                    tokens_of(self._renderer, request, max_context_tokens=self._max_context_tokens)
                )
        except TrainingError as error:
            return error
        except _TookTooLong:
            self._slow_owners.add(owner_id)
            return None

    def _are_short(self, items: Sequence[Example | Prompt]) -> bool:
        characters = messages = 0
        for item in items:
            if isinstance(item, str) and self._takes_texts:
                characters += len(item)
            elif isinstance(item, Conversation) and self._takes_conversations:
                if not _is_plain(item):
                    return False
                messages += len(item.messages)
                characters += sum(len(message.content or "") for message in item.messages)
            elif not isinstance(item, Datum | np.ndarray):
                return False
            if characters > CHARACTERS or messages > MESSAGES:
                return False
        return True

    @contextmanager
    def _limit(self) -> Iterator[None]:
        """Raise ``_TookTooLong`` in Python code that uses the processor for ``ONE_SECONDS``."""
        signal.signal(signal.SIGPROF, self._stop)
        self._is_armed = True
        signal.setitimer(signal.ITIMER_PROF, ONE_SECONDS)
        try:
            yield
        finally:
            self._is_armed = False
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._is_armed:  # else the text was ready just before
            raise _TookTooLong


class _TookTooLong(BaseException):  # not an Exception: a renderer takes those for the template's
    """The text was interrupted."""


def _is_plain(conversation: Conversation) -> bool:
    """Whether it is roles and texts only."""
    return (
        conversation.options == NO_CHAT_OPTIONS
        and all(
            message.content is None or isinstance(message.content, str)
            for message in conversation.messages
        )
        and not any(
            (message.name, message.tool_calls, message.tool_call_id, message.reasoning_content)
            != (None, None, None, None)
            for message in conversation.messages
        )
    )


def _is_quick(renderer: Renderer) -> bool:
    """Whether texts of ``CHARACTERS`` take at most ``TRY_SECONDS`` of the processor each."""
    return all(
        _takes_at_most(TRY_SECONDS, renderer, (piece * CHARACTERS)[:CHARACTERS])
        for piece in _SLOW_FOR_SOME
    )


def _takes_at_most(seconds: float, renderer: Renderer, text: str) -> bool:
    """Whether one of ``TRIES`` was that quick: other processes slow down some of them."""
    for _ in range(TRIES):
        begin = time.thread_time()
        with suppress(TrainingError):  # such a text is refused
            renderer.encode(text)
        if time.thread_time() - begin <= seconds:
            return True
    return False
