"""The manual's tables of the SDK's fields and versions: complete, and true."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from tests.compat import cookbook, old_clients
from tests.compat.sdk_fields import documented_fates, fields_table, request_fields
from tests.compat.tables import read_table
from tests.sdk.conftest import SdkClient
from tinkerapi.api.fields.field import Field
from tinkerapi.api.sdk.views import models, sampling, service, weights
from training.base_models import base_model_get

FATES = documented_fates()
PLACE = {"model_id", "seq_id"}
"""The fields that the views of numbered requests read first."""
VIEWS: Mapping[str, Mapping[str, Field]] = {
    "CopyWeightsRequest": weights.CopyWeightsView.fields,
    "CreateModelRequest": models.CreateModelView.fields,
    "CreateSamplingSessionRequest": sampling.CreateSamplingSessionView.fields,
    "CreateSessionRequest": service.CreateSessionView.fields,
    "FuturesRetrieveRequest": sampling.RetrieveFuturesView.fields,
    "LoadWeightsRequest": weights.LoadWeightsView.creation_fields,
    "SampleRequest": sampling.SampleView.fields,
    "SaveWeightsExternalRequest": weights.SaveWeightsExternalView.fields,
    "SaveWeightsForSamplerRequest": weights.SaveWeightsForSamplerView.fields,
    "SaveWeightsRequest": weights.SaveWeightsView.fields,
}
DIMUON = {"type": "dimuon", "version": 1}


def test_the_table_has_every_field_of_the_sdk_and_no_other() -> None:
    fields = list(request_fields())

    assert len(fields) > 100
    assert set(FATES) == set(fields)
    assert {fate for fate, _ in FATES.values()} == {"honoured", "refused", "without effect"}
    assert read_table("fields") == fields_table(FATES)


def test_the_other_tables_say_what_was_measured() -> None:
    versions = json.loads(old_clients.RESULTS.read_text())["versions"]
    recipes = json.loads(cookbook.RESULTS.read_text())["recipes"]

    assert read_table("versions") == old_clients.compatibility_table(versions)
    assert read_table("recipes") == cookbook.recipe_table(recipes)


@pytest.mark.parametrize("model", VIEWS)
def test_a_view_knows_the_fields_that_the_table_does_not_call_refused(model: str) -> None:
    served = {field for (name, field), (fate, _) in FATES.items() if name == model} - {
        field
        for (name, field), (fate, remark) in FATES.items()
        if name == model and fate == "refused" and "unknown field" in remark
    }

    assert served - PLACE == set(VIEWS[model]) - PLACE - {"after"}


def remark(model: str, field: str) -> str:
    """The sentence that the table quotes."""
    fate, text = FATES[model, field]
    assert fate == "refused"
    return text.split("`")[1]


def sample(**more: Any) -> dict[str, Any]:
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    fields = {"sampling_session_id": "s:sample:0", "seq_id": 0, "prompt": prompt}
    return {**fields, "sampling_params": {}, **more}


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("model", "field", "body"),
    [
        ("SampleRequest", "base_model", sample(base_model="tiny")),
        ("SampleRequest", "model_path", sample(model_path="tinker://r/weights/a")),
        ("DmelChunk", "dmel", sample(prompt={"chunks": [{"type": "dmel", "dmel": "AA=="}]})),
        (
            "ImageAssetPointerChunk",
            "location",
            sample(prompt={"chunks": [{"type": "image_asset_pointer", "location": "x"}]}),
        ),
    ],
)
def test_a_sample_is_refused_with_the_sentence_of_the_table(
    sdk: SdkClient, model: str, field: str, body: dict[str, Any]
) -> None:
    answer = sdk.post("asample", **body)

    assert answer.status_code == 400
    assert remark(model, field) in answer.content.decode()


@pytest.mark.django_db
def test_another_optimizer_is_refused_with_the_sentences_of_the_table(sdk: SdkClient) -> None:
    created = sdk.post(
        "create_model",
        session_id=sdk.session(),
        model_seq_id=0,
        base_model=base_model_get(None).name,
        lora_config={"rank": 4},
        optimizer_config=DIMUON,
    )
    assert created.status_code == 400
    assert remark("DimuonOptimizerConfig", "version") in created.content.decode()

    model_id = sdk.model()
    step = sdk.post("optim_step", model_id=model_id, seq_id=1, optimizer_params=DIMUON)
    assert remark("DimuonParams", "beta1") in sdk.retrieve(step).json()["error"]
