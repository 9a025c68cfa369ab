"""Answers in pieces, as server-sent events, while the worker samples.

The worker sends notes with new text. Notes may be lost, but the result is not: the last chunk of a
choice has all missing text, so the pieces always add up to the whole text. The view decides
what happens to the future when its client leaves.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from django.conf import settings
from django.http import HttpResponse, StreamingHttpResponse

from futures.models import Future
from futures.transitions import State
from futures.waiters import future_progress, future_wait
from tinkerapi.api.openai.answers import AnswerForm, choices_of, usage
from tinkerapi.api.openai.base import failure, not_finished, sample_failed
from tinkerapi.api.openai.options import Options
from tinkerapi.api.renderers import to_json
from training.text_pieces import TextPiece

Chunk = dict[str, Any]


async def answer_chunks(
    future: Future, options: Options, form: AnswerForm, *, owner_id: int
) -> AsyncGenerator[Chunk, None]:
    """The chunks of a stream, the one with the token counts included.

    Raises:
        SampleFailed: The request failed, was cancelled, or was silent for too long.
        FuturePurged: It is a repeat of a request whose result is no longer kept. (410)
    """
    sent = [""] * (len(options.prompts) * options.num_samples)
    begun: set[int] = set()

    def chunk(index: int, text: str, **more: Any) -> Chunk:
        is_first = index not in begun
        begun.add(index)
        sent[index] += text
        piece = form.piece(index, text, is_first=is_first, **more)
        return _with_usage(form.chunk(future, options.model, [piece]), options)

    final = None
    while final is None:
        is_silent = True
        notes = future_progress(
            future.id, owner_id=owner_id, timeout_seconds=settings.SYNC_TIMEOUT_SECONDS
        )
        async with aclosing(notes):
            async for note in notes:
                is_silent = False
                piece = TextPiece.of_note(note)
                if text := piece.after(sent[piece.number]):
                    yield chunk(piece.number, text)
        final = await future_wait(future.id, owner_id=owner_id, timeout_seconds=0)
        if final is None and is_silent:
            raise not_finished(future)
    if final.state != State.READY:
        raise sample_failed(final, form.names)
    choices = choices_of(final)
    for choice, text in zip(choices, sent, strict=True):
        if not choice.sequence.text.startswith(text):
            raise failure(
                final,
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "The sample was repeated after a crash and differs from the text sent before; "
                f"/retrieve_future has it under {future.id}.",
                "StreamBroken",
            )
    for index, choice in enumerate(choices):
        yield chunk(
            index,
            choice.sequence.text[len(sent[index]) :],
            logprobs=form.logprobs(choice) if options.logprobs else None,
            finish_reason=choice.sequence.stop_reason,
        )
    if options.include_usage:
        yield {**form.chunk(future, options.model, []), "usage": usage(final)}


class _EventStream(StreamingHttpResponse):
    """Passes its generator on unchanged, so that it is closed as soon as the client has left;
    Django's own wraps it, and leaves closing it to the garbage collector."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, content_type="text/event-stream")
        self._events = events

    def __aiter__(self) -> AsyncGenerator[bytes, None]:
        return self._events


def _with_usage(chunk: Chunk, options: Options) -> Chunk:
    """If counts were requested, every chunk has the field, and only the last one has a value."""
    return {**chunk, "usage": None} if options.include_usage else chunk


def event_stream(
    first: Chunk,
    rest: AsyncGenerator[Chunk, None],
    handle_exception: Callable[[Exception], HttpResponse],
) -> StreamingHttpResponse:
    """The chunks as server-sent events; an error among them is the last event.

    Args:
        handle_exception: Makes the error's answer; its body becomes the event.
    """

    async def events() -> AsyncGenerator[bytes, None]:
        async with aclosing(rest):
            yield _event(to_json(first))
            try:
                async for chunk in rest:
                    yield _event(to_json(chunk))
            except Exception as error:
                yield _event(handle_exception(error).content)
            else:
                yield _event(b"[DONE]")

    response = _EventStream(events())
    response["Cache-Control"] = "no-cache"
    response["X-Accel-Buffering"] = "no"  # nginx would buffer the pieces
    response["X-Content-Type-Options"] = "nosniff"
    return response


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
