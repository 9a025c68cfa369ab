"""A value that makes no sense stops every command with one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from tests.environment import command_environment
from tinkerapi.config.environment import (
    env_bucket,
    env_database,
    env_hosts,
    env_int,
    env_names,
    env_origins,
    env_url,
)

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = "DATABASE_URL: expected postgresql://USER:PASSWORD@HOST:PORT/NAME, got"


@pytest.mark.parametrize(
    ("command", "environment", "sentence"),
    [
        (
            "up",
            {"TINKERAPI_NUM_THREADS": "x"},
            "TINKERAPI_NUM_THREADS: expected auto or a whole number, got 'x'",
        ),
        (
            "doctor",
            {"TINKERAPI_DEVICE": "gpu"},
            "TINKERAPI_DEVICE: expected one of auto, cpu, cuda, got 'gpu'",
        ),
        (
            "migrate",
            {"TINKERAPI_DEBUG": "perhaps"},
            "TINKERAPI_DEBUG: expected 1 or 0, got 'perhaps'",
        ),
        (
            "up",
            {"TINKERAPI_STORAGE": "gs://bucket"},
            "TINKERAPI_STORAGE: expected s3://BUCKET/PREFIX, got 'gs://bucket'",
        ),
        ("up", {"DATABASE_URL": "garbage"}, f"{EXPECTED} a URL of another kind"),
        (
            "up",
            {"TINKERAPI_BASE_MODELS": "a"},
            "TINKERAPI_BASE_MODELS: no such setting; did you mean TINKERAPI_BASE_MODEL?",
        ),
        (
            "up",
            {"TINKERAPI_RESIDENT_ADAPTERS": "32"},
            "TINKERAPI_RESIDENT_ADAPTERS: replaced by TINKERAPI_ADAPTER_CACHE_BYTES, in bytes; set "
            "that, and unset this",
        ),
        (
            "doctor",
            {"TINKERAPI_CONFIG": "CONFIG", "TINKERAPI_ADAPTER_CACHE_BYTES": "1000000000"},
            "TINKERAPI_ADAPTER_CACHE_BYTES: TINKERAPI_CONFIG is set and replaces it; "
            "unset one of them",
        ),
        (
            "doctor",
            {"TINKERAPI_CONFIG": "/nowhere.toml"},
            "/nowhere.toml cannot be read: No such file or directory",
        ),
        (
            "doctor",
            {"TINKERAPI_CONFIG": "CONFIG", "TINKERAPI_DTYPE": "float32"},
            "TINKERAPI_DTYPE: TINKERAPI_CONFIG is set and replaces it; unset one of them",
        ),
    ],
)
def test_a_setting_that_makes_no_sense_is_one_sentence_of_any_command(
    tmp_path: Path, command: str, environment: dict[str, str], sentence: str
) -> None:
    config = tmp_path / "tinkerapi.toml"
    config.write_text("[[base_model]]\nname = 'some/model'")
    if environment.get("TINKERAPI_CONFIG") == "CONFIG":
        environment = {**environment, "TINKERAPI_CONFIG": str(config)}
    answer = subprocess.run(
        [sys.executable, "manage.py", command],
        cwd=ROOT,
        env=command_environment(tmp_path, environment),
        capture_output=True,
        text=True,
        check=False,
    )

    assert answer.returncode == 1
    assert answer.stderr.splitlines() == [sentence]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("garbage", f"{EXPECTED} a URL of another kind"),
        ("mysql://db/name", f"{EXPECTED} a URL of another kind"),
        ("sqlite://:memory:", f"{EXPECTED} a URL of another kind"),
        ("postgresql://db:notaport/name", f"{EXPECTED} a value that is not a URL"),
        ("postgresql://db:99999/name", f"{EXPECTED} a value that is not a URL"),
        ("postgresql://", f"{EXPECTED} one without a NAME"),
        ("postgresql://db/name?ssl_mode=x", 'DATABASE_URL: invalid connection option "ssl_mode"'),
    ],
)
def test_a_database_url_that_names_no_postgres_is_refused(
    monkeypatch: pytest.MonkeyPatch, url: str, sentence: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)

    with pytest.raises(ImproperlyConfigured) as caught:
        env_database("DATABASE_URL")

    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("postgresql://ada@db:5432/training?sslmode=require", "training"),
        ("postgresql:///?service=training", ""),
    ],
)
def test_a_database_url_that_names_one_is_taken(
    monkeypatch: pytest.MonkeyPatch, url: str, name: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)

    assert env_database("DATABASE_URL")["NAME"] == name


def test_a_password_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("postgresql://ada:s3cret@db:notaport/x", "mysql://ada:s3cret@db/x"):
        monkeypatch.setenv("DATABASE_URL", url)
        with pytest.raises(ImproperlyConfigured) as caught:
            env_database("DATABASE_URL")
        assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(("value", "bound"), [("0", "at least 1"), ("11", "at most 10")])
def test_a_number_has_its_range(monkeypatch: pytest.MonkeyPatch, value: str, bound: str) -> None:
    monkeypatch.setenv("TINKERAPI_N", value)

    with pytest.raises(ImproperlyConfigured, match=f"TINKERAPI_N: expected {bound}, got {value}"):
        env_int("TINKERAPI_N", 1, maximum=10)


def test_no_number_is_too_large_to_compute_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKERAPI_N", "9" * 30)

    with pytest.raises(ImproperlyConfigured, match="expected at most 1000000000"):
        env_int("TINKERAPI_N", 1)


def test_an_origin_has_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKERAPI_O", "https://a.example, http://b.example")
    assert env_origins("TINKERAPI_O") == ["https://a.example", "http://b.example"]

    monkeypatch.setenv("TINKERAPI_O", "a.example")
    with pytest.raises(ImproperlyConfigured, match=r"expected https://HOST, got 'a\.example'"):
        env_origins("TINKERAPI_O")


def test_hosts_are_names_or_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = "train.example, .example, 10.0.0.1, [::1], *"
    monkeypatch.setenv("TINKERAPI_H", hosts)
    assert env_hosts("TINKERAPI_H", "*") == hosts.split(", ")
    for wrong in ("https://a.example", "a.example:8000", "a.example/x", "[::1]:8000"):
        monkeypatch.setenv("TINKERAPI_H", wrong)
        with pytest.raises(ImproperlyConfigured, match="expected host names without scheme"):
            env_hosts("TINKERAPI_H", "*")


@pytest.mark.parametrize("value", [",", " ", " , "])
def test_a_server_without_any_base_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TINKERAPI_BASE_MODEL", value)

    with pytest.raises(ImproperlyConfigured) as caught:
        env_names("TINKERAPI_BASE_MODEL", "some/model")

    assert str(caught.value) == f"TINKERAPI_BASE_MODEL: expected a name, got {value!r}"


def test_an_empty_list_of_base_models_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKERAPI_BASE_MODEL", "")
    assert env_names("TINKERAPI_BASE_MODEL", "some/model") == ["some/model"]

    monkeypatch.setenv("TINKERAPI_BASE_MODEL", "a, b,")
    assert env_names("TINKERAPI_BASE_MODEL", "some/model") == ["a", "b"]


@pytest.mark.parametrize("value", ["example.com", ""])
def test_loopback_may_ask_by_its_own_names_whatever_hosts_are_allowed(
    tmp_path: Path, value: str
) -> None:
    program = (
        "from django.conf import settings; from django.http.request import validate_host;"
        "print(*(validate_host(name, settings.ALLOWED_HOSTS)"
        " for name in ('localhost', '127.0.0.1', '[::1]', 'elsewhere.example')))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=command_environment(tmp_path, {"TINKERAPI_ALLOWED_HOSTS": value}),
        capture_output=True,
        text=True,
        check=True,
    )

    assert answer.stdout.split() == ["True", "True", "True", "False"]


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("", ""),
        ("https://train.example.com", "https://train.example.com"),
        (" HTTPS://Train.example.com/ ", "https://train.example.com"),
        ("http://10.0.0.7:8080", "http://10.0.0.7:8080"),
        ("https://[fd00::1]", "https://[fd00::1]"),
    ],
)
def test_an_address_is_scheme_host_and_port(
    monkeypatch: pytest.MonkeyPatch, value: str, read: str
) -> None:
    monkeypatch.setenv("TINKERAPI_X", value)

    assert env_url("TINKERAPI_X") == read


@pytest.mark.parametrize(
    "value",
    ["a.example", "https://", "https://a/b", "ftp://a", "https://u@a", "http://a b"],
)
def test_an_address_of_another_form_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("TINKERAPI_X", value)

    with pytest.raises(ImproperlyConfigured, match="TINKERAPI_X: expected https://HOST"):
        env_url("TINKERAPI_X")


@pytest.mark.parametrize(
    ("environment", "needs_keys", "has_tls"),
    [
        ({}, False, False),
        ({"TINKERAPI_ALLOWED_HOSTS": "localhost"}, False, False),
        ({"TINKERAPI_ALLOWED_HOSTS": "train.example.com"}, True, False),
        ({"TINKERAPI_CSRF_TRUSTED_ORIGINS": "https://train.example.com"}, True, False),
        ({"TINKERAPI_PUBLIC_URL": "http://train.example.com"}, True, False),
        (
            {"TINKERAPI_PUBLIC_URL": "https://a.example", "TINKERAPI_REQUIRE_API_KEY": "0"},
            True,
            True,
        ),
        ({"TINKERAPI_TLS": "1"}, True, True),
    ],
)
def test_a_server_that_is_named_elsewhere_needs_keys_and_tls_closes_its_cookies(
    tmp_path: Path, environment: dict[str, str], needs_keys: bool, has_tls: bool
) -> None:
    names = "REQUIRE_API_KEY TLS SESSION_COOKIE_SECURE CSRF_COOKIE_SECURE SECURE_HSTS_SECONDS"
    printed = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tinkerapi import settings;"
            f"print([bool(getattr(settings, name)) for name in {names.split()}])",
        ],
        cwd=ROOT,
        env=command_environment(tmp_path, environment),
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert printed.strip() == str([needs_keys, *[has_tls] * 4])


@pytest.mark.parametrize(
    ("given", "bucket"),
    [
        ("", ""),
        ("s3://abc", "s3://abc"),
        (" s3://my.bucket-1/of/run=2/ ", "s3://my.bucket-1/of/run=2"),
        ("s3://ab", None),
        ("s3://Bucket", None),
        ("s3://abc/../other", None),
        ("s3://abc//x", None),
        ("s3://abc/x?versionId=1", None),
        ("https://abc/x", None),
    ],
)
def test_a_bucket_is_named_with_its_prefix(
    monkeypatch: pytest.MonkeyPatch, given: str, bucket: str | None
) -> None:
    monkeypatch.setenv("TINKERAPI_TEST_BUCKET", given)
    if bucket is not None:
        assert env_bucket("TINKERAPI_TEST_BUCKET") == bucket
        return
    with pytest.raises(ImproperlyConfigured, match="expected s3://BUCKET/PREFIX, got"):
        env_bucket("TINKERAPI_TEST_BUCKET")
