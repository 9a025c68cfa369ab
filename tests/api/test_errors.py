"""One shape for every error, one row for every domain error, nothing internal in an answer."""

from __future__ import annotations

import json
import logging

import pytest
from django.db import DataError, OperationalError
from rest_framework.exceptions import APIException
from rest_framework.test import APIRequestFactory

from futures.errors import FutureError
from tinkerapi.api.errors import STATUS, exception_handler, failure_status
from tinkerapi.api.quickref.views import runs
from training.errors import RunLost, RunNotFound, TrainingError


def subclasses(base: type) -> list[type]:
    return [base, *(found for child in base.__subclasses__() for found in subclasses(child))]


@pytest.mark.parametrize("error", [*subclasses(TrainingError), *subclasses(FutureError)])
def test_every_domain_error_has_a_row_of_its_own(error):
    assert error in STATUS
    assert 400 <= STATUS[error] < 600


@pytest.mark.parametrize("error", [*subclasses(TrainingError), *subclasses(FutureError)])
def test_every_domain_error_has_the_one_shape(error):
    response = exception_handler(error("the sentence"), {"request": None})

    assert response.status_code == STATUS[error]
    body = json.loads(response.content)
    assert body["detail"] == "the sentence"
    assert body["error_code"] == error.__name__
    assert body["category"] in ("user", "server")


def test_an_error_without_a_message_says_what_its_class_means():
    response = exception_handler(RunNotFound(), {"request": None})

    assert b"No model of this name exists." in response.content


def test_whose_fault_it_is_comes_from_the_domain_error():
    response = exception_handler(RunLost(), {"request": None})

    assert response.status_code == 410
    assert b'"category":"server"' in response.content


@pytest.mark.parametrize("error", subclasses(TrainingError))
def test_a_failure_has_the_status_of_its_error_unless_the_server_is_to_blame(error):
    status = failure_status(error.category, error.__name__)

    assert status == (STATUS[error] if error.category == "user" else 500)
    assert (status < 500) is (error.category == "user")


@pytest.mark.parametrize("category", ["user", "server", "unknown"])
def test_a_failure_without_a_known_error_is_a_400_only_if_it_is_the_users(category):
    assert failure_status(category, "") == (400 if category == "user" else 500)


def test_an_unplanned_exception_answers_a_log_id_and_none_of_its_text(api, monkeypatch, caplog):
    def explode(**_):
        raise RuntimeError("the password is hunter2")

    monkeypatch.setattr(runs, "run_list", explode)

    answer = api.get("/api/v1/adapters")

    assert answer.status_code == 500
    body = answer.json()
    assert body["error_code"] == "ServerError"
    assert body["category"] == "server"
    assert body["log_id"] in body["detail"]
    assert "hunter2" not in answer.content.decode()
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR and r.exc_info]
    assert body["log_id"] in record.getMessage()


def test_a_database_that_does_not_answer_is_a_503_with_retry_after(api, monkeypatch):
    def gone(**_):
        raise OperationalError("connection refused: host=10.0.0.1 password=x")

    monkeypatch.setattr(runs, "run_list", gone)

    answer = api.get("/api/v1/adapters")

    assert answer.status_code == 503
    assert answer["Retry-After"]
    assert "10.0.0.1" not in answer.content.decode()
    assert answer.json()["category"] == "server"


def test_an_answer_of_500_that_is_no_surprise_leaves_the_log_alone(api, work, caplog):
    for _ in range(2):
        api.post("/fwdbwd", model_id="m", data=[[{"role": "user", "content": "hi"}]])
        request_id = api.post("/save_weights", model_id="m", name="taken").json()["request_id"]
    work()
    caplog.clear()

    assert api.post("/retrieve_future", request_id=request_id).status_code == 500
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_host_that_is_not_allowed_is_a_400_in_json(api, settings):
    settings.ALLOWED_HOSTS = ["training.example"]

    answer = api.get("/healthz")

    assert answer.status_code == 400


def test_every_http_error_of_the_framework_has_the_one_shape():
    for error in subclasses(APIException):
        if error.__module__.startswith("rest_framework"):
            continue
        response = exception_handler(error(), {"request": APIRequestFactory().get("/")})
        assert set(json.loads(response.content)) == {"detail", "error_code", "category"}


@pytest.mark.parametrize(
    "cause",
    [
        DataError("text fields cannot contain NUL (0x00) bytes"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    ],
)
def test_a_value_that_cannot_be_stored_is_its_senders(api, monkeypatch, cause):
    def refuse(**_):
        raise cause

    monkeypatch.setattr(runs, "run_list", refuse)

    answer = api.get("/api/v1/adapters")

    assert answer.status_code == 400
    assert answer.json()["error_code"] == "InvalidRequest"
    assert "cannot be stored" in answer.json()["detail"]
