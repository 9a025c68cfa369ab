"""A signed link opens the one thing it was made for, and only while it is signed and fresh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest
from asgiref.sync import async_to_sync
from django.core import signing
from django.test import AsyncClient

from tests.conftest import InProcessWorker
from tests.isolation.conftest import Ids, Tenant, furnished
from tinkerapi.api.sdk.render import links
from training.models import Checkpoint


@pytest.fixture
def fetch(db: None) -> Callable[[str], tuple[int, bytes]]:
    """``fetch(url)``: status and body for a client without a key."""

    async def send(url: str) -> tuple[int, bytes]:
        response: Any = await AsyncClient().get(urlsplit(url).path)
        if not response.streaming:
            return response.status_code, response.content
        return response.status_code, b"".join([piece async for piece in response])

    return async_to_sync(send)


@pytest.fixture
def pair(tenant: Callable[[str], Tenant], work: InProcessWorker) -> tuple[Tenant, Tenant, Ids, Ids]:
    zelda, bob = tenant("zelda"), tenant("bob")
    return zelda, bob, furnished(zelda, work), furnished(bob, work)


def archive(tenant: Tenant, ids: Ids) -> str:
    path = f"training_runs/{ids['sdk_model']}/checkpoints/weights/{ids['checkpoint']}/archive"
    return str(tenant.ask("GET", f"/api/v1/{path}", sdk=True).json()["url"])


def test_ones_own_signature_does_not_open_anothers_checkpoint(
    pair: tuple[Tenant, Tenant, Ids, Ids], fetch: Callable[[str], tuple[int, bytes]]
) -> None:
    zelda, bob, theirs, own = pair
    hers, his = archive(zelda, theirs), archive(bob, own)
    assert fetch(hers)[0] == fetch(his)[0] == 200
    assert fetch(hers)[1] != fetch(his)[1]
    tokens = [urlsplit(url).path.split("/")[-2] for url in (hers, his)]
    payload = tokens[0].split(":")[0]
    signature = tokens[1].split(":", 1)[1]
    spliced = his.replace(tokens[1], f"{payload}:{signature}")
    unknown = his.replace(tokens[1], f"{payload}:{'x' * len(signature)}")
    assert fetch(spliced) == fetch(unknown)
    assert fetch(spliced)[0] == 400


def test_nothing_else_that_the_server_signs_is_a_link(
    pair: tuple[Tenant, Tenant, Ids, Ids], fetch: Callable[[str], tuple[int, bytes]]
) -> None:
    zelda, _, theirs, _ = pair
    url = archive(zelda, theirs)
    token = urlsplit(url).path.split("/")[-2]
    target = signing.loads(token, salt=links._SALT)
    assert target == {
        "checkpoint": Checkpoint.objects.get(run_id=theirs["sdk_model"], kind="training").pk
    }
    for salt in ("django.core.signing", "django.contrib.sessions.backends.signed_cookies"):
        assert fetch(url.replace(token, signing.dumps(target, salt=salt)))[0] == 400


def test_a_link_to_a_trace_tells_of_its_session_only(
    pair: tuple[Tenant, Tenant, Ids, Ids], fetch: Callable[[str], tuple[int, bytes]]
) -> None:
    zelda, _, theirs, own = pair
    path = f"/api/v1/sessions/{theirs['session']}/trace_export"
    url = zelda.ask("GET", path, sdk=True).json()["url"]
    status, body = fetch(url)
    assert status == 200
    assert theirs["session"].encode() in body
    assert own["session"].encode() not in body
