"""Keys and the tokens that stand for them."""

from __future__ import annotations

import base64
import json

import pytest
from django.conf import LazySettings
from tinker.lib._jwt_auth import jwt_claims

from tests.conftest import ApiClient
from tests.sdk.conftest import SdkClient
from tinkerapi import tokens
from tinkerapi.models import ApiKey


@pytest.fixture
def with_tokens(settings: LazySettings) -> None:
    settings.SDK_JWT = True


@pytest.fixture
def token(sdk: SdkClient, with_tokens: None) -> str:
    return str(sdk.post("auth/token").json()["jwt"])


def status(api: ApiClient, credential: str) -> int:
    answer = api.get("/api/v1/auth/apikey/me", **{"X-API-Key": credential})
    return int(answer.status_code)


def test_a_key_describes_itself_in_the_words_of_the_cli(sdk: SdkClient) -> None:
    body = sdk.api.get("/api/v1/auth/apikey/me", **sdk.headers).json()

    assert body == {
        "key_id": ApiKey.objects.get().pk,
        "name": "laptop",
        "note": "",
        "details": {
            "org_details": {"name": "tinkerapi"},
            "user_details": {"email": "researcher"},
        },
    }


def test_a_key_can_close_itself(sdk: SdkClient) -> None:
    assert sdk.api.delete("/api/v1/auth/apikey/me", **sdk.headers).status_code == 204
    assert status(sdk.api, sdk.headers["X-API-Key"]) == 401


def test_without_the_setting_there_are_no_tokens(sdk: SdkClient) -> None:
    assert sdk.post("auth/token").status_code == 404
    issued = tokens.token_issue(ApiKey.objects.get())
    assert status(sdk.api, issued) == 401


def test_a_token_speaks_for_its_keys_owner_in_the_sdks_own_reading(
    sdk: SdkClient, token: str
) -> None:
    claims = jwt_claims(token)

    assert claims["sub"] == "tml:user:researcher"
    assert claims["exp"] - claims["iat"] == tokens.LIFETIME_SECONDS
    assert status(sdk.api, token) == 200


def test_a_token_ends_with_its_time_and_with_its_key(
    sdk: SdkClient, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = jwt_claims(token)["exp"]
    with monkeypatch.context() as patch:
        patch.setattr(tokens.time, "time", lambda: end)
        assert status(sdk.api, token) == 401
    assert status(sdk.api, token) == 200

    sdk.api.delete("/api/v1/auth/apikey/me", **sdk.headers)

    answer = sdk.api.get("/api/v1/auth/apikey/me", **{"X-API-Key": token})
    assert answer.status_code == 401
    assert 'error="invalid_token"' in answer["WWW-Authenticate"]


def test_a_token_buys_no_token_and_a_key_does(sdk: SdkClient, token: str) -> None:
    with_token = {**sdk.headers, "X-API-Key": token}
    refused = sdk.api.post("/api/v1/auth/token", headers=with_token)

    assert refused.status_code == 403
    assert "jwt" not in refused.json()
    bearer = {"Authorization": f"Bearer {token}"}
    assert sdk.api.post("/api/v1/auth/token", headers=bearer).status_code == 403
    assert sdk.post("auth/token").status_code == 200
    assert sdk.api.get("/api/v1/auth/apikey/me", **with_token).json()["name"] == "laptop"


def encoded(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_a_token_of_any_other_making_is_refused(sdk: SdkClient, token: str) -> None:
    header, payload, signature = token.split(".")
    forged = encoded({**jwt_claims(token), "key_id": 10**6})
    none = encoded({"alg": "none", "typ": "JWT"})

    for wrong in (
        f"{header}.{forged}.{signature}",
        f"{none}.{payload}.",
        f"{none}.{payload}.{signature}",
        f"{header}.{payload}.",
        f"{header}.{payload}",
        f"{header}.{payload}.{signature}x",
        "eyJ",
        "eyJ..",
        "eyJ.\udcff.x",
    ):
        assert tokens.token_verify(wrong) is None
