"""A client repeats a request after an upgrade: it is the same request.

Whether it is, a digest of what is stored tells. Those here were printed by the first version, whose
futures may still be repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from futures.models import Future
from tests.conftest import ApiClient
from tests.sdk.conftest import SdkClient
from tests.sdk.official_sdk import sdk_datum

pytestmark = pytest.mark.django_db

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
DATUM = {
    "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
    "loss_fn_inputs": {"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 1.0]},
}
RL = {
    "target_tokens": [2, 3, 4],
    "logprobs": [-1.0, -2.0, -3.0],
    "advantages": [0.0, 1.0, -1.0],
}

# Path and body; every one is of the model "m".
QUICK_REFERENCE: list[tuple[str, dict[str, Any]]] = [
    ("/fwdbwd", {"data": [CHAT]}),
    ("/fwdbwd", {"data": [CHAT, CHAT], "train_on": "all"}),
    ("/fwdbwd", {"data": [DATUM]}),
    ("/fwdbwd", {"data": [{**DATUM, "loss_fn_inputs": RL}], "loss_fn": "ppo"}),
    ("/fwdbwd", {"data": [{**DATUM, "loss_fn_inputs": RL}], "loss_fn": "importance_sampling"}),
    ("/api/v1/forward_async", {"data": [CHAT]}),
    ("/api/v1/forward_async", {"data": [DATUM]}),
    ("/optim_step", {}),
    ("/optim_step", {"adam_params": {"learning_rate": 0.01, "beta2": 0.9}}),
    ("/api/v1/asample", {"messages": CHAT[:1], "sampling_params": {"seed": 1}}),
    (
        "/api/v1/asample",
        {
            "prompt": "once",
            "num_samples": 2,
            "sampling_params": {
                "seed": 2,
                "max_tokens": 5,
                "stop": ["x", "y"],
                "temperature": 0.5,
                "top_k": 3,
                "top_p": 0.9,
            },
        },
    ),
    ("/api/v1/asample", {"prompt": [1, 2, 3], "sampling_params": {"seed": 3, "stop": [4]}}),
    ("/save_weights", {"name": "a"}),
    ("/save_weights", {"name": "b", "overwrite": True}),
    ("/save_weights_for_sampler", {"name": "c"}),
    ("/remove_lora", {}),
]


def sdk_requests(sdk: SdkClient) -> Iterator[Any]:
    """The answers to requests of an SDK's model, in order."""
    model = sdk.model()
    yield sdk.forward_backward(model, 1)
    yield sdk.forward_backward(
        model, 2, [sdk_datum([1, 2, 3], **RL)], loss_fn="ppo", config={"clip_low_threshold": 0.5}
    )
    yield sdk.forward_backward(
        model, 3, [sdk_datum([1, 2, 3], target_tokens=[2, 3, 4])], forward_only=True
    )
    yield sdk.optim_step(model, 4, learning_rate=0.01)
    yield sdk.post("save_weights", model_id=model, seq_id=5, path="a")
    yield sdk.post("save_weights", model_id=model, seq_id=6, path="b", ttl_seconds=60)
    yield sdk.post("save_weights_for_sampler", model_id=model, seq_id=7, path="c")
    yield sdk.post("save_weights_for_sampler", model_id=model, seq_id=8, sampling_session_seq_id=0)


FIRST_DIGESTS = [
    ("create_run", "f4167524a322190e"),
    ("forward_backward", "20805313a9305f7f"),
    ("forward_backward", "6bb8a6e59d282a19"),
    ("forward_backward", "35c5421590bc2c1a"),
    ("forward_backward", "44aed264414d7718"),
    ("forward_backward", "0dcfb37c6aa79daf"),
    ("forward", "a40c62ade4f322fb"),
    ("forward", "d0423e2a2aeb80a4"),
    ("optim_step", "bff82a66c9b6f959"),
    ("optim_step", "5dabd7571628adc9"),
    ("sample", "2b9d5f1189946ab2"),
    ("sample", "a4dbd7473830553f"),
    ("sample", "e343e5ab9dc530f6"),
    ("save_weights", "f2e640a6642413a2"),
    ("save_weights", "fee92eda4079078f"),
    ("save_weights", "5683d148ff032a16"),
    ("remove_run", "9208c57da56a841a"),
    ("forward_backward", "540c3ceb730440e8"),
    ("forward_backward", "44447a6b6a69f094"),
    ("forward", "13ceee22d98c7105"),
    ("optim_step", "0a1ef79b50a7a380"),
    ("save_weights", "f2e640a6642413a2"),
    ("save_weights", "4c5e17139d4ba0c6"),
    ("save_weights", "5683d148ff032a16"),
    ("save_weights", "9da5ed4c671765d3"),
]
"""Kind and the beginning of the digest, in the order in which they are sent below."""


def test_a_request_of_the_first_version_is_the_same_request_when_it_is_repeated(
    api: ApiClient,
) -> None:
    for path, body in QUICK_REFERENCE:
        assert api.post(path, model_id="m", **body).status_code in (200, 202)
    for answer in sdk_requests(SdkClient.with_new_key(api)):
        assert answer.status_code == 200, answer.content

    sent = Future.objects.exclude(kind="create_run", lane__id__contains=":train:")  # names its id
    rows = sent.order_by("created_at").values_list("kind", "payload_digest")
    digests = [(kind, bytes(digest).hex()[:16]) for kind, digest in rows]
    assert digests == FIRST_DIGESTS
