"""The official openai client, against the ASGI application of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import pytest
from django.contrib.auth import get_user_model
from openai import AsyncOpenAI

from tests.conftest import ApiClient
from tinkerapi.asgi import application
from tinkerapi.services import api_key_create


class OpenAIUser:
    """A user with a key: ``user(lambda client: client.models.list())``."""

    def __init__(self, name: str) -> None:
        self.owner = get_user_model().objects.create_user(name)
        _, self.key = api_key_create(user=self.owner, name="laptop")

    def __call__(self, ask: Callable[[AsyncOpenAI], Awaitable[Any]]) -> Any:
        """The client's answers; it raises its own errors, and sends nothing twice."""

        async def run() -> Any:
            transport = httpx2.ASGITransport(app=application)
            async with AsyncOpenAI(
                api_key=self.key,
                base_url="http://localhost/v1",
                max_retries=0,
                http_client=httpx2.AsyncClient(transport=transport),
            ) as client:
                return await ask(client)

        return asyncio.run(run())


@pytest.fixture
def user(served_api: ApiClient) -> OpenAIUser:
    """One user of a server with a live worker."""
    return OpenAIUser("researcher")
