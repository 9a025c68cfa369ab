"""Which dialect a request at a shared address speaks."""

from __future__ import annotations

import pytest
from django.test import RequestFactory

from tests.conftest import ApiClient
from tinkerapi.api.dialect import PROTOBUF
from tinkerapi.api.sdk.dispatch import speaks_sdk

JSON = "application/json"
SDK = {"X-Stainless-Package-Version": "0.38.0"}


@pytest.mark.parametrize(
    ("body", "content_type", "headers", "expected"),
    [
        (b"{}", JSON, SDK, True),
        (b"?", PROTOBUF, {}, True),
        (b'{"seq_id": 1}', JSON, {}, True),
        (b'{"data": [{"seq_id": 1}]}', JSON, {}, False),
        (b'{"model_id": "m"}', JSON, {}, False),
        (b'{"seq_id": ', JSON, {}, False),
        (b'["seq_id"]', JSON, {}, False),
        (b"", "", {}, False),
    ],
)
def test_headers_and_the_number_tell_the_dialect(
    body: bytes, content_type: str, headers: dict[str, str], expected: bool
) -> None:
    request = RequestFactory().post("/", body, content_type=content_type, headers=headers)

    assert speaks_sdk(request) is expected


def test_a_body_that_is_too_large_is_the_quick_references_to_refuse(settings) -> None:
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 10
    request = RequestFactory().post("/", b'{"seq_id": 1}', content_type=JSON)

    assert not speaks_sdk(request)


def test_the_quick_reference_still_has_its_answers_at_the_shared_addresses(
    served_api: ApiClient,
) -> None:
    hi = [[{"role": "user", "content": "hi"}]]
    answer = served_api.post("/api/v1/forward_backward", model_id="m", data=hi)

    assert answer.status_code == 200
    assert {"loss", "num_samples", "backend"} <= set(answer.json())
