"""Results that an earlier version stored are answered in every dialect as that version did."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from futures.models import Future
from futures.payload import decode, encode
from futures.services import future_submit
from tests.conftest import ApiClient
from tests.first_results import FIRST_RESULTS, PASS, SAMPLE, SCORED_SAMPLE
from tests.sdk.conftest import SdkClient
from tinkerapi.api.dialect import PROTOBUF
from tinkerapi.api.openai.answers import ChatForm, CompletionForm, choices_of
from tinkerapi.api.renderers import to_json
from tinkerapi.api.sdk import tinker_public_pb2 as pb
from tinkerapi.models import ApiKey
from training.base_models import base_model_get

pytestmark = pytest.mark.django_db

SDK_TYPES = {
    "create_run": "create_model",
    "remove_run": "unload_model",
    "optim_step": "optim_step",
    "load_weights": "load_weights",
    "save_weights": "save_weights",
    "create_custom_loss": "create_custom_loss",
}


@pytest.fixture
def sdk(api: ApiClient) -> SdkClient:
    return SdkClient.with_new_key(api)


@pytest.fixture
def stored(sdk: SdkClient) -> Any:
    """A ready future with this result in the first form: ``stored("sample", {...})``."""

    def make(kind: str, first: dict[str, Any]) -> Future:
        return future_submit(
            owner_id=ApiKey.objects.get().user_id,
            queue=base_model_get(None).queue,
            kind=kind,
            payload={},
            result=encode(first),
        )

    return make


def retrieve(sdk: SdkClient, future: Future, accept: str = "application/json") -> Any:
    return sdk.api.post(
        "/api/v1/retrieve_future",
        headers={**sdk.headers, "Accept": accept},
        request_id=future.pk,
    )


@pytest.mark.parametrize(("kind", "first"), FIRST_RESULTS, ids=[kind for kind, _ in FIRST_RESULTS])
def test_the_quick_reference_answers_what_it_answered(
    sdk: SdkClient, api: ApiClient, stored: Any, kind: str, first: dict[str, Any]
) -> None:
    key = {"X-API-Key": sdk.headers["X-API-Key"]}
    answer = api.post("/retrieve_future", headers=key, request_id=stored(kind, first).pk)

    assert answer.status_code == 200
    assert answer.content == to_json(decode(encode(first)))


@pytest.mark.parametrize(
    ("kind", "first"),
    [(kind, first) for kind, first in FIRST_RESULTS if kind in SDK_TYPES],
    ids=[kind for kind, _ in FIRST_RESULTS if kind in SDK_TYPES],
)
def test_the_sdk_is_answered_with_the_same_fields_and_its_type(
    sdk: SdkClient, stored: Any, kind: str, first: dict[str, Any]
) -> None:
    answer = retrieve(sdk, stored(kind, first)).json()

    expected = SDK_TYPES[kind]
    if kind == "create_run" and "path" in first:
        expected = "load_weights"
    if "sampling_session_id" in first:
        expected = "save_weights_for_sampler"
    assert answer == {**first, "type": expected}


def test_the_sdk_reads_the_numbers_of_a_pass(sdk: SdkClient, stored: Any) -> None:
    future = stored("forward_backward", PASS)

    message = pb.ForwardBackwardOutput.FromString(retrieve(sdk, future, PROTOBUF).content)
    answer = retrieve(sdk, future).json()

    metrics = {name: value for name, value in PASS["metrics"].items() if ":" in name}
    assert dict(message.metrics) == answer["metrics"] == metrics
    sent = [output["logprobs"] for output in PASS["loss_fn_outputs"]]
    data = [record.fields["logprobs"].data for record in message.loss_fn_outputs]
    assert b"".join(data) == b"".join(array.tobytes() for array in sent)
    for output, array in zip(answer["loss_fn_outputs"], sent, strict=True):
        assert output["logprobs"]["shape"] == list(array.shape)
        read = np.array(output["logprobs"]["data"], np.float32).reshape(array.shape)
        np.testing.assert_array_equal(read, array)


def test_the_sdk_reads_the_numbers_of_a_sample(sdk: SdkClient, stored: Any) -> None:
    future = stored("sample", SCORED_SAMPLE)

    message = pb.SampleResponse.FromString(retrieve(sdk, future, PROTOBUF).content)

    [sequence] = message.sequences
    assert np.frombuffer(sequence.tokens, np.int32).tolist() == [5, 6]
    assert np.frombuffer(sequence.logprobs, np.float32)[0] == -0.5
    assert message.prompt_logprobs == SCORED_SAMPLE["prompt_logprobs"].tobytes()
    assert message.topk_prompt_logprobs.k == 1
    assert retrieve(sdk, future).json()["prompt_logprobs"] == [None, -1.5]


def test_openais_clients_read_the_tokens_of_a_sample(stored: Any) -> None:
    [choice] = choices_of(stored("sample", SCORED_SAMPLE))

    assert CompletionForm().logprobs(choice) == {
        "tokens": ["h", "\ufffd", "h", "\ufffd"],
        "token_logprobs": [None, -1.5, -0.5, pytest.approx(-0.2)],
        "top_logprobs": [
            None,
            {"\ufffd": -0.25, "d": -99999.0},
            {"a": -0.5, "b": -1.5, "h": -0.5},
            {"\ufffd": -0.25, "d": -99999.0},
        ],
        "text_offset": [0, 1, 2, 3],
    }
    first, second = ChatForm().logprobs(choice)["content"]
    assert (first["bytes"], second["bytes"]) == ([104], None)
    assert second["top_logprobs"][0] == {"token": "\ufffd", "bytes": [195], "logprob": -0.25}
    assert [item.sequence.text for item in choices_of(stored("sample", SAMPLE))] == ["hi", ""]
