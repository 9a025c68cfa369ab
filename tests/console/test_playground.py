"""The playground: requests like any others, by a session in place of a key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from futures.models import Future
from futures.transitions import State
from tests.conftest import ApiClient
from tests.console.conftest import list_page, page
from tinkerapi.asgi import application
from training.base_models import base_model_get
from training.models import AuditEvent, Checkpoint

CHAT = reverse("playground-chat")
PAGE = reverse("admin:training_checkpoint_playground")

Traces = Callable[..., SimpleNamespace]
Browser = Callable[[User], Client]


def body(model: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": model, "messages": messages, "max_tokens": 4, "seed": 7, **more}


def chat(client: Client, model: str, **more: Any) -> Any:
    return client.post(CHAT, body(model, **more), content_type="application/json")


@pytest.fixture
def model() -> str:
    return base_model_get(None).name


def test_an_answer_is_a_future_of_the_person_who_is_logged_in(
    served_api: ApiClient, staff: User, browser: Browser, model: str
) -> None:
    answer = chat(browser(staff), model, logprobs=True, top_logprobs=2)

    assert answer.status_code == 200, answer.content
    [choice] = answer.json()["choices"]
    assert [len(token["top_logprobs"]) for token in choice["logprobs"]["content"]] == [2] * 4
    future = Future.objects.get(pk=answer["x-request-id"])
    assert (future.owner_id, future.kind, future.state) == (staff.pk, "sample", State.READY)
    again = chat(browser(staff), model, logprobs=True, top_logprobs=2).json()
    assert again["choices"] == answer.json()["choices"]


def test_a_stream_ends_with_the_tokens_and_their_probabilities(
    served_api: ApiClient, staff: User, browser: Browser, model: str
) -> None:
    client = browser(staff)
    cookies = "; ".join(f"{name}={morsel.value}" for name, morsel in client.cookies.items())
    token = client.get(PAGE).cookies["csrftoken"].value
    sent = json.dumps(body(model, stream=True, logprobs=True)).encode()

    status, content = exchange(sent, cookies=f"{cookies}; csrftoken={token}", token=token)

    assert status == 200, content
    events = [
        json.loads(part.removeprefix("data: "))
        for part in content.decode().strip().split("\n\n")
        if "[DONE]" not in part
    ]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    tokens = events[-1]["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == text


def exchange(sent: bytes, *, cookies: str, token: str = "") -> tuple[int, bytes]:
    """One request through the application, without Django's test client and its concessions."""
    messages: list[Any] = []

    async def run() -> None:
        received = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if received.is_set():
                await asyncio.Event().wait()
            received.set()
            return {"type": "http.request", "body": sent, "more_body": False}

        async def send(message: Any) -> None:
            messages.append(message)

        headers = {
            "host": "localhost",
            "content-type": "application/json",
            "content-length": str(len(sent)),
            "cookie": cookies,
        } | ({"x-csrftoken": token} if token else {})
        scope = {
            "type": "http",
            "method": "POST",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "scheme": "http",
            "http_version": "1.1",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
        }
        await application(scope, receive, send)

    asyncio.run(run())
    return messages[0]["status"], b"".join(message.get("body", b"") for message in messages)


def test_a_page_of_another_site_cannot_use_the_session(
    served_api: ApiClient, staff: User, browser: Browser, model: str
) -> None:
    client = browser(staff)
    cookies = "; ".join(f"{name}={morsel.value}" for name, morsel in client.cookies.items())

    status, content = exchange(json.dumps(body(model)).encode(), cookies=cookies)

    assert status == 403
    assert b"CSRF" in content
    assert not Future.objects.exists()


def test_only_a_session_of_the_console_is_accepted(
    served_api: ApiClient, user_factory: Callable[..., User], browser: Browser, model: str
) -> None:
    nobody, plain = Client(), browser(user_factory())

    assert chat(nobody, model).status_code == 401  # not the user local, though this is loopback
    assert chat(plain, model).status_code == 403
    assert not Future.objects.exists()


def test_a_person_tries_their_own_checkpoints_and_a_superuser_all(
    served_api: ApiClient, browser: Browser, user_factory: Callable[..., User]
) -> None:
    owner, other = user_factory(is_staff=True), user_factory(is_staff=True)
    superuser = user_factory(is_staff=True, is_superuser=True)
    name = checkpoint_of(served_api, owner)

    assert chat(browser(owner), name).status_code == 200
    assert not AuditEvent.objects.filter(event="checkpoint_read").exists()
    assert chat(browser(superuser), name).status_code == 200
    event = AuditEvent.objects.get(event="checkpoint_read")
    assert (event.actor_id, event.owner_id) == (superuser.pk, owner.pk)
    assert event.details["purpose"] == "sample"
    for wrong in (name, "checkpoint:0", "checkpoint:x", f"checkpoint:{10**30}", "checkpoint:"):
        answer = chat(browser(other), wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert name.removeprefix("checkpoint:") in browser(owner).get(PAGE).content.decode()
    for person, is_listed in ((owner, True), (other, False), (superuser, True)):
        html = browser(person).get(PAGE).content.decode()
        assert (f'value="{name}"' in html) == is_listed


def checkpoint_of(api: ApiClient, owner: User) -> str:
    """A sampler checkpoint, by the name that the page has for it."""
    from tinkerapi.services import api_key_create

    _, key = api_key_create(user=owner, name="laptop")
    mine = {"headers": {"X-API-Key": key}, "model_id": "mine"}
    assert api.post("/api/v1/add_lora", **mine).status_code == 200
    saved = api.post("/api/v1/save_weights_for_sampler", name="first", **mine)
    assert saved.status_code == 200, saved.content
    return f"checkpoint:{Checkpoint.objects.get(owner=owner).pk}"


def test_a_bad_field_is_named(staff: User, browser: Browser, api: ApiClient, model: str) -> None:
    answer = chat(browser(staff), model, temperature="hot")

    assert answer.status_code == 400
    assert "temperature" in answer.json()["error"]["message"]


def test_every_checkpoint_page_leads_to_the_playground(
    console: Client, trained: Traces, superuser: User
) -> None:
    checkpoint = trained(superuser).checkpoint

    answer = console.get(page(checkpoint, "try_it"))

    assert answer.status_code == 302
    html = console.get(answer["Location"]).content.decode()
    assert f'<option value="checkpoint:{checkpoint.pk}" selected>' in html
    assert f'<option value="{checkpoint.run.base_model}" selected>' in html
    assert page(checkpoint, "try_it") in console.get(page(checkpoint)).content.decode()
    assert PAGE in console.get(list_page(Checkpoint)).content.decode()


def test_weights_for_other_programs_are_not_offered(
    console: Client, trained: Traces, superuser: User
) -> None:
    checkpoint = trained(superuser).checkpoint
    Checkpoint.objects.filter(pk=checkpoint.pk).update(kind=Checkpoint.Kind.EXTERNAL)

    assert console.get(page(checkpoint, "try_it")).status_code == 403
    assert f'value="checkpoint:{checkpoint.pk}"' not in console.get(PAGE).content.decode()


@pytest.mark.parametrize("value", ["checkpoint:1", "checkpoint:²", "checkpoint:" + "9" * 40, "\0"])
def test_an_address_with_an_impossible_model_shows_the_page(console: Client, value: str) -> None:
    assert console.get(PAGE, {"model": value, "other": value}).status_code == 200
