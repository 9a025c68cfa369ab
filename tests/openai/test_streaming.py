"""Streams through the official client: pieces while the worker samples, and the whole text always.

The client's transport here hands the stream over when it is over, so that pieces come while the
sample grows is seen by their number, and from outside in ``tests/acceptance/test_openai.py``.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterable
from typing import Any

import openai
import pytest

from futures.models import Future
from futures.transitions import State
from futures.waiters import Waiters, future_wait, waiters
from tests.openai.conftest import OpenAIUser
from tests.openai.test_completions import HELLO, MODEL, chat, complete
from tests.waiting import LONG_SECONDS
from tinkerapi.asgi import application
from training.worker import loop, samples

NOTE = tuple[str, str]


@pytest.fixture(autouse=True)
def _a_note_per_token_to_a_hub_that_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slows the fake engine down, because the waiters' first LISTEN takes some milliseconds."""
    monkeypatch.setattr(loop, "SAMPLING_SLICE_SECONDS", 0.0)
    notify, wake = samples.notify_progress, Waiters._wake
    listening, followed = set[Waiters](), set[str]()

    def wakes_when_it_listens(self: Waiters, names: list[str]) -> None:
        listening.add(self)
        wake(self, names)

    def notify_who_listens(notes: list[NOTE]) -> None:
        deadline = time.monotonic() + LONG_SECONDS
        while notes[0][0] not in followed:
            assert time.monotonic() < deadline
            time.sleep(0.001)
            followed.update(*(waiting._following for waiting in listening.copy()))
        notify(notes)

    monkeypatch.setattr(Waiters, "_wake", wakes_when_it_listens)
    monkeypatch.setattr(samples, "notify_progress", notify_who_listens)


def stream_chat(user: OpenAIUser, /, **more: Any) -> list[Any]:
    """All chunks of a chat's stream."""
    fields = {"model": MODEL, "messages": HELLO, "seed": 7, **more}

    async def read(client: openai.AsyncOpenAI) -> list[Any]:
        stream = await client.chat.completions.create(stream=True, **fields)
        return [chunk async for chunk in stream]

    chunks: list[Any] = user(read)
    return chunks


def stream_complete(user: OpenAIUser, /, **more: Any) -> list[Any]:
    fields = {"model": MODEL, "prompt": "hello", "seed": 7, **more}

    async def read(client: openai.AsyncOpenAI) -> list[Any]:
        stream = await client.completions.create(stream=True, **fields)
        return [chunk async for chunk in stream]

    chunks: list[Any] = user(read)
    return chunks


def said(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_a_chat_streams_as_many_pieces_and_is_the_whole_text(user):
    whole = chat(user, max_tokens=60, stop=["~~~"], logprobs=True)
    chunks = stream_chat(
        user,
        max_tokens=60,
        stop=["~~~"],
        logprobs=True,
        stream_options={"include_usage": True},
    )

    *pieces, counts = chunks
    assert said(chunks) == whole.choices[0].message.content
    assert len(pieces) > 5
    assert pieces[0].choices[0].delta.role == "assistant"
    assert [c.delta.role for chunk in pieces[1:] for c in chunk.choices] == [None] * (
        len(pieces) - 1
    )
    reasons = [choice.finish_reason for chunk in pieces for choice in chunk.choices]
    assert reasons == [None] * (len(pieces) - 1) + [whole.choices[0].finish_reason]
    assert pieces[-1].choices[0].logprobs.content == whole.choices[0].logprobs.content
    assert counts.choices == []
    assert counts.usage.prompt_tokens == whole.usage.prompt_tokens
    assert counts.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in pieces)
    assert {(chunk.id, chunk.object) for chunk in chunks} == {
        (chunks[0].id, "chat.completion.chunk")
    }


def test_several_choices_of_several_prompts_stream_side_by_side(user):
    fields = {"prompt": ["hello", "yes"], "n": 2, "max_tokens": 30}
    whole = complete(user, **fields)
    chunks = stream_complete(user, **fields)

    texts = [""] * 4
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert len(chunks) > 8


@pytest.mark.parametrize("kept", ["none", "every other", "all but the first two"])
def test_what_lost_notes_said_is_made_up_for(user, monkeypatch, kept):
    monkeypatch.setattr("training.text_pieces.REPEATED_CHARACTERS", 0)
    notify, seen = samples.notify_progress, []

    def lossy(notes: Iterable[NOTE]) -> None:
        seen.append(notes)
        number = len(seen)
        if (kept == "every other" and number % 2) or (kept[:3] == "all" and number > 2):
            notify(notes)

    monkeypatch.setattr(samples, "notify_progress", lossy)
    chunks = stream_chat(user, max_tokens=60)

    assert seen
    assert said(chunks) == chat(user, max_tokens=60).choices[0].message.content


def test_a_request_that_fails_before_it_says_anything_has_its_status(user):
    with pytest.raises(openai.BadRequestError) as refused:
        stream_complete(user, prompt=[999])
    assert refused.value.param == "prompt"


def test_a_text_that_turns_out_otherwise_ends_in_an_error(user, monkeypatch):
    """As after a crash on a machine whose results depend on batch-mates."""
    notify = samples.notify_progress

    def before_the_crash(notes: Iterable[NOTE]) -> None:
        notify([(request_id, '[0, 0, "another life"]') for request_id, _ in notes])

    monkeypatch.setattr(samples, "notify_progress", before_the_crash)

    with pytest.raises(openai.APIError, match="differs from the text sent before"):
        stream_chat(user, max_tokens=60)


@pytest.mark.parametrize(
    ("headers", "leaves_late", "end"),
    [
        ([], False, State.CANCELLED),
        ([], True, State.READY),
        ([(b"idempotency-key", b"k")], False, State.READY),
    ],
    ids=["without a key", "when all was sampled", "with a key"],
)
def test_a_client_that_leaves_stops_following_and_cancels_what_it_cannot_ask_for_again(
    user, headers, leaves_late, end, monkeypatch
):
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 400, "stop": ["~~~~"], "stream": True}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"authorization", f"Bearer {user.key}".encode()),
            *headers,
        ],
    }

    notify, gone = samples.notify_progress, threading.Event()

    def notify_and_wait_until_the_client_is_gone(notes: list[NOTE]) -> None:
        notify(notes)
        assert leaves_late or gone.wait(LONG_SECONDS)

    monkeypatch.setattr(samples, "notify_progress", notify_and_wait_until_the_client_is_gone)

    async def leave_after_the_first_piece() -> tuple[str, str]:
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]
        seen, sent = asyncio.Event(), []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await seen.wait()
            if leaves_late:
                await end_of(sent[-1])
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            if sent[-1]:
                seen.set()
                await asyncio.sleep(LONG_SECONDS)  # a client that reads no more, until it is gone

        async def end_of(event: bytes) -> Future:
            request_id = json.loads(event.removeprefix(b"data: "))["id"]
            final = await future_wait(
                request_id, owner_id=user.owner.pk, timeout_seconds=LONG_SECONDS
            )
            assert final is not None
            return final

        await application(scope, receive, send)
        assert waiters()._following == {}
        gone.set()
        first = json.loads(sent[-1].removeprefix(b"data: "))
        final = await end_of(sent[-1])
        return first["choices"][0]["text"], final.state

    text, state = asyncio.run(leave_after_the_first_piece())
    assert text
    assert state == end
