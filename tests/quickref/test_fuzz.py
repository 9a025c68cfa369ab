"""Requests made from the OpenAPI description, good ones and broken ones, on every operation.

Checked is what the description promises: no server error, only documented statuses, answers
that fit their schema. The one 500 it documents, a failed job, cannot happen here: no worker
runs, so no job fails, and every 5xx is a bug. Requests name a model that exists, so that good
ones get past the parser. The examples are the same at every run.
"""

from __future__ import annotations

import pytest
import requests
import schemathesis
from django.test import Client
from drf_spectacular.generators import SchemaGenerator
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.transport import Response
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from futures.workers import worker_live
from tests.conftest import ApiClient, local_client

EXAMPLES = 10

CHECKS = (
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
)

SCHEMA = schemathesis.openapi.from_dict(SchemaGenerator().get_schema(request=None, public=True))

OPERATIONS = {
    f"{operation.method.upper()} {operation.path}": operation
    for operation in (result.ok() for result in SCHEMA.get_all_operations())
}


def send(client: Client, case: schemathesis.Case) -> Response:
    """Through Django instead of a socket."""
    request = requests.Request(**case.as_transport_kwargs(base_url="http://localhost")).prepare()
    headers = dict(request.headers)
    body = request.body or b""
    answer = client.generic(
        case.method,
        request.path_url,
        body if isinstance(body, bytes) else body.encode(),
        content_type=headers.pop("Content-Type", ""),
        headers={name: str(value) for name, value in headers.items() if name != "Content-Length"},
    )
    return Response(
        status_code=answer.status_code,
        headers={name.lower(): [value] for name, value in answer.items()},
        content=answer.content,
        request=request,
        elapsed=0.0,
        verify=False,
    )


@pytest.fixture
def client(api, work) -> Client:
    """A client of a server with one model and a worker that does nothing."""
    worker_live(work.worker, {})
    api.post("/add_lora", model_id="m")
    return api.client


@pytest.fixture
def waiting_client(transactional_db, work, settings) -> Client:
    """Likewise, for calls that wait: their waits end at once."""
    worker_live(work.worker, {})
    settings.SYNC_TIMEOUT_SECONDS = 0
    client = local_client(raise_request_exception=False)
    ApiClient(client).post("/add_lora", model_id="m")
    return client


WAITING = [name for name in OPERATIONS if f"{name}_async" in OPERATIONS]
WAITING.append("POST /api/v1/sample")
WAITING.append("DELETE /api/v1/adapters/{model_id}")

GOOD = [(name, GenerationMode.POSITIVE) for name in OPERATIONS if name not in WAITING]

# Without a body there is nothing to break, and an operation's addresses share one parser.
BROKEN = [
    (name, GenerationMode.NEGATIVE)
    for name in OPERATIONS
    if name.endswith(("async", "asample", "_future", "get_info"))
]


def fuzz(client: Client, name: str, mode: GenerationMode) -> None:
    """Send what the description allows (positive) or forbids (negative); check each answer."""

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=OPERATIONS[name].as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model_id"), str):
            case.body["model_id"] = "m"
        case.validate_response(send(client, case), checks=CHECKS)

    run()


@pytest.mark.parametrize(("name", "mode"), [*GOOD, *BROKEN])
def test_answers_are_what_the_description_promises(client, name, mode):
    fuzz(client, name, mode)


@pytest.mark.parametrize("name", WAITING)
def test_answers_of_waiting_calls_are_what_the_description_promises(waiting_client, name):
    fuzz(waiting_client, name, GenerationMode.POSITIVE)
