"""The SDK's dialect over HTTP, with the SDK's own encoders and headers."""

from __future__ import annotations

from typing import Any

import pytest
import zstandard
from django.contrib.auth import get_user_model

from tests.conftest import ApiClient
from tests.sdk.official_sdk import sdk_body, sdk_datum
from tinkerapi.api.dialect import PROTOBUF
from tinkerapi.api.sdk import tinker_public_pb2 as pb
from tinkerapi.services import api_key_create
from training.base_models import base_model_get


class SdkClient:
    """The SDK's HTTP requests, call by call."""

    def __init__(self, api: ApiClient, key: str) -> None:
        self.api = api
        self.headers = {"X-Stainless-Package-Version": "0.38.0", "X-API-Key": key}

    @classmethod
    def with_new_key(cls, api: ApiClient) -> SdkClient:
        """A client of a new user."""
        user = get_user_model().objects.create_user("researcher")
        _, key = api_key_create(user=user, name="laptop")
        return cls(api, key)

    def post(self, path: str, /, **body: object) -> Any:
        """A JSON call; the answer as it is."""
        return self.api.post(f"/api/v1/{path}", headers=self.headers, **body)

    def session(self) -> str:
        answer = self.post("create_session", tags=[], user_metadata={}, sdk_version="0.38.0")
        return str(answer.json()["session_id"])

    def model(self, session_id: str | None = None, number: int = 0, **more: object) -> str:
        """Ask for a model; its id."""
        fields = {
            "session_id": session_id or self.session(),
            "model_seq_id": number,
            "base_model": base_model_get(None).name,
            "lora_config": {"rank": 4},
            "optimizer_config": {"type": "adamw"},
            "type": "create_model",
        }
        answer = self.post("create_model", **{**fields, **more})
        assert answer.status_code == 200, answer.content
        return str(answer.json()["model_id"])

    def forward_backward(
        self, model_id: str, seq_id: int, data: Any = None, *, zstd: bool = False, **more: Any
    ) -> Any:
        """Protobuf, as the SDK encodes it; by default one good datum."""
        if data is None:
            data = [sdk_datum([1, 2, 3], target_tokens=[2, 3, 4], weights=[1.0, 1.0, 1.0])]
        body = sdk_body(data, model_id=model_id, seq_id=seq_id, **more)
        headers = {**self.headers, "Content-Encoding": "zstd"} if zstd else self.headers
        return self.api.client.post(
            "/api/v1/forward_backward",
            zstandard.ZstdCompressor().compress(body) if zstd else body,
            content_type=PROTOBUF,
            headers=headers,
        )

    def optim_step(self, model_id: str, seq_id: int, **params: Any) -> Any:
        return self.post("optim_step", model_id=model_id, seq_id=seq_id, adam_params=params)

    def retrieve(self, answer: Any, *, accept: str = "application/json", **more: Any) -> Any:
        """The future of a submission's answer."""
        assert answer.status_code == 200, answer.content
        return self.api.post(
            "/api/v1/retrieve_future",
            headers={**self.headers, "Accept": accept},
            request_id=answer.json()["request_id"],
            **more,
        )

    def result(self, answer: Any) -> Any:
        """A finished forward_backward's protobuf message, or another operation's JSON."""
        retrieved = self.retrieve(answer, accept=PROTOBUF)
        assert retrieved.status_code == 200, retrieved.content
        if retrieved["Content-Type"] == PROTOBUF:
            return pb.ForwardBackwardOutput.FromString(retrieved.content)
        return retrieved.json()


@pytest.fixture
def sdk(api: ApiClient) -> SdkClient:
    return SdkClient.with_new_key(api)
