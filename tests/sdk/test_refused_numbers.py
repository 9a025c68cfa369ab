"""A refused request uses its number, for every reason of refusal, or its model would wait."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from django.db import DataError, transaction

from futures.models import Future
from tests.conftest import ApiClient, InProcessWorker
from tests.sdk.conftest import SdkClient
from tests.sdk.official_sdk import sdk_body, sdk_datum
from tinkerapi.api.dialect import PROTOBUF
from tinkerapi.api.sdk.parse.broken_bodies import ids_of_broken_json, ids_of_broken_protobuf
from tinkerapi.api.sdk.views import steps

DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
    "loss_fn_inputs": {"target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]}},
}


JSON_ONLY = (
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "save_weights_external",
    "load_weights",
)


def sent(sdk: SdkClient, path: str, body: bytes | str, content_type: str) -> Any:
    return sdk.api.client.post(
        f"/api/v1/{path}", body, content_type=content_type, headers=sdk.headers
    )


def json_bodies(model_id: str) -> list[tuple[str, str]]:
    """Paths and bodies that cannot be accepted, numbered from 1 in their order."""
    hostile = ["NaN", "1e400", '"\\ud800"', "[" * 3000 + "]" * 3000, "{", '"\x01"']
    hostile.append(
        '{"seq_id": 7, "model_id": "' + "[" * 40 + '", "a": ' + "[" * 40 + "]" * 40 + "}"
    )
    rest = [(path, f'"type": {value}') for value in hostile for path in JSON_ONLY]
    for name in ("\\u0000", "a\\u0000b", "x" * 3000, "\\u202e\\n\\u001b[31m"):
        rest += [(path, f'"{name}": 1') for path in JSON_ONLY]
        spoilt = json.dumps(DATUM).replace("target_tokens", name)
        config = f'"loss_fn": "cross_entropy", "loss_fn_config": {{"{name}": 1}}'
        for call in (f'"data": [{spoilt}], {config}', f'"data": 1, "loss_fn": "{name}"'):
            rest.append(("forward_backward", f'"forward_backward_input": {{{call}}}'))
    ids = f'"model_id": "{model_id}", "seq_id": '
    return [(path, f"{{{ids}{number}, {text}}}") for number, (path, text) in enumerate(rest, 1)]


def test_no_json_body_that_is_refused_leaves_its_number_open(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    work()
    bodies = json_bodies(model_id)
    for path, text in bodies:
        answer = sent(sdk, path, text, "application/json")
        assert answer.status_code == 200, (path, text[:200], answer.content)
    last = sdk.forward_backward(model_id, len(bodies) + 1)
    work()

    assert sdk.result(last).metrics
    assert Future.objects.filter(lane_id=model_id, state="failed").count() == len(bodies)


def test_no_protobuf_body_that_is_refused_leaves_its_number_open(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    model_id = sdk.model()
    work()
    datum = sdk_datum([1, 2], target_tokens=[2, 3], weights=[1.0, 1.0])
    seq_id = 0
    for config in ({"a\0": 1.0}, {"x" * 5000: 1.0}, {"\0": "\0"}):
        seq_id += 1
        answer = sdk.forward_backward(model_id, seq_id, [datum], config=config)
        assert sdk.retrieve(answer).json()["category"] == "user"
    for name in ("\0", "a\0b", "x" * 3000, "\u202e\n\x1b[31m"):
        seq_id += 1
        more = {name: np.ones(2, np.float32)}
        spoilt = sdk_datum([1, 2], target_tokens=[2, 3], weights=[1.0, 1.0], **more)
        sdk.forward_backward(model_id, seq_id, [spoilt])
    for end in (b"\x1a\xff", b"\x22\x02\xff\xff", b"\x7b", b"\x1a\x05ab"):
        seq_id += 1
        body = sdk_body([datum], model_id=model_id, seq_id=seq_id) + end
        answer = sent(sdk, "forward_backward", body, PROTOBUF)
        assert sdk.retrieve(answer).json()["category"] == "user"
    last = sdk.forward_backward(model_id, seq_id + 1)
    work()

    assert sdk.result(last).metrics
    for error in Future.objects.filter(state="failed").values_list("error", flat=True):
        assert error.replace("\n", "").isprintable()
        assert len(error) < 5000


def test_a_value_that_only_the_database_refuses_uses_its_number_up_too(
    sdk: SdkClient, work: InProcessWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        with transaction.atomic():
            Future.objects.filter(pk="\0").exists()

    model_id = sdk.model()
    with pytest.raises(DataError):
        refuse()
    with monkeypatch.context() as patched:
        patched.setattr(steps, "optim_step_submit", refuse)
        refused = sdk.optim_step(model_id, 1)
    last = sdk.forward_backward(model_id, 2)
    work()

    assert "cannot be stored" in sdk.result(refused)["error"]
    assert sdk.result(last).metrics


@pytest.mark.parametrize(
    ("body", "ids"),
    [
        (b'{"model_id": "m", "seq_id": 3, "x": NaN}', {"model_id": "m", "seq_id": 3}),
        (b'{"x": [[[[, "seq_id":3,"model_id":"a:train:0"', {"model_id": "a:train:0", "seq_id": 3}),
        (b'{"model_id": "m", "x": NaN}', {}),
        (b'{"model_id": "m", "model_id": "n", "seq_id": 3, NaN}', {}),
        (b'{"model_id": "m", "seq_id": 3, "model_id": "m", NaN}', {}),
        (
            b'{"x": {"seq_id": 4}, "seq_id": 3, "model_id": "m", "y": [{"model_id": "n"}], NaN}',
            {"model_id": "m", "seq_id": 3},
        ),
        (
            b'{"x": "\\\\", "y": "[{ ,\\"", "z": {"seq_id": 4}, "seq_id": 3, "model_id": "m", NaN}',
            {"model_id": "m", "seq_id": 3},
        ),
        (b'{"x": [[[[{"seq_id": 4}, "seq_id": 3, "model_id": "m", NaN}', {}),
        (b'"seq_id": 1, ' * 1000 + b'{"model_id": "m", "seq_id": 3}', {}),
        (b'{"model_id": "m", "seq_id": 3.5, NaN}', {}),
        (b'{"model_id": "m", "x": "\\"seq_id\\": 3", NaN}', {}),
        (b'{"model_id": "m", "seq_id": 99999999999999999999, NaN}', {}),
        (b"", {}),
    ],
)
def test_ids_in_broken_json_are_taken_where_there_is_nothing_to_guess(
    body: bytes, ids: dict[str, Any]
) -> None:
    assert ids_of_broken_json(body) == ids


def test_ids_of_a_broken_message_are_what_stands_before_it_breaks() -> None:
    body = sdk_body([sdk_datum([1, 2], target_tokens=[2, 3])], model_id="m", seq_id=300)

    assert ids_of_broken_protobuf(body) == {"model_id": "m", "seq_id": 300}
    for end in range(len(body)):
        assert set(ids_of_broken_protobuf(body[:end]).items()) <= {
            ("model_id", "m"),
            ("seq_id", 300),
            ("seq_id", 44),
        }
    assert ids_of_broken_protobuf(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x10\x01") == {}


def test_a_body_without_a_readable_number_is_a_400(sdk: SdkClient, api: ApiClient) -> None:
    for body, content_type in ((b"{", "application/json"), (b"\x1a\xff", PROTOBUF)):
        assert sent(sdk, "forward_backward", body, content_type).status_code == 400
