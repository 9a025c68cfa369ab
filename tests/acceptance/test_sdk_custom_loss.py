"""The official tinker SDK's own losses: traced by the client, run by the server."""

from __future__ import annotations

import pytest

from tests.acceptance.official_sdk import run_script
from tests.server import Server

pytestmark = pytest.mark.acceptance


def test_an_uploaded_loss_trains_as_the_same_loss_in_the_client_does(sdk_server: Server) -> None:
    facts = run_script(
        sdk_server,
        """
        import torch

        def clipped(logprobs, weights, reference):
            ratio = torch.exp(logprobs - reference)
            gain = torch.minimum(ratio * weights, torch.clamp(ratio, 0.8, 1.2) * weights)
            n = logprobs.shape[0]
            return -gain.sum() / n, {
                "custom/ratio:mean": ratio.mean(),
                "custom/nll:sum": -logprobs.sum(),
            }

        def in_the_client(data, logprobs_list):
            total = 0.0
            for item, logprobs in zip(data, logprobs_list):
                inputs = {k: v.to_torch() for k, v in item.loss_fn_inputs.items()}
                total = total + clipped(logprobs, inputs["weights"], inputs["reference"])[0]
            return total, {}

        def example(tokens):
            base = datum(tokens)
            reference = torch.linspace(-6.0, -5.0, len(tokens) - 1)
            return types.Datum(
                model_input=base.model_input,
                loss_fn_inputs={**base.loss_fn_inputs,
                                "reference": types.TensorData.from_torch(reference)},
            )

        data = [example([3 + i, 5, 8, 13, 21 + i]) for i in range(3)]  # in two chunks
        ranks = {"logprobs": 1, "weights": 1, "reference": 1}
        handle = service.create_custom_loss(clipped, ranks).result()
        report(loss_id=handle.loss_id)
        for name, loss in (("server", handle), ("client", in_the_client)):
            model = new_model(seed=3)
            result = model.forward_backward_custom(data, loss).result()
            step = model.optim_step(types.AdamParams()).result()
            logprobs = [float(o["logprobs"].to_torch().sum()) for o in result.loss_fn_outputs]
            report(**{name: [result.metrics["loss:sum"], step.metrics["grad_norm"]],
                      name + "_logprobs": logprobs, name + "_metrics": sorted(result.metrics),
                      name + "_nll": result.metrics.get("custom/nll:sum")})
        """,
    )

    assert facts["loss_id"].endswith(":loss:0")
    assert facts["server"] == pytest.approx(facts["client"], rel=1e-5)
    assert facts["server_logprobs"] == pytest.approx(facts["client_logprobs"], rel=1e-5)
    assert facts["server_nll"] == pytest.approx(-sum(facts["server_logprobs"]), rel=1e-5)
    assert {"custom/nll:sum", "custom/ratio:mean", "loss:sum"} <= set(facts["server_metrics"])


def test_an_uploaded_loss_that_goes_wrong_fails_by_name(sdk_server: Server) -> None:
    facts = run_script(
        sdk_server,
        """
        import torch

        def random(logprobs):
            return (logprobs * torch.rand_like(logprobs)).sum(), {}

        def misfit(logprobs):
            return (logprobs * logprobs[1:]).sum(), {}

        try:
            service.create_custom_loss(random, {"logprobs": 1}).result()
        except Exception as error:
            report(refused=str(error))
        handle = service.create_custom_loss(misfit, {"logprobs": 1}).result()
        model = new_model()
        data = [datum([5, 6, 7, 8])]
        report(failed=failure(model.forward_backward_custom(data, handle)))
        report(after=model.forward_backward(data, "cross_entropy").result().metrics["loss:sum"])
        """,
    )

    assert "'torch.rand_like' is not one of the operations of a custom loss" in facts["refused"]
    message, category = facts["failed"]
    assert "data[0]: custom loss 'misfit', node mul (operator.mul): " in message
    assert category.lower().endswith("user")
    assert facts["after"] > 0
