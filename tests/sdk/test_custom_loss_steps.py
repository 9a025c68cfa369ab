"""The worker's results for requests with an uploaded loss."""

from __future__ import annotations

from tests.conftest import InProcessWorker
from tests.sdk.conftest import SdkClient
from training.models import CustomLoss

INPUTS = [{"name": "logprobs", "rank": 1}]
GRAPH = {
    "format": 1,
    "nodes": [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
        {"op": "call_method", "name": "x", "target": "sum", "args": [{"ref": "logprobs"}]},
        {
            "op": "output",
            "name": "output",
            "target": "output",
            "args": [{"tuple": [{"ref": "x"}, {"dict": {}}]}],
        },
    ],
}


def uploaded(sdk: SdkClient, session_id: str) -> dict[str, str]:
    """The config of a request for the loss ``GRAPH``."""
    answer = sdk.post(
        "create_custom_loss",
        session_id=session_id,
        custom_loss_seq_id=0,
        name="total",
        inputs=INPUTS,
        graph=GRAPH,
    )
    return {"loss_id": sdk.result(answer)["loss_id"]}


def test_the_worker_runs_the_loss_that_the_request_names(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    session_id = sdk.session()
    config, model_id = uploaded(sdk, session_id), sdk.model(session_id)
    passed = sdk.forward_backward(model_id, 1, loss_fn="custom", config=config)
    step = sdk.optim_step(model_id, 2)
    work()

    assert "loss:sum" in sdk.result(passed).metrics
    assert sdk.result(step)["metrics"]["grad_norm"] > 0


def test_a_setting_beside_the_loss_id_is_refused(sdk: SdkClient, work: InProcessWorker) -> None:
    session_id = sdk.session()
    config, model_id = uploaded(sdk, session_id), sdk.model(session_id)
    answer = sdk.forward_backward(model_id, 1, loss_fn="custom", config={**config, "scale": 2.0})
    work()

    assert sdk.result(answer)["error"] == "loss_fn_config.scale: unknown for a custom loss"


def test_a_loss_that_is_gone_fails_its_request_by_name(
    sdk: SdkClient, work: InProcessWorker
) -> None:
    session_id = sdk.session()
    config, model_id = uploaded(sdk, session_id), sdk.model(session_id)
    answer = sdk.forward_backward(model_id, 1, loss_fn="custom", config=config)
    CustomLoss.objects.all().delete()
    work()

    failure = sdk.result(answer)
    assert failure["error"].startswith("loss_id: this session has no custom loss ")
    assert failure["category"] == "user"
