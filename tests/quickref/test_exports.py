"""A quick-reference model as files for peft: asked for by name, fetched by link."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

HI = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
EXPORT = "/api/v1/training_runs/m/checkpoints/external_weights/out/external_weights_urls"


@pytest.fixture
def exported(served_api):
    served_api.post("/api/v1/forward_backward", model_id="m", data=HI)
    answer = served_api.post("/api/v1/save_weights_external", model_id="m", name="out")
    return answer.json()


def test_a_model_is_exported_and_its_files_are_linked_to(served_api, exported, settings):
    assert exported["path"] == "tinker://m/external_weights/out"
    urls = served_api.get(EXPORT).json()["urls"]
    assert "adapter_model.safetensors" in urls
    link = urlsplit(urls["adapter_model.safetensors"]).path
    assert served_api.client.head(link).status_code == 200


def test_a_checkpoint_is_exported_through_a_model_that_loads_it(served_api, exported):
    saved = served_api.post("/api/v1/save_weights", model_id="m", name="kept").json()["path"]
    served_api.post("/api/v1/add_lora", model_id="copy")
    served_api.post("/api/v1/load_weights", model_id="copy", path=saved)
    answer = served_api.post("/api/v1/save_weights_external", model_id="copy", name="out")
    assert answer.status_code == 200
    assert (
        "adapter_model.safetensors"
        in served_api.get(EXPORT.replace("/m/", "/copy/")).json()["urls"]
    )


def test_a_taken_name_is_replaced_when_that_is_asked_for(served_api, exported):
    again = served_api.post("/api/v1/save_weights_external", model_id="m", name="out")
    assert again.status_code == 409
    assert "send overwrite: true to replace it" in again.json()["detail"]
    again = served_api.post(
        "/api/v1/save_weights_external", model_id="m", name="out", overwrite=True
    )
    assert again.status_code == 200
