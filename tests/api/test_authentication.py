"""Keys, and the requests from this machine that may go without one."""

from __future__ import annotations

import logging

import pytest
from django.contrib.auth.models import User

from tests.api.test_asgi import call
from tinkerapi.services import api_key_create, api_key_revoke

URL = "/api/v1/adapters"


@pytest.fixture
def key(db) -> str:
    _, key = api_key_create(user=User.objects.create_user("ada"), name="laptop")
    return key


@pytest.mark.parametrize("header", ["X-API-Key", "Authorization"])
def test_a_key_opens_the_door_in_either_header(api, key, header):
    value = f"Bearer {key}" if header == "Authorization" else key

    assert api.get(URL, **{header: value}).status_code == 200


@pytest.mark.parametrize("header", ["X-API-Key", "Authorization"])
def test_a_wrong_key_is_a_401_even_where_none_is_needed(api, header):
    value = "Bearer tml-wrong" if header == "Authorization" else "tml-wrong"

    answer = api.get(URL, **{header: value})

    assert answer.status_code == 401
    assert answer["WWW-Authenticate"] == 'Bearer realm="tinkerapi"'
    assert answer.json()["error_code"] == "AuthenticationFailed"


def test_an_empty_key_is_a_wrong_key(api):
    assert api.get(URL, **{"X-API-Key": ""}).status_code == 401


def test_a_revoked_key_is_a_401(api, key):
    api_key_revoke(api_key_id=User.objects.get(username="ada").api_keys.get().pk)

    assert api.get(URL, **{"X-API-Key": key}).status_code == 401


def test_a_key_speaks_for_its_user_and_sees_nothing_of_others(api, key):
    api.post("/add_lora", model_id="mine")

    listed = api.get(URL, **{"X-API-Key": key}).json()["adapters"]
    described = api.post("/get_info", model_id="mine", headers={"X-API-Key": key})

    assert listed == []
    assert described.status_code == 404


def test_another_users_future_answers_as_one_that_does_not_exist(api, key):
    request_id = api.post("/add_lora", model_id="mine").json()["request_id"]

    theirs = api.post("/retrieve_future", request_id=request_id, headers={"X-API-Key": key})
    nobodys = api.post("/retrieve_future", request_id="future_0", headers={"X-API-Key": key})

    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.content.decode().replace(request_id, "future_0") == nobodys.content.decode()


def test_a_local_request_without_a_key_acts_as_the_user_local(api):
    api.post("/add_lora", model_id="mine")

    assert User.objects.get(username="local").run_set.get().name == "mine"


def test_the_user_local_cannot_log_in_with_a_password(api):
    api.get(URL)

    assert not User.objects.get(username="local").check_password("")


def test_an_inactive_user_local_closes_the_keyless_door(api):
    User.objects.create_user("local", is_active=False)

    assert api.get(URL).status_code == 401


def test_the_setting_demands_a_key_of_everybody(api, key, settings):
    settings.REQUIRE_API_KEY = True

    assert api.get(URL).status_code == 401
    assert api.get(URL, **{"X-API-Key": key}).status_code == 200


@pytest.mark.parametrize("address", ["10.0.0.7", "::ffff:10.0.0.7", "", "unix"])
def test_a_request_from_elsewhere_needs_a_key(api, key, address):
    assert api.client.get(URL, REMOTE_ADDR=address).status_code == 401
    with_key = api.client.get(URL, REMOTE_ADDR=address, headers={"X-API-Key": key})
    assert with_key.status_code == 200


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_every_loopback_address_is_this_machine(api, address):
    assert api.client.get(URL, REMOTE_ADDR=address).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        *("X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Prefix"),
        *("Forwarded", "X-Real-IP", "Via", "CF-Connecting-IP", "CF-Ray", "True-Client-IP"),
        *("X-Client-IP", "Tailscale-User-Login", "Fly-Client-IP", "CDN-Loop", "X-Original-URL"),
    ],
)
def test_a_request_through_a_proxy_needs_a_key(api, header):
    answer = api.get(URL, **{header: "127.0.0.1"})

    assert answer.status_code == 401
    assert header.lower() in answer.json()["detail"].lower()


@pytest.mark.parametrize("version", ["1", "1.0"])
def test_http_1_0_is_a_proxys(transactional_db, key, version):
    """nginx uses it by default for its upstream servers; programs do not."""

    def status(http_version: str, **headers: str) -> int:
        headers |= {"host": "localhost"}
        return call(URL, method="GET", headers=headers, body=[b""], http_version=http_version)[0]

    assert status("1.1") == 200
    assert status(version) == 401
    assert status(version, **{"x-api-key": key}) == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "testserver",
        "127.0.0.1.nip.io",
    ],
)
def test_a_page_that_points_its_own_name_here_needs_a_key(api, host):
    answer = api.get(URL, Host=host)

    assert answer.status_code == 401
    assert host in answer.json()["detail"]


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_names_of_this_machine_are_good(api, host):
    assert api.get(URL, Host=host).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "["])
def test_a_page_of_another_origin_needs_a_key(api, key, origin):
    headers = {"Host": "localhost:8000", "Origin": origin}

    refused = api.get(URL, **headers)
    assert refused.status_code == 403
    assert f"A web page of '{origin}' may not use this server" in refused.json()["detail"]
    assert api.get(URL, **headers, **{"X-API-Key": key}).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "nonsense", ""])
def test_a_browser_that_names_another_site_needs_a_key(api, key, site):
    """As for an image in a page: its request has no Origin header."""
    headers = {"Host": "localhost:8000", "Sec-Fetch-Site": site}

    refused = api.post("/add_lora", model_id="m", headers=headers)
    assert refused.status_code == 403
    assert "A web page of another site" in refused.json()["detail"]
    assert api.get(URL, **headers, **{"X-API-Key": key}).status_code == 200


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_a_page_of_this_server_may_try_the_api(api, site):
    origin = {"Origin": "http://localhost:8000"} if site == "same-origin" else {}
    headers = {"Host": "localhost:8000", "Sec-Fetch-Site": site, **origin}

    assert api.get(URL, **headers).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "multipart/form-data; boundary=x"])
def test_what_a_page_can_send_without_asking_is_refused(api, content_type):
    body = b'{"model_id": "m"}'

    answer = api.client.post("/add_lora", body, content_type=content_type)

    assert answer.status_code == 415


@pytest.mark.parametrize("path", ["/", "/healthz", "/api/schema", "/api/docs", "/docs/"])
def test_what_describes_the_server_needs_no_key(api, settings, path):
    settings.REQUIRE_API_KEY = True

    assert api.get(path).status_code == 200


def test_no_key_is_ever_logged(api, key, caplog):
    caplog.set_level(logging.DEBUG)

    api.get(URL, **{"X-API-Key": key})
    api.get(URL, **{"X-API-Key": "tml-a-wrong-one"})
    api.post("/retrieve_future", request_id="future_0", headers={"X-API-Key": key})

    logged = caplog.text
    assert key not in logged
    assert "tml-a-wrong-one" not in logged
