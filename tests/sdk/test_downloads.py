"""Links to files: they need no key, expire, and send the file, whole or in part."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from asgiref.sync import async_to_sync
from django.core import signing
from django.test import AsyncClient
from django.utils import timezone

from tests.conftest import InProcessWorker
from tests.sdk.conftest import SdkClient
from tinkerapi.api import streaming
from training.models import Checkpoint


@pytest.fixture
def model_id(sdk: SdkClient, work: InProcessWorker) -> str:
    """A model with ``weights/a`` and ``external_weights/a``."""
    model_id = sdk.model()
    sdk.post("save_weights", model_id=model_id, seq_id=1, path="a")
    sdk.post("save_weights_external", model_id=model_id, seq_id=2, path="a")
    work()
    return model_id


@pytest.fixture
def fetch(db: None) -> Callable[..., tuple[Any, bytes]]:
    """``fetch(url, Range="bytes=0-1")``: the answer to a bare request, and its whole body."""

    async def send(url: str, method: str, headers: dict[str, str]) -> tuple[Any, bytes]:
        response = await getattr(AsyncClient(), method)(urlsplit(url).path, headers=headers)
        if not response.streaming:
            return response, response.content
        return response, b"".join([piece async for piece in response])

    def fetch(url: str, method: str = "get", **headers: str) -> tuple[Any, bytes]:
        return async_to_sync(send)(
            url, method, {name.replace("_", "-"): value for name, value in headers.items()}
        )

    return fetch


def links(sdk: SdkClient, model_id: str) -> Any:
    path = f"training_runs/{model_id}/checkpoints/external_weights/a/external_weights_urls"
    return sdk.api.get(f"/api/v1/{path}", **sdk.headers).json()


def folder(kind: str, settings: Any) -> Path:
    directory = Checkpoint.objects.get(kind=kind).directory
    return Path(settings.DATA_DIR / directory)


def test_every_file_is_sent_to_whoever_has_its_link(
    sdk: SdkClient, model_id: str, fetch: Callable[..., Any], settings: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(streaming, "PIECE_BYTES", 7)
    body = links(sdk, model_id)

    assert datetime.fromisoformat(body["expires"]) > timezone.now()
    on_disk = {path.name: path.read_bytes() for path in folder("external", settings).iterdir()}
    assert set(body["urls"]) == set(on_disk)
    for name, url in body["urls"].items():
        response, content = fetch(url)
        assert response.status_code == 200
        assert content == on_disk[name]
        assert response["Content-Length"] == str(len(content))


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-3", slice(0, 4)),
        ("bytes=2-", slice(2, None)),
        ("bytes=-5", slice(-5, None)),
        ("bytes=1-999999999", slice(1, None)),
    ],
)
def test_a_range_is_sent_alone(
    sdk: SdkClient,
    model_id: str,
    fetch: Callable[..., Any],
    settings: Any,
    asked: str,
    part: slice,
) -> None:
    url = links(sdk, model_id)["urls"]["adapter_model.safetensors"]
    whole = (folder("external", settings) / "adapter_model.safetensors").read_bytes()

    response, content = fetch(url, Range=asked)
    assert response.status_code == 206
    assert content == whole[part]
    begin, end, _ = part.indices(len(whole))
    assert response["Content-Range"] == f"bytes {begin}-{end - 1}/{len(whole)}"
    assert response["Content-Length"] == str(len(content))


def test_a_range_outside_is_416_and_one_we_do_not_serve_is_the_whole(
    sdk: SdkClient, model_id: str, fetch: Callable[..., Any], settings: Any
) -> None:
    url = links(sdk, model_id)["urls"]["adapter_model.safetensors"]
    whole = (folder("external", settings) / "adapter_model.safetensors").read_bytes()

    response, _ = fetch(url, Range=f"bytes={len(whole)}-")
    assert (response.status_code, response["Content-Range"]) == (416, f"bytes */{len(whole)}")
    for asked in ("bytes=0-1,3-4", "items=0-1", "bytes=-"):
        assert fetch(url, Range=asked)[1] == whole


def test_what_the_client_has_is_not_sent_again(
    sdk: SdkClient, model_id: str, fetch: Callable[..., Any]
) -> None:
    url = links(sdk, model_id)["urls"]["adapter_model.safetensors"]
    head, nothing = fetch(url, "head")
    whole = fetch(url)[1]

    assert (nothing, head["Content-Length"]) == (b"", str(len(whole)))
    assert fetch(url, If_None_Match=head["ETag"])[0].status_code == 304
    assert fetch(url, Range="bytes=0-0", If_Range=head["ETag"])[1] == whole[:1]
    assert fetch(url, Range="bytes=0-0", If_Range='"another"')[1] == whole


def test_a_link_that_is_changed_old_or_of_something_deleted_opens_nothing(
    sdk: SdkClient, model_id: str, fetch: Callable[..., Any], monkeypatch: Any
) -> None:
    url = links(sdk, model_id)["urls"]["adapter_model.safetensors"]
    token = url.split("/")[-2]
    forged = signing.dumps({"checkpoint": 1, "file": "../../secret_key"}, key="x")

    assert fetch(url.replace(token, token[:-1] + "?"))[0].status_code in (400, 404)
    assert fetch(url.replace(token, forged))[0].status_code == 400
    with monkeypatch.context() as patched:
        later = timezone.now().timestamp() + 3601
        patched.setattr("django.core.signing.time.time", lambda: later)
        response, _ = fetch(url)
    assert response.status_code == 400
    assert "expired" in response.json()["detail"]
    Checkpoint.objects.filter(kind="external").delete()
    assert fetch(url)[0].status_code == 404


def test_an_archive_is_a_tar_of_the_checkpoint(
    sdk: SdkClient, model_id: str, fetch: Callable[..., Any], settings: Any
) -> None:
    path = f"/api/v1/training_runs/{model_id}/checkpoints/weights/a/archive"
    url = sdk.api.get(path, **sdk.headers).json()["url"]
    response, content = fetch(url)

    assert response["Content-Length"] == str(len(content))
    head, nothing = fetch(url, "head")
    assert (nothing, head["Content-Length"]) == (b"", str(len(content)))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        packed = {member.name: archive.extractfile(member).read() for member in archive}
    on_disk = {path.name: path.read_bytes() for path in folder("training", settings).iterdir()}
    assert packed == on_disk


def test_a_client_of_the_redirect_is_redirected_to_the_same_archive(
    sdk: SdkClient, model_id: str, fetch: Callable[..., Any]
) -> None:
    path = f"/api/v1/training_runs/{model_id}/checkpoints/weights/a/archive"
    answer = sdk.api.get(path, **sdk.headers, Accept="application/gzip")

    assert answer.status_code == 302
    expires = datetime.strptime(answer["Expires"], "%a, %d %b %Y %H:%M:%S GMT")
    assert expires.replace(tzinfo=UTC) > timezone.now()
    with tarfile.open(fileobj=io.BytesIO(fetch(answer["Location"])[1])) as archive:
        assert archive.getnames()


def test_a_trace_shows_every_finished_request_of_the_session(
    sdk: SdkClient, model_id: str, fetch: Callable[..., Any]
) -> None:
    session_id = model_id.partition(":")[0]
    answer = sdk.api.get(f"/api/v1/sessions/{session_id}/trace_export", **sdk.headers).json()
    assert answer["status"] == "ready"

    response, body = fetch(answer["url"])
    assert response["Content-Type"] == "application/json"
    assert fetch(answer["url"], "head")[1] == b""
    trace = json.loads(body)
    bars = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {bar["name"] for bar in bars} == {"create_run", "save_weights"}
    assert sorted(bar["args"]["seq_id"] for bar in bars) == [0, 1, 2]
    assert all(bar["dur"] >= 0 and bar["args"]["waited_seconds"] >= 0 for bar in bars)
