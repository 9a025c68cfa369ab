"""The server's own endpoints: description, health, capabilities."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from django.db import OperationalError
from django.urls import get_resolver

from futures.workers import worker_live, worker_start, worker_stop
from tests.isolation.test_routes import addresses
from tinkerapi.api.endpoints import endpoints
from tinkerapi.api.quickref.views import service
from training.base_models import base_model_get
from training.loss_fns import LOSS_FNS


def test_the_index_lists_every_endpoint_by_group(api):
    body = api.get("/").json()

    listed = [entry["path"] for group in body["endpoints"].values() for entry in group]
    assert body["name"] == "tinkerapi"
    assert body["version"]
    assert body["docs"] == "/docs/"
    redirects = {"/favicon.ico", "/docs", "/docs/<slug:name>/", "/api/docs/"}
    of_pages = {"/playground/chat"}  # takes no key, only the session of a page
    served = {f"/{route}" for route in addresses(get_resolver())}
    public = {path for path in served if not path.startswith("/admin")}
    assert set(listed) == public - redirects - of_pages
    assert list(body["endpoints"]) == [
        "Server",
        "Training",
        "Models",
        "Sampling",
        "Weights",
        "Futures",
        "Documents",
        "Tinker SDK",
        "OpenAI's clients",
    ]


def test_every_endpoint_has_a_summary_and_a_method(api):
    for group in api.get("/").json()["endpoints"].values():
        for entry in group:
            assert entry["method"] in ("GET", "POST", "PUT", "DELETE")
            assert len(entry["summary"]) > 10


def test_a_browser_gets_a_page_and_a_program_json(api):
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    page = api.get("/", **browser)
    assert (page.status_code, page["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert page["Vary"] == "Accept"
    for shown in ("curl http://localhost/api/v1/forward_backward", base_model_get(None).name):
        assert shown in page.content.decode()
    for accept in ("*/*", "application/json", ""):
        answer = api.get("/", Accept=accept)
        assert (answer["Content-Type"], answer["Vary"]) == ("application/json", "Accept")
    icon = api.get("/favicon.ico")
    assert (icon.status_code, icon["Location"]) == (302, "/static/tinkerapi/favicon.svg")


def test_the_page_shows_a_key_only_where_one_is_needed(api, settings):
    assert "X-API-Key" not in api.get("/", Accept="text/html").content.decode()
    settings.REQUIRE_API_KEY, settings.PUBLIC_URL = True, "https://train.example.com"
    page = api.get("/", Accept="text/html").content.decode()
    assert "X-API-Key: tml-..." in page.replace("&#x27;", "'")
    assert "curl https://train.example.com/api/v1/forward_backward" in page


def test_the_front_page_needs_no_database(api, monkeypatch):
    def is_down(*args):
        raise OperationalError("down")

    monkeypatch.setattr("training.base_models.worker_figure", is_down)
    assert api.get("/", Accept="text/html").status_code == 200


def test_the_index_says_every_method_that_an_address_takes(api):
    listed = {
        (entry["method"], entry["path"])
        for group in api.get("/").json()["endpoints"].values()
        for entry in group
    }

    assert ("GET", "/v1/models") in listed
    assert ("POST", "/v1/chat/completions") in listed
    assert {method for method, path in listed if path.endswith("/publish")} == {"POST", "DELETE"}
    assert {method for method, path in listed if path.endswith("/project")} == {"PUT"}
    one_model = {method for method, path in listed if path.startswith("/api/v1/adapters/")}
    assert one_model == {"DELETE"}


def test_health_needs_no_database(client, monkeypatch):
    # Without the db fixture pytest-django refuses every query.
    assert client.get("/healthz").json() == {"status": "ok"}


def test_ready_says_what_is_missing(api):
    answer = api.get("/readyz")

    assert answer.status_code == 503
    assert answer["Retry-After"]
    [missing] = answer.json()["missing"]
    assert missing.endswith(": No worker serves this queue at the moment.")


def test_ready_is_200_with_a_live_worker(api, work):
    worker_live(work.worker, figures={})

    answer = api.get("/readyz")

    assert answer.status_code == 200
    workers = {base_model_get(None).name: 1}
    assert answer.json() == {"status": "ready", "missing": [], "workers": workers}


def test_ready_says_that_the_database_is_gone(api, monkeypatch):
    def gone(_):
        raise OperationalError

    monkeypatch.setattr(service, "queue_state", gone)

    assert api.get("/readyz").json()["missing"] == ["the database does not answer"]


def test_capabilities_name_the_base_models_and_the_limits(api, settings):
    body = api.get("/get_server_capabilities").json()

    assert body["supported_models"][0]["model_name"] == settings.BASE_MODELS[0].name
    assert body["limits"]["max_lora_rank"] == settings.MAX_LORA_RANK


def test_the_context_length_is_the_one_that_the_worker_enforces(api, settings, tmp_path):
    """The configuration's until a worker has read the folder, and then that worker's."""
    config = {"max_position_embeddings": 4096, "sliding_window": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    windowed = replace(settings.BASE_MODELS[0], name="windowed", path=str(tmp_path))
    settings.BASE_MODELS = [windowed]

    def told():
        (model,) = api.get("/get_server_capabilities").json()["supported_models"]
        return model["max_context_length"]

    assert told() == 4096  # a window is no limit: the prompt may be longer

    worker = worker_start(queue=base_model_get(None).queue, figures={"max_context_tokens": 24})
    worker_stop(worker)
    assert told() == 24  # the limit that transformers found in the folder
    worker = worker_start(queue=base_model_get(None).queue, figures={})
    assert told() == 24  # the next one is still reading it
    settings.MAX_DATUM_TOKENS = 16
    assert told() == 16  # the server's own limit of one sequence
    worker_stop(worker)


@pytest.mark.parametrize(
    ("figures", "config", "told"),
    [
        ({}, {}, True),
        ({"rotary_switch": None}, {}, True),
        ({"rotary_switch": 4096}, {}, False),
        ({"layout": "padded"}, {}, False),
        ({"device": "cuda"}, {}, False),
        ({}, {"sampler": "vllm"}, False),
        ({}, {"fsdp_size": 2}, False),
    ],
)
def test_log_probabilities_are_exact_where_one_process_computes_all_on_a_cpu(
    api, settings, tmp_path, figures, config, told
):
    base_model = replace(settings.BASE_MODELS[0], name="exact", path=str(tmp_path), **config)
    settings.BASE_MODELS = [base_model]

    def says():
        (model,) = api.get("/get_server_capabilities").json()["supported_models"]
        return model["exact_logprobs"]

    assert says() is None
    figures = {"device": "cpu", "layout": "packed", **figures}
    worker = worker_start(queue=base_model_get(None).queue, figures=figures)
    assert says() is told
    worker_stop(worker)


def test_loss_functions_are_listed_with_inputs_and_defaults(api):
    body = api.get("/list_loss_functions").json()

    assert set(body["loss_functions"]) == {
        name for name, spec in LOSS_FNS.items() if not spec.needs_provenance
    }
    ppo = body["loss_functions"]["ppo"]
    assert ppo["inputs"] == ["target_tokens", "logprobs", "advantages"]
    assert ppo["config"] == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


@pytest.fixture
def openapi(client) -> dict:
    return json.loads(client.get("/api/schema", {"format": "json"}).content)


def test_the_schema_describes_every_endpoint(openapi):
    described = set(openapi["paths"])

    undescribed = {"Documents", "Tinker SDK", "OpenAI's clients"}
    listed = {
        entry["path"]
        for group, entries in endpoints().items()
        if group not in undescribed
        for entry in entries
    }
    assert described == {re.sub(r"<str:(\w+)>", r"{\1}", path) for path in listed}


def test_every_operation_has_an_id_of_its_own_answers_and_an_error_shape(openapi):
    operations = [
        operation for methods in openapi["paths"].values() for operation in methods.values()
    ]
    ids = [operation["operationId"] for operation in operations]

    assert len(ids) == len(set(ids))
    for operation in operations:
        assert operation["summary"]
        assert "200" in operation["responses"]
    for path, methods in openapi["paths"].items():
        if "post" in methods:
            error = methods["post"]["responses"]["400"]["content"]["application/json"]["schema"]
            assert error == {"$ref": "#/components/schemas/Error"}, path


def test_the_examples_of_the_schema_work_as_they_stand(openapi, api, work):
    api.post("/add_lora", model_id="my_model")
    api.post("/save_weights", model_id="my_model", name="first")
    work()
    tried = 0
    for path, methods in openapi["paths"].items():
        body = methods.get("post", {}).get("requestBody")
        if body is None or "async" not in path or "remove" in path or "save_weights_async" in path:
            continue
        if "multipart/form-data" in body["content"]:
            continue  # a file is no example in JSON
        example = body["content"]["application/json"]["example"]
        if "add_lora" in path:
            example = {**example, "model_id": "another"}
        assert api.post(path, **example).status_code == 200, (path, example)
        tried += 1
    assert tried >= 5


def test_the_page_to_try_the_api_loads_nothing_from_elsewhere(client):
    page = client.get("/api/docs").content.decode()

    assert "/static/drf_spectacular_sidecar/" in page
    assert "//cdn" not in page
    assert "https://" not in page
