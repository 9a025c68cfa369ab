"""create_custom_loss: a loss that the SDK itself traced is kept, and named in a request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

from futures.models import Future
from futures.payload import decode
from tests.sdk.conftest import SdkClient
from tests.sdk.official_sdk import sdk_datum
from training.models import CustomLoss
from training.selectors import custom_loss_get


def squared(
    logprobs: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = (weights * logprobs**2).sum()
    return loss, {"custom/largest:mean": logprobs.max()}


def upload(sdk: SdkClient, session_id: str, number: int = 0, **changes: Any) -> Any:
    handle = trace_loss(squared, {"logprobs": 1, "weights": 1}, session_id)
    body = {
        "session_id": session_id,
        "custom_loss_seq_id": number,
        "name": handle.name,
        "inputs": [item.model_dump() for item in handle.inputs],
        "graph": encode_graph(handle).model_dump(),
        "type": "create_custom_loss",
    }
    return sdk.post("create_custom_loss", **{**body, **changes})


def test_an_upload_is_kept_once_and_ready_at_once(sdk: SdkClient) -> None:
    session_id = sdk.session()
    first, again = upload(sdk, session_id), upload(sdk, session_id)

    assert first.json() == again.json()
    loss_id = sdk.result(first)["loss_id"]
    kept = CustomLoss.objects.get()
    assert custom_loss_get(session_id=session_id, loss_id=loss_id) == kept
    assert kept.name == "squared"
    assert [item["name"] for item in kept.inputs] == ["logprobs", "weights"]


def test_a_number_is_used_once(sdk: SdkClient) -> None:
    session_id = sdk.session()
    upload(sdk, session_id)
    bad = {"format": 1, "nodes": []}

    assert upload(sdk, session_id, name="another").status_code == 422
    assert upload(sdk, session_id, graph=bad).status_code == 422
    refused = [upload(sdk, session_id, 1, graph=bad) for _ in range(2)]
    assert refused[0].json() == refused[1].json()
    assert sdk.result(refused[0])["category"] == "user"
    assert upload(sdk, session_id, 1).status_code == 422
    assert CustomLoss.objects.count() == 1


def test_a_graph_of_anything_else_than_arithmetic_fails_by_name(sdk: SdkClient) -> None:
    graph = {
        "format": 1,
        "nodes": [
            {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
            {"op": "call_function", "name": "x", "target": "os.system", "args": ["true"]},
            {"op": "output", "name": "output", "target": "output", "args": [{"ref": "x"}]},
        ],
    }
    inputs = [{"name": "logprobs", "rank": 1}]
    answer = upload(sdk, sdk.session(), graph=graph, inputs=inputs)

    assert "'os.system'" in sdk.result(answer)["error"]
    assert not CustomLoss.objects.exists()


def test_a_request_names_the_loss_and_brings_what_it_reads(sdk: SdkClient) -> None:
    session_id = sdk.session()
    model_id = sdk.model(session_id)
    loss_id = sdk.result(upload(sdk, session_id))["loss_id"]
    config = {"loss_id": loss_id}
    bare = [sdk_datum([1, 2], target_tokens=[2, 3])]

    good = sdk.forward_backward(model_id, 1, loss_fn="custom", config=config)
    missing = sdk.forward_backward(model_id, 2, bare, loss_fn="custom", config=config)
    unnamed = sdk.forward_backward(model_id, 3, loss_fn="custom")

    future = Future.objects.get(pk=good.json()["request_id"])
    payload = decode(bytes(future.payload or b""))
    assert (future.state, payload["loss_fn"], payload["loss_id"]) == ("pending", "custom", loss_id)
    assert sdk.result(missing)["error"].startswith("data[0].loss_fn_inputs.weights: ")
    assert sdk.result(unnamed)["error"].startswith("loss_fn_config.loss_id: ")


@pytest.mark.parametrize("whose", ["another session's", "nobody's", "nonsense"])
def test_only_the_sessions_own_losses_are_found(sdk: SdkClient, whose: str) -> None:
    other = sdk.result(upload(sdk, sdk.session()))["loss_id"]
    session_id = sdk.session()
    model_id = sdk.model(session_id)
    loss_id = {
        "another session's": other,
        "nobody's": f"{session_id}:loss:7",
        "nonsense": "loss",
    }[whose]

    answer = sdk.forward_backward(model_id, 1, loss_fn="custom", config={"loss_id": loss_id})

    assert sdk.result(answer)["error"].startswith("loss_id: this session has no custom loss ")
