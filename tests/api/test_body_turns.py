"""One user's large bodies are few at a time, and no other user waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pytest
from django.http import HttpResponseBase

from tinkerapi.api.bodies.limit import Admitted, Scope, limit_body
from tinkerapi.api.bodies.turns import BODIES_AT_A_TIME, let_go_of_body

LARGE = 2**20


class Uploads:
    """Requests of users, whose bodies end on command."""

    def __init__(self) -> None:
        self.reading: list[str] = []
        """The users whose bodies are being read."""
        self._application = limit_body(self._read_and_answer, self._admit)
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, owner: str | None, receive: Any = None, length: int = LARGE) -> None:
        scope: MutableMapping[str, Any] = {
            "type": "http",
            "path": owner,
            "headers": [(b"content-length", str(length).encode())],
        }
        request = self._application(scope, receive or self._idle, self._nowhere)
        self._tasks.append(asyncio.ensure_future(request))
        for _ in range(5):
            await asyncio.sleep(0)

    async def leave(self, number: int) -> None:
        self._tasks[number].cancel()
        for _ in range(5):
            await asyncio.sleep(0)

    async def _admit(self, scope: Scope) -> HttpResponseBase | Admitted:
        return Admitted(2 * LARGE, scope["path"])

    async def _read_and_answer(self, scope: Scope, receive: Any, send: Any) -> None:
        owner = scope["path"]
        self.reading.append(owner)
        try:
            await receive()
            request: Any = type("Request", (), {})()
            request.scope, request._body = scope, b"read"
            let_go_of_body(request)
            assert not hasattr(request, "_body")
            await asyncio.Event().wait()  # for its result, say
        finally:
            self.reading.remove(owner)

    @staticmethod
    async def _idle() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    @staticmethod
    async def _nowhere(message: Any) -> None: ...

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def whole() -> dict[str, Any]:
    return {"type": "http.request", "body": b"x", "more_body": False}


def run(scenario: Callable[[Uploads], Awaitable[None]]) -> None:
    async def main() -> None:
        uploads = Uploads()
        try:
            await scenario(uploads)
        finally:
            await uploads.end()

    asyncio.run(main())


def test_a_user_has_a_few_bodies_here_at_a_time_and_another_user_as_many() -> None:
    async def scenario(uploads: Uploads) -> None:
        for _ in range(3 * BODIES_AT_A_TIME):
            await uploads.begin("eve")
        assert uploads.reading == ["eve"] * BODIES_AT_A_TIME
        await uploads.begin("ada")
        assert uploads.reading[-1] == "ada"

    run(scenario)


def test_a_client_that_leaves_makes_room_for_the_next() -> None:
    async def scenario(uploads: Uploads) -> None:
        for _ in range(BODIES_AT_A_TIME + 1):
            await uploads.begin("eve")
        await uploads.leave(0)
        assert len(uploads.reading) == BODIES_AT_A_TIME
        await uploads.leave(1)
        assert len(uploads.reading) == BODIES_AT_A_TIME - 1

    run(scenario)


def test_a_body_that_was_read_makes_room_while_its_client_waits_for_the_result() -> None:
    async def scenario(uploads: Uploads) -> None:
        for _ in range(3 * BODIES_AT_A_TIME):
            await uploads.begin("eve", whole)
        assert len(uploads.reading) == 3 * BODIES_AT_A_TIME

    run(scenario)


@pytest.mark.parametrize(("owner", "length"), [("eve", 1000), (None, LARGE)])
def test_small_bodies_and_forms_take_no_turn(owner: str | None, length: int) -> None:
    async def scenario(uploads: Uploads) -> None:
        for _ in range(3 * BODIES_AT_A_TIME):
            await uploads.begin(owner, length=length)
        assert len(uploads.reading) == 3 * BODIES_AT_A_TIME

    run(scenario)
